"""Gradients of an update: what they add up to, and where they are exactly zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from experience_buffer.buffer_manager import ExperienceBuffer
from experience_buffer.data_structures import Experience, Rollout
from ppo_trainer.ppo_trainer import PPOTrainer
from ppo_trainer.updater import Updater
from tests.small_runs import (
    GRPO,
    KINDS,
    PPO,
    PROMPTS,
    READABLE,
    SHARED,
    arrays,
    config,
    constant,
    even_share,
    fixed_batch,
    gradients,
    largest_difference,
    same,
    weights,
)


def off_policy(trainer: PPOTrainer, rollouts: Sequence[Rollout]) -> Experience:
    """Experience in which the ratio is not 1 and the KL not 0: as after some updates."""
    experience, _ = trainer.make_experience(rollouts)
    random = np.random.default_rng(1)

    def shifted(x: mx.array | None, size: float) -> mx.array | None:
        if x is None:
            return None
        return mx.where(
            experience.mask, x + mx.array(random.normal(size=x.shape) * size, dtype=mx.float32), 0
        )

    return experience._replace(
        old_logprobs=shifted(experience.old_logprobs, 0.1),
        ref_logprobs=shifted(experience.ref_logprobs, 0.5),
        values=shifted(experience.values, 0.1),
    )


@KINDS
@pytest.mark.parametrize("on_policy", [True, False])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(
    tmp_path: Path, kind: dict[str, Any], on_policy: bool
) -> None:
    """Rows of 1 to 8 tokens: a mean of means would weigh the short ones more."""
    found = []
    for micro in (None, 1, 2, 3):
        options = {**kind, **READABLE, "micro_batch_size": micro}
        trainer = PPOTrainer(config(tmp_path / str(micro), kl_coef=0.3, **options), reward_model=even_share)
        rollouts = fixed_batch(trainer, group_size=4)
        made = trainer.make_experience(rollouts)[0] if on_policy else off_policy(trainer, rollouts)
        found.append(gradients(trainer, made))
    assert max(float(np.abs(g).max()) for g in found[0].values()) > 1e-3
    for other in found[1:]:
        assert largest_difference(found[0], other) < 1e-6


@KINDS
def test_two_epochs_end_at_the_same_weights_whatever_the_micro_batch(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    results: list[dict[str, np.ndarray]] = []
    fresh: dict[str, np.ndarray] = {}
    for micro in (None, 1, 2):
        options = {**kind, "num_epochs_per_rollout": 2, "fine_tune_type": "full", "micro_batch_size": micro}
        # A large epsilon keeps Adam from blowing rounding errors up where a gradient is almost 0.
        trainer = PPOTrainer(
            config(tmp_path / str(micro), learning_rate=0.1, adam_eps=1e-2, minibatch_size=5, **options),
            reward_model=even_share,
        )
        fresh = weights(trainer)
        trainer.step = 1
        trainer.update(trainer.make_experience(fixed_batch(trainer, group_size=4))[0])
        results.append(weights(trainer))
    assert largest_difference(results[0], fresh) > 1e-2
    assert largest_difference(results[0], results[1]) < 1e-5
    assert largest_difference(results[0], results[2]) < 1e-5


@KINDS
def test_padding_and_what_stands_in_it_change_no_gradient(tmp_path: Path, kind: dict[str, Any]) -> None:
    trainer = PPOTrainer(config(tmp_path, kl_coef=0.3, **kind, **READABLE), reward_model=even_share)
    clean = off_policy(trainer, fixed_batch(trainer, group_size=4))._replace(old_logprobs=None)
    rows, columns = clean.mask.shape
    random = np.random.default_rng(0)
    real = mx.arange(columns + 1)[None] <= mx.max(
        clean.mask * mx.arange(1, columns + 1), axis=1, keepdims=True
    )
    noise = mx.array(random.integers(0, 250, size=(rows, columns + 4)), dtype=mx.int32)
    tokens = mx.concatenate([mx.where(real, clean.tokens, noise[:, : columns + 1]), noise[:, :3]], axis=1)
    wider = [mx.concatenate([clean.mask, mx.zeros((rows, 3), dtype=mx.bool_)], axis=1)]
    for array in clean[2:]:
        garbage = mx.full((rows, 3), 77.0)
        inner = None if array is None else mx.where(clean.mask, array, -55.0)
        wider.append(None if inner is None else mx.concatenate([inner, garbage], axis=1))
    dirty = Experience(tokens, *wider)
    assert largest_difference(gradients(trainer, clean), gradients(trainer, dirty)) < 1e-6


@KINDS
def test_a_masked_token_has_a_gradient_of_exactly_zero(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Where the mask is True nowhere, nothing moves, however large the numbers are that stand there."""
    trainer = PPOTrainer(config(tmp_path, kl_coef=0.3, **kind, **READABLE), reward_model=even_share)
    made = off_policy(trainer, fixed_batch(trainer, group_size=4))
    nothing = made._replace(mask=mx.zeros_like(made.mask), advantages=mx.full(made.mask.shape, 1e4))
    assert all(not g.any() for g in gradients(trainer, nothing).values())


