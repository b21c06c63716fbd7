"""The critic's loss by hand, against a loop, and its indifference to what the mask hides."""

import mlx.core as mx
import numpy as np
import pytest

from training.value_loss import explained_variance, value_clip_fraction, value_loss

RNG = np.random.default_rng(7)
MASK = np.array([[False, True, True, False], [True, False, True, True], [False, False, False, False]])
OLD, RETURNS = RNG.normal(size=(2, *MASK.shape)).astype(np.float32)
VALUES = (OLD + RNG.normal(0, 0.3, size=MASK.shape)).astype(np.float32)


def loop_loss(values, old, returns, mask, clip):
    total = 0.0
    for i, t in np.argwhere(mask):
        v, o, r = float(values[i, t]), float(old[i, t]), float(returns[i, t])
        limited = min(max(v, o - clip), o + clip)
        total += 0.5 * max((v - r) ** 2, (limited - r) ** 2)
    return total / mask.sum()


def loss_of(values=VALUES, old=OLD, returns=RETURNS, mask=MASK, **options):
    return value_loss(mx.array(values), mx.array(old), mx.array(returns), mx.array(mask), **options)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        # the old value is 0 and the range 0.2
        (0.1, 1.0, 0.5 * 0.9**2, -0.9),  # inside the range: the plain error
        (0.5, 1.0, 0.5 * 0.8**2, 0.0),  # gone far towards the return: enough, flat
        (0.5, -1.0, 0.5 * 1.5**2, 1.5),  # gone far away from it: called back
        (-0.5, 1.0, 0.5 * 1.5**2, -1.5),
    ],
)
def test_the_regions_of_the_clip(value, target, loss, slope):
    def total(v):
        return value_loss(v, mx.zeros((1, 1)), mx.array([[target]]), mx.array([[True]]))

    result, gradient = mx.value_and_grad(total)(mx.array([[value]]))
    assert np.isclose(result.item(), loss)
    assert np.isclose(gradient.item(), slope)
    clipped = value_clip_fraction(
        mx.array([[value]]), mx.zeros((1, 1)), mx.array([[target]]), mx.array([[True]])
    )
    assert clipped.item() == (1.0 if slope == 0 else 0.0)


def test_against_a_loop_and_its_finite_differences():
    assert np.isclose(loss_of().item(), loop_loss(VALUES, OLD, RETURNS, MASK, 0.2), atol=1e-6)
    gradient = np.array(mx.grad(lambda v: loss_of(v))(mx.array(VALUES)))
    expected, step = np.zeros(MASK.shape), 1e-6
    for index in np.ndindex(MASK.shape):
        up, down = VALUES.astype(np.float64), VALUES.astype(np.float64)
        up[index] += step
        down[index] -= step
        difference = loop_loss(up, OLD, RETURNS, MASK, 0.2) - loop_loss(down, OLD, RETURNS, MASK, 0.2)
        expected[index] = difference / (2 * step)
    assert np.allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("clip_range_value", [0.2, 1e-6, None])
def test_where_the_values_are_the_old_values_it_is_half_the_mse(clip_range_value):
    half_mse = 0.5 * ((OLD - RETURNS)[MASK] ** 2).mean()
    value, gradient = mx.value_and_grad(lambda v: loss_of(v, clip_range_value=clip_range_value))(
        mx.array(OLD)
    )
    assert np.isclose(value.item(), half_mse, atol=1e-6)
    assert np.allclose(np.array(gradient), np.where(MASK, OLD - RETURNS, 0) / MASK.sum(), atol=1e-6)


def test_without_a_clip_it_is_half_the_mse():
    half_mse = 0.5 * ((VALUES - RETURNS)[MASK] ** 2).mean()
    assert np.isclose(loss_of(clip_range_value=None).item(), half_mse, atol=1e-6)


def test_only_the_values_receive_gradient():
    def total(old, returns):
        return value_loss(mx.array(VALUES), old, returns, mx.array(MASK))

    for gradient in mx.grad(total, argnums=(0, 1))(mx.array(OLD), mx.array(RETURNS)):
        assert not np.array(gradient).any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("clip_range_value", [0.2, None])
def test_garbage_at_masked_positions(clip_range_value, garbage):
    values, old, returns = (np.where(MASK, x, np.float32(garbage)) for x in (VALUES, OLD, RETURNS))

    def value_and_grad(values, **case):
        def total(v):
            return loss_of(v, clip_range_value=clip_range_value, **case)

        value, gradient = mx.value_and_grad(total)(mx.array(values))
        return value.item(), np.array(gradient)

    value, gradient = value_and_grad(VALUES)
    other_value, other_gradient = value_and_grad(values, old=old, returns=returns)
    assert value == other_value
    assert (gradient == other_gradient).all()
    assert (gradient[~MASK] == 0).all()
    dirty = explained_variance(mx.array(values), mx.array(returns), mx.array(MASK))
    assert dirty.item() == explained_variance(mx.array(VALUES), mx.array(RETURNS), mx.array(MASK)).item()


def test_micro_batches_add_up():
    tokens = int(MASK.sum())
    cases = [
        {"values": VALUES[i], "old": OLD[i], "returns": RETURNS[i], "mask": MASK[i], "denominator": tokens}
        for i in (slice(0, 1), slice(1, 3))
    ]
    assert np.isclose(sum(loss_of(**case).item() for case in cases), loss_of().item(), atol=1e-6)


def test_an_all_masked_batch_is_zero():
    nothing = np.zeros(MASK.shape, dtype=bool)
    value, gradient = mx.value_and_grad(lambda v: loss_of(v, mask=nothing))(mx.array(VALUES * np.nan))
    assert value.item() == 0.0
    assert not np.array(gradient).any()
    assert explained_variance(mx.array(VALUES), mx.array(RETURNS), mx.array(nothing)).item() == 0.0


def test_bfloat16_values_are_compared_in_float32():
    low = mx.array(VALUES).astype(mx.bfloat16)
    loss = value_loss(low, mx.array(OLD), mx.array(RETURNS), mx.array(MASK))
    assert loss.dtype == mx.float32
    assert np.isclose(
        loss.item(), loop_loss(np.array(low.astype(mx.float32)), OLD, RETURNS, MASK, 0.2), atol=1e-6
    )


def test_explained_variance():
    def of(values):
        return explained_variance(mx.array(values), mx.array(RETURNS), mx.array(MASK)).item()

    chosen = RETURNS[MASK]
    assert np.isclose(of(RETURNS), 1.0)
    assert np.isclose(of(RETURNS + 5.0), 1.0, atol=1e-5)  # a constant error is no variance
    assert np.isclose(of(np.zeros_like(RETURNS)), 0.0)
    assert np.isclose(of(-RETURNS), -3.0, atol=1e-5)
    assert np.isclose(of(VALUES), 1 - np.var(chosen - VALUES[MASK]) / np.var(chosen), atol=1e-5)
    constant = mx.ones(MASK.shape)
    assert explained_variance(mx.array(VALUES), constant, mx.array(MASK)).item() == 0.0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"values \(3, 3\), old_values \(3, 4\)"):
        loss_of(VALUES[:, :3])
    with pytest.raises(ValueError, match="clip_range_value"):
        loss_of(clip_range_value=0.0)
