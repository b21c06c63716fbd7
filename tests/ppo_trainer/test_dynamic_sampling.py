"""Dead groups are replaced: by whom, judged by what, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from monitoring.metrics_file import read_metrics
from ppo_trainer.dynamic_sampling import collect_live_groups
from ppo_trainer.ppo_trainer import PPOTrainer
from rewards.composition import ScoredBatch
from tests.tabular import table_model

PROMPTS = [Prompt(i, f"p{i}", (i + 1,), {}) for i in range(6)]
CONFIG = PPOConfig(group_size=2, dynamic_sampling=True, dynamic_sampling_max_batches=4)


def generate(prompts: Sequence[Prompt], first_member: int) -> list[Rollout]:
    return [
        Rollout(prompt, first_member + m, (7,), (-1.0,), True, f"{prompt.index}.{first_member + m}")
        for prompt in prompts
        for m in range(2)
    ]


def scoring(live: Callable[[Rollout], bool]) -> Callable[[Sequence[Rollout]], ScoredBatch]:
    """1 and 0 in the groups of ``live`` prompts, 0 and 0 in the others; a second reward differs everywhere."""

    def score(rollouts: Sequence[Rollout]) -> ScoredBatch:
        total = np.array([float(live(r) and r.member % 2) for r in rollouts], dtype=np.float32)
        other = np.array([float(r.member) for r in rollouts], dtype=np.float32)
        return ScoredBatch(total, {"right": total, "length": other})

    return score


def collect(live: Callable[[Rollout], bool], config: PPOConfig = CONFIG, count: int = 3) -> Any:
    return collect_live_groups(PROMPTS[:count], PROMPTS, generate, scoring(live), config)


def test_live_groups_stay_and_dead_ones_are_replaced_by_prompts_that_were_not_used() -> None:
    rollouts, scored, metrics = collect(lambda r: r.prompt.index in (0, 2, 4, 5))
    assert [r.text for r in rollouts] == ["0.0", "0.1", "2.0", "2.1", "4.0", "4.1"]
    assert scored.total.tolist() == [0, 1] * 3
    assert scored.components["length"].tolist() == [0, 1] * 3
    # 3 groups at first; 3 is tried for 1 and is dead; then 4.
    assert metrics == {
        "dynamic_sampling/acceptance_rate": 3 / 5,
        "dynamic_sampling/sampled_groups": 5.0,
        "dynamic_sampling/live_groups": 3.0,
    }


def test_a_prompt_that_comes_again_gets_other_random_numbers_and_its_group_stays_one() -> None:
    rollouts, _, _ = collect(lambda r: r.prompt.index == 0 or r.member >= 2)
    by_prompt: dict[int, list[int]] = {}
    for r in rollouts:
        by_prompt.setdefault(r.prompt.index, []).append(r.member)
    assert by_prompt[0] == [0, 1]
    assert len(by_prompt) == 3
    assert all(members == [2, 3] for index, members in by_prompt.items() if index != 0)


def test_the_cap_ends_the_search_with_fewer_groups() -> None:
    rollouts, _, metrics = collect(lambda r: r.prompt.index == 1)
    assert [r.prompt.index for r in rollouts] == [1, 1]
    assert metrics["dynamic_sampling/sampled_groups"] == 3 + 2 * 3  # four batches in all


def test_without_any_live_group_the_first_batch_comes_back_as_it_was() -> None:
    rollouts, scored, metrics = collect(lambda r: False)
    assert [r.prompt.index for r in rollouts] == [0, 0, 1, 1, 2, 2]
    assert not scored.total.any()
    assert metrics["dynamic_sampling/acceptance_rate"] == 0


def test_one_named_reward_may_be_the_judge() -> None:
    config = CONFIG.replace(dynamic_sampling_reward="length")
    rollouts, _, metrics = collect(lambda r: False, config)
    assert len(rollouts) == 6
    assert metrics["dynamic_sampling/acceptance_rate"] == 1


def test_a_judge_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = PPOConfig(
        algorithm="dapo",
        model_name=str(tmp_path / "nowhere"),
        dynamic_sampling_reward="sequential_digit",
    )
    with pytest.raises(InvalidConfigurationError, match='did you mean "sequential_digits"'):
        PPOTrainer(config, reward_model="sequential_digits")


# Through the trainer ---------------------------------------------------------------------------------------


def trainer_for(folder: Path, reward: Any, **options: Any) -> PPOTrainer:
    config = PPOConfig(
        model_name="embedded",
        fine_tune_type="full",
        output_dir=str(folder / "run"),
        verbose=False,
        **{
            "algorithm": "dapo",
            "max_new_tokens": 3,
            "batch_size": 2,
            "group_size": 8,
            "learning_rate": 0.05,
            **options,
        },
    )
    letters = "abcdef"
    return PPOTrainer(
        config, model=table_model({letter: [0.0] * 6 for letter in letters}, letters), reward_model=reward
    )


def vowels_if_possible(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Hopeless for the prompts b, c and d."""
    return [
        float(prompt in "aef") * sum(letter in "ae" for letter in text) / 3
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def test_every_step_has_its_number_of_live_groups_although_half_of_the_prompts_are_hopeless(
    tmp_path: Path,
) -> None:
    trainer = trainer_for(tmp_path, vowels_if_possible)
    history = trainer.train(list("abcdef"), num_epochs=6)["history"]
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "kind" not in m]
    assert len(steps) == 18
    assert all(m["dynamic_sampling/live_groups"] == 2 for m in steps)
    assert all(m["frac_reward_zero_std"] == 0 for m in steps)
    rates = [m["dynamic_sampling/acceptance_rate"] for m in steps]
    assert 0.2 < np.mean(rates) < 0.95
    assert history[-1]["avg_reward"] > history[0]["avg_reward"] + 0.1


def test_groups_are_judged_by_what_the_reward_said_and_not_by_shaped_scores(tmp_path: Path) -> None:
    """Lengths differ, so penalties do; everything is equally wrong, so nothing is to be learned."""
    trainer = trainer_for(
        tmp_path,
        lambda completions, **columns: [0.0] * len(completions),
        dynamic_sampling_max_batches=2,
        missing_end_penalty=1.0,
        overlong_buffer=1.0,
    )
    # Half of the answers end at once: the end token is as likely as all letters together.
    end = min(trainer.policy.end_ids)
    table = np.array(trainer.policy.model.lm_head.weight)
    table[end] = np.log(6)
    trainer.policy.model.lm_head.weight = mx.array(table)
    before = np.array(trainer.policy.model.lm_head.weight)
    trainer.train(list("ab"), num_epochs=2)
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "kind" not in m]
    assert all(0 < m["completions/clipped_ratio"] < 1 for m in steps)
    assert all(m["dynamic_sampling/live_groups"] == 0 for m in steps)
    np.testing.assert_array_equal(np.array(trainer.policy.model.lm_head.weight), before)


def test_a_seed_determines_what_is_sampled(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        trainer = trainer_for(tmp_path / name, vowels_if_possible)
        trainer.train(list("abcdef"), num_epochs=2)
        runs.append(np.array(trainer.policy.model.lm_head.weight))
    np.testing.assert_array_equal(*runs)