def test_the_kl_in_the_loss_has_the_gradient_of_the_reverse_kl(tmp_path: Path) -> None:
    """d(ratio · k3) = (k3 + 1 - exp(ref - lp)) d lp = (lp - ref) d lp on policy: that of (lp - ref)² / 2."""
    trainer = PPOTrainer(config(tmp_path, kl_coef=0.3, **GRPO, **READABLE), reward_model=constant)
    made = off_policy(trainer, fixed_batch(trainer, group_size=4))._replace(old_logprobs=None)
    assert made.ref_logprobs is not None
    lengths = mx.sum(made.mask, axis=1)

    def reverse_kl() -> mx.array:
        d = trainer.policy.logprobs(made.tokens, made.mask) - made.ref_logprobs
        return 0.3 * mx.mean(mx.sum(mx.where(made.mask, d * d / 2, 0), axis=1) / lengths)

    expected = nn.value_and_grad(trainer.policy.model, reverse_kl)()[1]
    found = gradients(trainer, made)
    assert max(float(np.abs(g).max()) for g in found.values()) > 1e-2
    assert largest_difference(found, {name: np.array(g) for name, g in tree_flatten(expected)}) < 1e-5


@pytest.mark.parametrize("kind", [PPO, GRPO], ids=["ppo", "grpo"])
@pytest.mark.parametrize(("low", "high"), [(0.3, None), (0.1, None), (0.1, 0.3)])
def test_a_ratio_outside_its_clip_range_teaches_nothing_where_it_has_gone_the_right_way(
    tmp_path: Path, kind: dict[str, Any], low: float, high: float | None
) -> None:
    """Ratios of 1.2 with positive advantages: within 1.3 they teach, beyond 1.1 they do not. KL and critic aside."""
    trainer = PPOTrainer(
        config(tmp_path, kl_coef=0, clip_epsilon=low, clip_epsilon_high=high, **kind, **READABLE),
        reward_model=even_share,
    )
    made, _ = trainer.make_experience(fixed_batch(trainer, group_size=4))
    now = trainer.policy.logprobs(made.tokens, made.mask)
    rising = made._replace(advantages=1.0 * made.mask, old_logprobs=now - math.log(1.2))
    # Dealt as the second of two minibatches: the first is on policy and has no advantage to learn from.
    updater = Updater(
        trainer.policy, None, trainer.algorithm, trainer.kl_controller, trainer.config, total_steps=1
    )
    nothing = made._replace(advantages=mx.zeros_like(made.advantages))
    before = arrays(trainer.policy.model)
    deal = [part for whole in (nothing, rising) for part in ExperienceBuffer(whole).minibatches(0)]

    class Dealt:
        def minibatches(self, *seed: int) -> Any:
            return iter(deal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppo_trainer.updater.ExperienceBuffer", lambda *_, **__: Dealt())
        metrics = updater.update(made, step=1)
    clipped = (low if high is None else high) < 0.2
    assert metrics["val/ratio_max"] == pytest.approx(1.2, abs=1e-4)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(0.5 if clipped else 0.0)
    assert same(arrays(trainer.policy.model), before) == clipped


@pytest.mark.parametrize("kind", [PPO, SHARED], ids=["ppo", "ppo-shared"])
def test_a_value_is_that_of_the_state_before_its_token_in_rollouts_and_in_updates(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """V_t is what the network says of the tokens up to t, and the first loss is the mean of (V - R)² / 2."""
    trainer = PPOTrainer(config(tmp_path, **kind, num_epochs_per_rollout=1), reward_model=even_share)
    assert trainer.value_model is not None
    trainer.value_model.module.head.weight = mx.random.normal((1, 32), key=mx.random.key(0))
    experience, _ = trainer.make_experience(fixed_batch(trainer, group_size=3))
    mask, values = np.array(experience.mask), np.array(experience.values)
    for row, t in np.argwhere(mask):
        state = experience.tokens[int(row) : int(row) + 1, : int(t) + 1]
        assert values[row, t] == pytest.approx(float(trainer.value_model.forward(state)[0, -1]), abs=1e-4)
    assert values[mask].std() > 0.1
    loss = 0.5 * np.mean((values - np.array(experience.returns))[mask] ** 2)
    assert trainer.update(experience)["loss/value_avg"] == pytest.approx(loss, rel=1e-4)


def test_the_value_loss_weighs_vf_coef_where_the_trunk_is_shared(tmp_path: Path) -> None:
    """Only the value loss reaches the head, so its gradient is vf_coef times that of the value loss alone."""
    found = []
    for vf_coef in (0.1, 0.4):
        trainer = PPOTrainer(
            config(tmp_path / str(vf_coef), vf_coef=vf_coef, **SHARED, **READABLE), reward_model=even_share
        )
        experience, _ = trainer.make_experience(fixed_batch(trainer, group_size=4))
        found.append(gradients(trainer, experience)["value.head.weight"])
    np.testing.assert_allclose(found[1], 4 * found[0], rtol=1e-3, atol=1e-6)
    assert np.abs(found[0]).max() > 1e-4


def test_the_value_network_learns_at_its_own_rate(tmp_path: Path) -> None:
    """Adam's first step is the learning rate long, whatever the gradient."""
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-3, value_learning_rate=0.02, num_epochs_per_rollout=1, **PPO),
        reward_model=even_share,
    )
    before = weights(trainer)
    trainer.train(PROMPTS, num_epochs=1)
    moved = {name: np.abs(x - before[name]).max() for name, x in weights(trainer).items()}
    assert moved["value.head.bias"] == pytest.approx(0.02, rel=1e-3)
    assert max(x for name, x in moved.items() if not name.startswith("value.")) == pytest.approx(
        1e-3, rel=1e-2
    )
