"""What changes in the course of a run: KL coefficient, critic's warm-up."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    PPO,
    PPO_AND_GRPO,
    PROMPTS,
    arrays,
    ascii_share,
    config,
    even_share,
    same,
    steps_of,
)


@PPO_AND_GRPO
@pytest.mark.parametrize("target", [1e-3, 1e3])
def test_the_kl_coefficient_follows_the_kl(tmp_path: Path, kind: dict[str, Any], target: float) -> None:
    """After a batch of n: times 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon; n is 16 and horizon 100."""
    options = {**kind, "learning_rate": 2e-2, "fine_tune_type": "full", "kl_coef": 0.2, "group_size": 4}
    trainer = PPOTrainer(
        config(tmp_path, kl_target=target, kl_horizon=100, **options), reward_model=even_share
    )
    lines = steps_of(trainer.train(PROMPTS, num_epochs=6)["run_folder"])
    assert lines[0]["kl_coef"] == 0.2  # the first batch is judged with what was asked for
    for line, following in itertools.pairwise(lines):
        error = min(max(line["objective/kl"] / target - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(line["kl_coef"] * (1 + error * 16 / 100), rel=1e-5)
    assert (lines[-1]["kl_coef"] > lines[1]["kl_coef"]) == (target < 1)
    fixed = PPOTrainer(config(tmp_path / "2", **options), reward_model=even_share)
    assert {s["kl_coef"] for s in steps_of(fixed.train(PROMPTS, num_epochs=2)["run_folder"])} == {0.2}


@PPO_AND_GRPO
def test_the_kl_that_is_steered_by_is_that_of_whole_sequences(tmp_path: Path, kind: dict[str, Any]) -> None:
    """The second batch's KL depends on the first coefficient alone; with 1/1.1 of it as target the error is 0.1."""
    options = {**kind, "learning_rate": 0.1, "fine_tune_type": "full", "kl_coef": 0.2, "group_size": 4}
    fixed = PPOTrainer(config(tmp_path / "1", **options), reward_model=even_share)
    kl = steps_of(fixed.train(PROMPTS, num_epochs=2)["run_folder"])[1]["objective/kl"]
    assert kl > 0
    steered = PPOTrainer(
        config(tmp_path / "2", kl_target=kl / 1.1, kl_horizon=100, **options), reward_model=even_share
    )
    lines = steps_of(steered.train(PROMPTS, num_epochs=3)["run_folder"])
    assert lines[2]["kl_coef"] == pytest.approx(lines[1]["kl_coef"] * (1 + 0.1 * 16 / 100), rel=1e-4)


def test_in_the_value_warm_up_the_critic_learns_and_the_policy_stays(tmp_path: Path) -> None:
    trainer = PPOTrainer(
        config(tmp_path, value_warmup_steps=2, learning_rate=1e-2, **PPO), reward_model=ascii_share
    )
    assert trainer.value_model is not None
    seen = []

    class Watch:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
            assert trainer.value_model is not None
            seen.append(
                (arrays(trainer.policy.model), arrays(trainer.value_model.module), metrics["num_updates"])
            )

    before = (arrays(trainer.policy.model), arrays(trainer.value_model.module))
    trainer.train(PROMPTS, num_epochs=3, callbacks=[Watch()])
    policies, critics = [before[0], *(s[0] for s in seen)], [before[1], *(s[1] for s in seen)]
    assert [same(a, b) for a, b in itertools.pairwise(policies)] == [True, True, False]
    assert [same(a, b) for a, b in itertools.pairwise(critics)] == [False, False, False]
    assert [s[2] for s in seen] == [0, 0, 4]
