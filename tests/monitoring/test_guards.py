"""Each trouble is said once, in words that name the heading of docs/troubleshooting.md, and only when it is there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from monitoring.guards import RunGuards

FINE = {"objective/kl": 2.0, "objective/kl_per_token": 0.1, "entropy": 2.0, "reward": 0.5, "reward_std": 0.2}
TROUBLES = {
    "KL blow-up": {"objective/kl": 30.0, "objective/kl_per_token": 1.5},
    "Entropy collapse": {"entropy": 0.1},
    "Reward saturation": {"reward_std": 0.0},
    "Dead groups": {"frac_reward_zero_std": 0.95},
    "Skipped updates": {"skipped_updates": 1.0},
    "Nothing ends": {"completions/clipped_ratio": 1.0},
    "Empty answers": {"completions/max_length": 1.0, "completions/clipped_ratio": 0.0},
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_trouble_is_said_once_and_again_after_a_recovery(name: str) -> None:
    said: list[str] = []
    guards = RunGuards(said.append)
    step = 0
    for metrics, times, sentences in [
        (FINE, 6, 0),
        (TROUBLES[name], 12, 1),
        (FINE, 4, 1),  # a lull
        (TROUBLES[name], 6, 1),
        (FINE, 5, 1),
        (TROUBLES[name], 6, 2),
    ]:
        for _ in range(times):
            step += 1
            guards.on_step_end(step, {**FINE, **metrics})
        assert len(said) == sentences, said
    assert f'"{name}")' in said[0]
    text = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    heading = re.search(rf"^## {name}\n\n`([^`]+)`$", text, re.M)
    assert heading is not None
    assert heading[1] in said[0]  # what a user looks for is what the run has said


def test_answers_of_one_token_that_were_cut_are_not_empty_and_cut_ones_may_teach_nothing() -> None:
    said: list[str] = []
    guards = RunGuards(said.append)
    for step in range(5):
        guards.on_step_end(step, {"completions/max_length": 1.0, "completions/clipped_ratio": 1.0})
    assert len(said) == 1
    assert "nothing is learned" not in said[0]
    guards = RunGuards(said.append)
    for step in range(5):
        guards.on_step_end(step, {"completions/clipped_ratio": 1.0, "num_updates": 0.0})
    assert "all were cut at max_new_tokens, and nothing is learned from them" in said[1]


def test_a_metric_that_is_not_there_or_no_number_is_no_trouble() -> None:
    said: list[str] = []
    guards = RunGuards(said.append)
    for step in range(10):
        guards.on_step_end(step, {"reward": float("nan"), "entropy": float("nan"), "objective/kl": None})
    assert said == []


@pytest.mark.parametrize(
    "before", [None, "", "[1]\n", "torn", '{"step": 1}\n{"step": 2, "entropy": 5.0}\n{"entropy": 1}\n']
)
def test_a_run_that_goes_on_knows_the_entropy_of_its_first_steps(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        (tmp_path / "metrics.jsonl").write_text(before)
    said: list[str] = []
    guards = RunGuards(said.append)
    guards.on_train_begin(SimpleNamespace(run_folder=tmp_path))
    guards.on_step_end(3, {"entropy": 0.4})
    guards.on_step_end(4, {"entropy": 0.3})
    assert len(said) == (before is not None and "5.0" in before)
    if said:
        assert "step 3: the policy's entropy is 0.4 nats per token and was 5 at first" in said[0]


def test_a_step_of_one_completion_is_no_saturation_unless_the_next_are_like_it() -> None:
    """The deviation of one reward is 0; of groups that are each alike and differ, the groups are what is dead."""
    said: list[str] = []
    guards = RunGuards(said.append)
    for step in range(10):
        guards.on_step_end(step, {"reward": step / 10, "reward_std": 0.0})
    assert said == []
    for step in range(5):
        guards.on_step_end(step, {"reward": step / 10, "reward_std": 0.0, "frac_reward_zero_std": 1.0})
    assert len(said) == 1
    assert '"Dead groups")' in said[0]
    for step in range(6):
        guards.on_step_end(step, {"reward": 0.7, "reward_std": 0.0, "frac_reward_zero_std": 1.0})
    assert len(said) == 2
    assert '"Reward saturation")' in said[1]
    assert "0.7" in said[1]
