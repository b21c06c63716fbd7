"""One optimiser step: its length, its schedule, its clip, and what it does with numbers that are not finite."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from config.errors import TrainingRuntimeError
from config.model_config import ModelConfig
from config.training_config import TrainingConfig
from models.sft_model import build_embedded
from token_attribution.extractor import pad_sequences
from token_attribution.logprob_computer import token_logprobs
from training.model_trainer import ModelTrainer, build_schedule

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
START = [1.0, -2.0, 0.5, 4.0]


class Weights(nn.Module):
    """Four numbers in two arrays, one of them inside a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = mx.array(START[:2])
        self.rest = nn.Module()
        self.rest.second = mx.array(START[2:])

    @property
    def flat(self) -> mx.array:
        return mx.concatenate([self.first, self.rest.second])


def trainer_of(module: nn.Module, **options: Any) -> ModelTrainer:
    learning = {"max_grad_norm": None, "learning_rate": 0.01, **options}
    return ModelTrainer(module, TrainingConfig(**learning), total_steps=10)


def linear(module: Weights) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """A loss whose gradient is the batch itself."""
    return lambda g: (mx.sum(module.flat * g), g)


def state_of(trainer: ModelTrainer) -> dict[str, bytes]:
    """Weights, moments, counter and learning rate, bit for bit."""
    trees = {"weights": trainer.module.parameters(), "optimiser": trainer.optimizer.state}
    return {name: np.array(x).tobytes() for name, x in tree_flatten(trees)}


# AdamW ---------------------------------------------------------------------------------------------------


def test_the_first_step_is_the_learning_rate_times_the_sign() -> None:
    """Corrected for their bias, m = g and v = g²: the step is lr·g/|g| for gradients of any size."""
    module = Weights()
    report = trainer_of(module).step(linear(module), [mx.array([3.0, -400.0, 0.02, -5.0])])
    np.testing.assert_allclose(
        np.array(module.flat), np.array(START) - 0.01 * np.array([1, -1, 1, -1]), atol=1e-6
    )
    assert report.learning_rate == pytest.approx(0.01)
    assert report.skipped is False


def test_weight_decay_takes_its_share_of_the_weight_and_leaves_the_moments_alone() -> None:
    """w·(1 − lr·decay) − lr·sign(g); by default there is none."""
    module = Weights()
    trainer = trainer_of(module, weight_decay=0.2)
    trainer.step(linear(module), [mx.array([1.0, 1.0, -1.0, -1.0])])
    expected = np.array(START) * (1 - 0.01 * 0.2) - 0.01 * np.array([1, 1, -1, -1])
    np.testing.assert_allclose(np.array(module.flat), expected, atol=1e-6)
    np.testing.assert_allclose(np.array(trainer.optimizer.state["first"]["m"]), [0.1, 0.1], atol=1e-6)
    assert TrainingConfig().weight_decay == 0


def test_three_steps_by_hand() -> None:
    """Adam as in the paper, in float64."""
    module = Weights()
    trainer = trainer_of(module, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-3)
    w, m, v = np.array(START), np.zeros(4), np.zeros(4)
    for t, g in enumerate(([1.0, 2, 3, 4], [-1.0, 0, 5, 0.1], [0.5, 0.5, -9, 1]), start=1):
        trainer.step(linear(module), [mx.array(g)])
        m = 0.8 * m + 0.2 * np.array(g)
        v = 0.9 * v + 0.1 * np.square(g)
        w = w - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
    np.testing.assert_allclose(np.array(module.flat), w, atol=1e-6)


def test_a_learning_rate_of_its_own_goes_before_the_configs() -> None:
    module = Weights()
    trainer = ModelTrainer(module, TrainingConfig(max_grad_norm=None), total_steps=1, learning_rate=0.5)
    trainer.step(linear(module), [mx.ones(4)])
    np.testing.assert_allclose(np.array(module.flat), np.array(START) - 0.5, atol=1e-5)


def test_what_is_frozen_stays() -> None:
    module = Weights()
    module.rest.freeze()
    trainer_of(module, weight_decay=0.2).step(linear(module), [mx.ones(4)])
    assert module.rest.second.tolist() == START[2:]
    assert module.first.tolist() != START[:2]


def test_nothing_to_train_and_nothing_to_train_on_are_refused() -> None:
    module = Weights()
    with pytest.raises(ValueError, match="at least one micro-batch"):
        trainer_of(module).step(linear(module), [])
    module.freeze()
    with pytest.raises(ValueError, match="no trainable parameters"):
        trainer_of(module)


