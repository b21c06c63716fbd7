"""An entropy bonus needs the gradient of the entropy, and a metric must not have one."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from models.sft_model import share_weights
from token_attribution.logprob_computer import statistics_from_states, token_statistics
from token_attribution.masking import masked_mean

MASK = np.array([[False, True, True, False], [True, True, False, True]])
TOKENS = mx.array([[1, 2, 3, 4, 0], [4, 3, 2, 1, 5]])
LOGITS = (2 * np.random.default_rng(0).normal(size=(2, 4, 6))).astype(np.float32)


def mean_entropy(logits: mx.array, temperature: float, **options: bool) -> mx.array:
    statistics = statistics_from_states(logits, lambda z: z, TOKENS, mx.array(MASK), temperature, **options)
    return masked_mean(statistics.entropy, mx.array(MASK))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_is_minus_p_times_log_p_plus_the_entropy(temperature: float) -> None:
    z = LOGITS.astype(np.float64) / temperature
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=-1, keepdims=True)
    expected = np.where(MASK[..., None], -p * (np.log(p) + entropy) / temperature, 0) / 5  # 5 True positions
    value, gradient = mx.value_and_grad(lambda x: mean_entropy(x, temperature, entropy_gradient=True))(
        mx.array(LOGITS)
    )
    assert float(value) == pytest.approx(float(entropy[MASK].mean()), abs=1e-6)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(np.array(gradient), expected, atol=1e-6)
    assert not np.array(gradient)[~MASK].any()


@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_garbage_where_the_mask_is_false_stays_out_of_it(garbage: float) -> None:
    dirty = mx.where(mx.array(MASK)[..., None], mx.array(LOGITS), garbage)
    slope = mx.grad(lambda x: mean_entropy(x, 0.7, entropy_gradient=True))
    assert np.array_equal(np.array(slope(dirty)), np.array(slope(mx.array(LOGITS))))


def test_unless_asked_for_there_is_none_and_the_value_is_the_same() -> None:
    value, gradient = mx.value_and_grad(lambda x: mean_entropy(x, 0.7))(mx.array(LOGITS))
    assert not np.array(gradient).any()
    assert float(value) == float(mean_entropy(mx.array(LOGITS), 0.7, entropy_gradient=True)) > 0.5


def test_the_gradient_of_the_logprobs_does_not_depend_on_it() -> None:
    def total(x: mx.array, entropy_gradient: bool) -> mx.array:
        return mx.sum(
            statistics_from_states(
                x, lambda z: z, TOKENS, mx.array(MASK), 0.7, entropy_gradient=entropy_gradient
            ).logprobs
        )

    with_it, without = (np.array(mx.grad(total)(mx.array(LOGITS), flag)) for flag in (True, False))
    assert with_it.any()
    np.testing.assert_allclose(with_it, without, atol=1e-7)


@pytest.mark.parametrize("visible", [True, False])
def test_a_model_is_reached_through_trunk_and_head(
    architecture: Callable[[str], nn.Module], visible: bool
) -> None:
    """Against a small step along the gradient: the entropy rises by what it says."""
    model = share_weights(architecture("llama")).unfreeze()
    called = model if visible else (lambda ids: model(ids))

    def entropy(with_gradient: bool = True) -> mx.array:
        statistics = token_statistics(
            called, TOKENS, mx.array(MASK), 0.7, entropy_gradient=with_gradient  # type: ignore[arg-type]
        )
        return masked_mean(statistics.entropy, mx.array(MASK))

    before, gradient = nn.value_and_grad(model, entropy)()
    slopes = dict(tree_flatten(gradient))
    squared = sum(float(mx.sum(g * g)) for g in slopes.values())
    assert all(float(mx.max(mx.abs(g))) > 0 for g in slopes.values())
    _, none = nn.value_and_grad(model, lambda: entropy(with_gradient=False))()
    assert not any(np.array(g).any() for _, g in tree_flatten(none))
    step = 1e-3 / squared**0.5
    weights = dict(tree_flatten(model.parameters()))
    model.load_weights([(name, weights[name] + step * g) for name, g in slopes.items()], strict=False)
    assert float(entropy() - before) == pytest.approx(step * squared, rel=0.05)
