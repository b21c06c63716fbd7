"""Masked statistics against NumPy on the selected values, and their indifference to what the mask hides."""

import mlx.core as mx
import numpy as np
import pytest

from token_attribution.masking import (
    check_same_shape,
    last_true_index,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    zero_masked,
)

MASK = np.array([[True, True, False, True], [False, True, False, False], [False, False, False, False]])
RNG = np.random.default_rng(0)
X = RNG.normal(size=MASK.shape).astype(np.float32)
GARBAGE = [np.nan, np.inf, -np.inf, 1e38]


def poisoned(x, garbage):
    return mx.array(np.where(MASK, x, np.float32(garbage)))


def test_the_mean_of_two_of_three():
    x, mask = mx.array([1.0, 2.0, 30.0]), mx.array([True, True, False])
    assert masked_sum(x, mask).item() == 3.0
    assert masked_mean(x, mask).item() == 1.5
    assert masked_mean(x, mask, denominator=4).item() == 0.75
    assert masked_var(x, mask).item() == 0.5  # (.25 + .25) / (2 - 1)
    assert masked_var(x, mask, unbiased=False).item() == 0.25


def test_against_numpy_on_the_selected_values():
    chosen = X[MASK].astype(np.float64)
    x, mask = mx.array(X), mx.array(MASK)
    assert np.isclose(masked_mean(x, mask).item(), chosen.mean())
    assert np.isclose(masked_var(x, mask).item(), chosen.var(ddof=1))
    assert np.isclose(masked_var(x, mask, unbiased=False).item(), chosen.var())

    centred = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8)
    whitened = np.array(masked_whiten(x, mask))
    assert np.allclose(whitened[MASK], centred, atol=1e-5)
    assert (whitened[~MASK] == 0).all()
    scaled = np.array(masked_whiten(x, mask, shift_mean=False))
    assert np.allclose(scaled[MASK], centred + chosen.mean(), atol=1e-5)
    assert (scaled[~MASK] == 0).all()


def test_the_epsilon_is_under_the_root():
    # var = 5e-9, so 5e-5 / sqrt(5e-9 + 1e-8) = 0.408; with sqrt(5e-9) + 1e-8 it would be 0.707
    whitened = masked_whiten(mx.array([0.0, 1e-4]), mx.array([True, True]))
    assert np.allclose(np.array(whitened), [-0.40825, 0.40825], atol=1e-4)


def test_along_an_axis_each_row_has_its_own_count():
    x, mask = mx.array(X), mx.array(MASK)
    expected = [X[0][MASK[0]].mean(), X[1, 1], 0.0]
    assert np.allclose(np.array(masked_mean(x, mask, axis=1)), expected, atol=1e-6)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(
    "function",
    [
        masked_sum,
        masked_mean,
        masked_var,
        lambda x, mask: mx.sum(masked_whiten(x, mask) * mx.array(X)),
        lambda x, mask: mx.sum(masked_whiten(x, mask, shift_mean=False) * mx.array(X)),
        lambda x, mask: mx.sum(mx.exp(zero_masked(x, mask))),
    ],
)
def test_what_the_mask_hides_changes_neither_value_nor_gradient(function, garbage):
    def value_and_grad(x):
        return mx.value_and_grad(lambda x: function(x, mx.array(MASK)))(x)

    value, gradient = value_and_grad(mx.array(X))
    other_value, other_gradient = value_and_grad(poisoned(X, garbage))
    assert value.item() == other_value.item()
    assert (np.array(gradient) == np.array(other_gradient)).all()
    assert (np.array(gradient)[~MASK] == 0).all()
    assert (np.array(gradient)[MASK] != 0).any()


def test_nothing_selected_is_zero_not_nan():
    x, mask = mx.array(X), mx.zeros(X.shape, dtype=mx.bool_)
    for value in (masked_sum(x, mask), masked_mean(x, mask), masked_mean(x, mask, 0), masked_var(x, mask)):
        assert value.item() == 0.0
    assert (np.array(masked_whiten(x, mask)) == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_a_single_token_is_returned_as_it_came(shift_mean):
    whitened = masked_whiten(mx.array([[3.0, 7.0]]), mx.array([[False, True]]), shift_mean)
    assert np.array(whitened).tolist() == [[0.0, 7.0]]


@pytest.mark.parametrize("value", [0.1, 1000.1, 1e6 + 0.3])
def test_whitening_equal_values_invents_no_signal(value):
    whitened = masked_whiten(mx.full((7, 13), value), mx.ones((7, 13), dtype=mx.bool_))
    assert np.abs(np.array(whitened)).max() < 1e-3


def test_means_of_micro_batches_add_up():
    x, mask = mx.array(X), mx.array(MASK)
    parts = [masked_mean(x[i : i + 1], mask[i : i + 1], denominator=mx.array(4)) for i in range(3)]
    assert np.isclose(sum(part.item() for part in parts), masked_mean(x, mask).item())


def test_low_precision_and_integer_inputs_become_float32():
    mask = mx.array([True] * 1000)
    low = masked_sum(mx.full((1000,), 1.0078125, dtype=mx.bfloat16), mask)
    assert low.dtype == mx.float32
    assert low.item() == 1007.8125  # bfloat16 would make it 1008
    assert masked_mean(mx.arange(1000), mask).dtype == mx.float32
    assert masked_whiten(mx.arange(1000).astype(mx.bfloat16), mask).dtype == mx.float32
    ones_and_zeros = mx.array([1, 0, 1])
    assert masked_mean(mx.array([1.0, np.nan, 3.0]), ones_and_zeros).item() == 2.0


def test_last_true_index():
    index = last_true_index(mx.array(MASK))
    assert index.tolist() == [3, 1, -1]
    assert index.dtype == mx.int32
    assert last_true_index(mx.array([[True], [False]])).tolist() == [0, -1]


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"x \(3,\), mask \(2, 3\)"):
        masked_mean(mx.zeros((3,)), mx.ones((2, 3), dtype=mx.bool_))
    check_same_shape(a=mx.zeros((2,)), b=mx.ones((2,)))