# The learning rate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8, 8, 8]),
        ("constant", 1, [8, 8, 8, 8, 8, 8, 8, 8]),
        ("constant", 4, [2, 4, 6, 8, 8, 8, 8, 8]),
        ("linear", 0, [8, 7, 6, 5, 4, 3, 2, 1]),
        ("linear", 4, [2, 4, 6, 8, 8, 6, 4, 2]),
        ("cosine", 0, [4 * (1 + np.cos(np.pi * k / 8)) for k in range(8)]),
        ("cosine", 4, [2, 4, 6, 8, *(4 * (1 + np.cos(np.pi * k / 4)) for k in range(4))]),
        ("linear", 8, [1, 2, 3, 4, 5, 6, 7, 8]),  # the warm-up takes all the steps
    ],
)
def test_the_learning_rate_of_each_of_eight_steps(schedule: str, warmup: int, expected: list[float]) -> None:
    """As the optimiser applies it: no step runs at 0, the first included."""
    config = TrainingConfig(
        lr_schedule=schedule, warmup_steps=warmup, learning_rate=8.0, max_grad_norm=None, adam_beta1=0.0
    )
    module = Weights()
    trainer = ModelTrainer(module, config, total_steps=8)
    weights, reported = [np.array(module.flat)], []
    for _ in range(8):
        reported.append(trainer.step(linear(module), [mx.ones(4)]).learning_rate)
        weights.append(np.array(module.flat))
    np.testing.assert_allclose(reported, expected, rtol=1e-5)
    # The gradient is 1 each time, so a step is as long as its learning rate.
    moved = [float(before[0] - after[0]) for before, after in itertools.pairwise(weights)]
    np.testing.assert_allclose(moved, expected, rtol=1e-4)


