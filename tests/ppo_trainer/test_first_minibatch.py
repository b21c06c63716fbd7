"""The first minibatch, the ratio, the KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experience_buffer.data_structures import Experience
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    GRPO,
    KINDS,
    PPO,
    PPO_AND_GRPO,
    PROMPTS,
    arrays,
    ascii_share,
    config,
    even_share,
    fixed_batch,
    same,
    steps_of,
)


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_update_ratio_and_kl_are_exact_and_afterwards_they_move(
    tmp_path: Path, kind: dict[str, Any], temperature: float
) -> None:
    options = {
        **kind,
        "temperature": temperature,
        "num_epochs_per_rollout": 1,
        "minibatch_size": 4,
        "group_size": 4,
        "micro_batch_size": 3,
    }
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **options), reward_model=ascii_share)
    lines = steps_of(trainer.train(PROMPTS, num_epochs=3)["run_folder"])
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[2]["kl"] > 1e-4  # k3, which is never negative
    assert lines[0]["num_updates"] == 4
    for line in lines:
        assert line["first_minibatch/ratio_max"] == 1.0
        assert line["first_minibatch/approxkl"] == 0.0
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["val/ratio_max"] > 1.001  # from the second minibatch on


def test_the_kl_of_the_first_step_is_exactly_zero(tmp_path: Path) -> None:
    """Same weights, same rows in the same order: not even a rounding error apart."""
    trainer = PPOTrainer(config(tmp_path, temperature=0.7, **PPO), reward_model=ascii_share)
    line = steps_of(trainer.train(PROMPTS, num_epochs=1)["run_folder"])[0]
    assert line["objective/kl"] == 0.0
    assert line["objective/non_score_reward"] == pytest.approx(0.0, abs=1e-7)


def test_the_kl_is_that_of_the_policy_that_sampled_however_many_updates_follow(tmp_path: Path) -> None:
    options = {**GRPO, "num_epochs_per_rollout": 4, "learning_rate": 0.03, "fine_tune_type": "full"}
    trainer = PPOTrainer(config(tmp_path, old_logprobs_from="rollout", **options), reward_model=even_share)
    trainer.train(PROMPTS, num_epochs=1)
    first = steps_of(tmp_path / "run")[0]
    assert first["policy/approxkl_avg"] > 0.01, "the policy has left the one that sampled"
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)


def test_one_update_per_batch_needs_no_old_logprobs_and_its_ratio_is_one(tmp_path: Path) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, temperature=0.7, **GRPO), reward_model=ascii_share
    )
    made: list[Experience] = []
    update = trainer.update
    trainer.update = lambda experience: made.append(experience) or update(experience)  # type: ignore[method-assign, func-returns-value]
    lines = steps_of(trainer.train(PROMPTS, num_epochs=3)["run_folder"])
    assert all(experience.old_logprobs is None for experience in made)
    for line in lines:
        assert (line["val/ratio_min"], line["val/ratio_max"], line["policy/approxkl_avg"]) == (1.0, 1.0, 0.0)
        assert line["num_updates"] == 1
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[0]["kl"] < 1e-9
    assert lines[2]["kl"] > 1e-4


@PPO_AND_GRPO
def test_the_second_epoch_is_measured_against_the_policy_that_sampled(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """All rows twice through the optimiser: the ratio of the second pass is that of the updated policy."""
    options = {**kind, "fine_tune_type": "full", "learning_rate": 1e-2, "temperature": 0.7}
    twice = PPOTrainer(config(tmp_path / "2", num_epochs_per_rollout=2, **options), reward_model=even_share)
    once = PPOTrainer(config(tmp_path / "1", num_epochs_per_rollout=1, **options), reward_model=even_share)
    twice.step = once.step = 1
    experience, _ = twice.make_experience(fixed_batch(twice))
    once.update(experience)  # from the same weights, so the same first update
    updated = np.array(once.policy.logprobs(experience.tokens, experience.mask, 0.7))
    ratio = np.exp(updated - np.array(experience.old_logprobs))[np.array(experience.mask)]
    metrics = twice.update(experience)
    assert abs(ratio - 1).max() > 0.01
    assert metrics["val/ratio_max"] == pytest.approx(max(1.0, float(ratio.max())), rel=1e-4)
    assert metrics["val/ratio_min"] == pytest.approx(min(1.0, float(ratio.min())), rel=1e-4)
    assert metrics["val/ratio"] == pytest.approx((1 + float(ratio.mean())) / 2, rel=1e-4)


@KINDS
def test_the_verbs_work_by_hand_on_rollouts_from_elsewhere(tmp_path: Path, kind: dict[str, Any]) -> None:
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **kind), reward_model=even_share)
    before = arrays(trainer.policy.model)
    metrics = trainer.update(trainer.make_experience(fixed_batch(trainer))[0])
    assert metrics["num_updates"] == trainer.config.num_epochs_per_rollout
    assert not same(arrays(trainer.policy.model), before)


def test_target_kl_ends_the_epochs_of_a_batch_early(tmp_path: Path) -> None:
    options = {**PPO, "num_epochs_per_rollout": 6, "learning_rate": 3e-2, "fine_tune_type": "full"}
    free = PPOTrainer(config(tmp_path / "free", **options), reward_model=ascii_share)
    held = PPOTrainer(config(tmp_path / "held", target_kl=0.01, **options), reward_model=ascii_share)
    updates = [
        steps_of(trainer.train(PROMPTS, num_epochs=1)["run_folder"])[0]["num_updates"]
        for trainer in (free, held)
    ]
    assert updates[0] == 6
    assert 2 <= updates[1] < 6
