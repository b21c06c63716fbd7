"""What training moves, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    KINDS,
    PPO_AND_GRPO,
    PROMPTS,
    arrays,
    ascii_share,
    config,
    constant,
    even_share,
    same,
    weights,
)


@KINDS
@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_training_moves_the_policy_and_neither_the_base_nor_the_reference(
    tmp_path: Path, kind: dict[str, Any], fine_tune_type: str
) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, fine_tune_type=fine_tune_type, batch_size=2, **kind),
        reward_model=ascii_share,
    )
    base, reference, before = (
        arrays(trainer.policy.base.model),
        arrays(trainer.reference.model),
        weights(trainer),
    )
    tokens = mx.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    mask = mx.array([[False, True, True, True]] * 2)
    ref_logprobs = np.array(trainer.reference.logprobs(tokens, mask, 0.7))
    own_logprobs = np.array(trainer.policy.logprobs(tokens, mask, 0.7))
    np.testing.assert_array_equal(own_logprobs, ref_logprobs)

    trainer.train(PROMPTS, num_epochs=2)

    after = weights(trainer)
    trained = {name for name, x in tree_flatten(trainer.policy.model.trainable_parameters())}
    assert {name for name in before if not np.array_equal(before[name], after[name])} >= trained
    if fine_tune_type == "lora":
        assert trained
        assert all("lora" in name for name in trained)
    assert same(arrays(trainer.policy.base.model), base)
    assert same(arrays(trainer.reference.model), reference)
    assert np.array_equal(np.array(trainer.reference.logprobs(tokens, mask, 0.7)), ref_logprobs)
    assert np.abs(np.array(trainer.policy.logprobs(tokens, mask, 0.7)) - ref_logprobs).max() > 1e-3


@KINDS
@pytest.mark.parametrize("reward", [ascii_share, even_share])
def test_the_reward_rises(tmp_path: Path, kind: dict[str, Any], reward: Callable[..., list[float]]) -> None:
    options = {**kind, "group_size": 8, "gamma": 1.0, "kl_coef": 0.01, "fine_tune_type": "full"}
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **options), reward_model=reward)
    held_out = ["xy", "another"] * 16
    before = trainer.evaluate(held_out)["avg_reward"]
    epochs = 12 if kind["algorithm"] == "ppo" else 20
    curve = [epoch["avg_reward"] for epoch in trainer.train(PROMPTS, num_epochs=epochs)["history"]]
    assert np.mean(curve[-3:]) > np.mean(curve[:3]) + 0.1
    assert trainer.evaluate(held_out)["avg_reward"] > before + 0.1


@PPO_AND_GRPO
def test_a_kl_weight_brings_a_policy_that_went_astray_back_to_its_reference(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """With a constant reward the KL is all there is to learn from; with its sign wrong it would grow."""
    options = {**kind, "fine_tune_type": "full", "group_size": 8, "gamma": 1.0}
    free = PPOTrainer(config(tmp_path, learning_rate=1e-2, kl_coef=0.0, **options), reward_model=even_share)
    free.train(PROMPTS, num_epochs=8 if kind["algorithm"] == "ppo" else 16)
    leashed = PPOTrainer(
        config(tmp_path / "2", learning_rate=5e-3, kl_coef=1.0, **options),
        reward_model=constant,
        policy=free.policy,
        reference=free.reference,
    )
    astray = leashed.evaluate(PROMPTS * 16)["objective/kl"]
    leashed.train(PROMPTS, num_epochs=8)
    back = leashed.evaluate(PROMPTS * 16)["objective/kl"]
    assert astray > 0.3
    assert back < 0.7 * astray