def test_a_decay_ends_at_zero_and_stays_there() -> None:
    for schedule in ("linear", "cosine"):
        rate = build_schedule(TrainingConfig(lr_schedule=schedule, warmup_steps=2), 1.0, 6)
        assert callable(rate)
        assert [float(rate(mx.array(k))) for k in (6, 7, 20)] == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # linear from 8 to 2 over 3 steps after the warm-up's 2, then level
        (
            {"lr_schedule": "linear", "lr_end": 2.0, "lr_decay_steps": 3, "warmup_steps": 2},
            [4, 8, 8, 6, 4, 2, 2, 2],
        ),
        # a quarter of 8 steps is a warm-up of 2; the decay takes the other 6
        ({"lr_schedule": "linear", "lr_end": 2.0, "warmup_ratio": 0.25}, [4, 8, 8, 7, 6, 5, 4, 3]),
        # halfway down the cosine is halfway between 8 and 2
        ({"lr_schedule": "cosine", "lr_end": 2.0, "lr_decay_steps": 2}, [8, 5, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_where_and_when_a_schedule_ends(options: dict[str, Any], expected: list[float]) -> None:
    rate = build_schedule(TrainingConfig(learning_rate=8.0, **options), 8.0, 8)
    assert callable(rate)
    assert [float(rate(mx.array(k))) for k in range(8)] == pytest.approx(expected, rel=1e-5)


def test_another_peak_ends_at_the_same_share_of_it() -> None:
    config = TrainingConfig(learning_rate=8.0, lr_schedule="linear", lr_end=2.0)
    rate = build_schedule(config, 80.0, 8)
    assert callable(rate)
    assert float(rate(mx.array(8))) == pytest.approx(20.0)


# The clip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "factor"),
    [(None, 1.0), (20.0, 1.0), (13.0, 1.0), (6.5, 0.5), (1.0, 1 / 13)],
)
def test_a_gradient_longer_than_the_limit_is_scaled_to_it(limit: float | None, factor: float) -> None:
    """(3, 4) and (0, 12) in two arrays have the global norm 13; with β₁ = 0 the moment is the gradient."""
    module = Weights()
    trainer = trainer_of(module, max_grad_norm=limit, adam_beta1=0.0)
    report = trainer.step(linear(module), [mx.array([3.0, 4.0, 0.0, 12.0])])
    assert report.grad_norm == pytest.approx(13, abs=1e-5)  # before the clip
    state = trainer.optimizer.state
    np.testing.assert_allclose(np.array(state["first"]["m"]), np.array([3, 4]) * factor, rtol=1e-5)
    np.testing.assert_allclose(np.array(state["rest"]["second"]["m"]), np.array([0, 12]) * factor, rtol=1e-5)


def test_the_sum_is_clipped_and_not_its_parts() -> None:
    """(10, …) and (−9, …) add up to a gradient of norm 1, which a limit of 1.5 leaves alone."""
    module = Weights()
    trainer = trainer_of(module, max_grad_norm=1.5, adam_beta1=0.0)
    parts = [mx.array([10.0, 0.0, 0.0, 0.0]), mx.array([-9.0, 0.0, 0.0, 0.0])]
    assert trainer.step(linear(module), parts).grad_norm == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(np.array(trainer.optimizer.state["first"]["m"]), [1, 0], atol=1e-5)


# Micro-batches -------------------------------------------------------------------------------------------


def test_micro_batches_make_the_step_of_the_whole_batch() -> None:
    """Five ragged rows at once, and as 2 + 2 + 1: each part divides by the count of all five."""
    prompts, completions = [[1, 2], [3], [4, 5, 6], [7], [8, 9]], [[1], [2, 3], [4, 5, 6, 7], [8], [9, 1, 2]]
    count = sum(len(c) for c in completions)
    results = []
    for size in (5, 2):
        model = build_embedded(SMALLEST, seed=1).model
        # A large epsilon keeps the step smooth in the gradient: otherwise it is a sign, and rounding flips it.
        trainer = ModelTrainer(model, TrainingConfig(adam_eps=1e-2, learning_rate=1e-2), total_steps=3)

        def loss(rows: range, model: nn.Module = model) -> tuple[mx.array, mx.array]:
            tokens, mask = pad_sequences([prompts[r] for r in rows], [completions[r] for r in rows])
            logp = token_logprobs(model, tokens, mask)
            return -mx.sum(logp) / count, mx.sum(mask)

        parts = [range(start, min(start + size, 5)) for start in range(0, 5, size)]
        reports = [trainer.step(loss, parts) for _ in range(3)]
        assert [int(x) for x in reports[0].extras] == [sum(len(completions[r]) for r in p) for p in parts]
        results.append((reports, dict(tree_flatten(model.parameters()))))
    (whole, whole_weights), (parted, parted_weights) = results
    for one, other in zip(whole, parted, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    for name, weight in whole_weights.items():
        np.testing.assert_allclose(np.array(parted_weights[name]), np.array(weight), atol=1e-5, err_msg=name)


# Numbers that are not finite -----------------------------------------------------------------------------

BAD = pytest.mark.parametrize("bad", [mx.inf, -mx.inf, mx.nan], ids=["inf", "minus-inf", "nan"])


@BAD
def test_a_loss_that_is_not_finite_changes_no_bit(bad: float) -> None:
    """Its gradient is fine: the loss alone is enough."""
    module = Weights()
    trainer = trainer_of(module, warmup_steps=4, weight_decay=0.1)
    trainer.step(linear(module), [mx.ones(4)])
    before = state_of(trainer)
    report = trainer.step(lambda g: (linear(module)(g)[0] + bad, g), [mx.ones(4)])
    assert report.skipped
    assert np.isfinite(report.grad_norm)
    assert state_of(trainer) == before


@BAD
def test_a_gradient_that_is_not_finite_changes_no_bit(bad: float) -> None:
    """The loss is finite, one micro-batch of three has one bad number in its gradient."""
    module = Weights()
    trainer = trainer_of(module, warmup_steps=4, weight_decay=0.1)
    trainer.step(linear(module), [mx.ones(4)])
    before = state_of(trainer)

    def rooted(g: mx.array) -> tuple[mx.array, None]:
        # d√x/dx at 0 is infinite, times 0 is NaN; where the bad number is absent the loss is linear.
        if bool(mx.isnan(g[0])):
            return mx.sum(mx.sqrt(mx.abs(module.flat - mx.stop_gradient(module.flat)))), None
        return mx.sum(module.flat * g), None

    report = trainer.step(rooted, [mx.ones(4), mx.array([mx.nan, 0, 0, 0]), mx.ones(4)])
    assert np.isfinite(report.loss)
    assert not np.isfinite(report.grad_norm)
    assert report.skipped
    assert trainer.step(linear(module), [mx.array([1.0, bad, 1.0, 1.0])]).skipped
    assert state_of(trainer) == before


def test_a_skipped_step_is_as_if_it_had_not_been() -> None:
    """Moments, counter and schedule go on where they were."""
    with_gap, without = Weights(), Weights()
    gradients = [mx.array([1.0, 2.0, 3.0, 4.0]), mx.array([-1.0, 5.0, 0.1, 2.0])]
    options = {"lr_schedule": "linear", "warmup_steps": 2}
    gapped, straight = trainer_of(with_gap, **options), trainer_of(without, **options)
    gapped.step(linear(with_gap), [gradients[0]])
    gapped.step(linear(with_gap), [mx.full(4, mx.nan)])
    gapped.step(linear(with_gap), [gradients[1]])
    for gradient in gradients:
        straight.step(linear(without), [gradient])
    assert state_of(gapped) == state_of(straight)


def test_the_run_ends_after_so_many_skips_in_a_row() -> None:
    module = Weights()
    trainer = trainer_of(module, max_skipped_steps=3)
    before = state_of(trainer)
    bad = mx.array([mx.inf, 1.0, 1.0, 1.0])
    assert [trainer.step(linear(module), [bad]).skipped for _ in range(2)] == [True, True]
    with pytest.raises(
        TrainingRuntimeError, match=r"3 updates in a row .*inf.* were skipped; lower learning_rate"
    ):
        trainer.step(linear(module), [bad])
    assert state_of(trainer) == before


def test_a_finite_step_in_between_starts_the_count_again() -> None:
    module = Weights()
    trainer = trainer_of(module, max_skipped_steps=2)
    bad, good = mx.full(4, mx.nan), mx.ones(4)
    for batch in (bad, good, bad, good, bad):
        assert trainer.step(linear(module), [batch]).skipped == (batch is bad)
    with pytest.raises(TrainingRuntimeError):
        trainer.step(linear(module), [bad])
