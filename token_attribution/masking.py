"""Sums, means and whitening over the True positions of a mask.

Every statistic of a rollout is taken over the tokens that the policy sampled, never over padding, so these
few functions stand under all the others. One promise holds for each of them: whatever stands where the mask
is False (garbage, inf, NaN) changes neither the value nor the gradient, and the gradient there is exactly 0.
Multiplying by the mask would not do (``0 * nan`` is ``nan``), so masked positions are replaced with
``mx.where`` *before* anything is computed from them.

Inputs of any dtype give float32: sums of thousands of bfloat16 numbers are not worth having.
"""

from __future__ import annotations

import mlx.core as mx

WHITEN_EPSILON = 1e-8  # under the square root, as in PPO for language models since lm-human-preferences


def check_same_shape(**arrays: mx.array) -> None:
    """Raise a ``ValueError`` that names every array and its shape unless all the shapes are equal.

    Broadcasting would hide the mistake: ``(B,)`` scores against a ``(B, T)`` mask with B == T run silently.
    """
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"These arrays must have the same shape: {shapes}.")


def zero_masked(x: mx.array, mask: mx.array) -> mx.array:
    """``x`` in float32 where the mask is True, exactly 0 (and zero gradient) where it is False."""
    check_same_shape(x=x, mask=mask)
    return mx.where(mask.astype(mx.bool_), x.astype(mx.float32), 0.0)


def true_count(mask: mx.array, axis: int | None = None) -> mx.array:
    """How many positions are True, as float32 (counted in integers: float32 stops counting at 2^24)."""
    return mx.sum(mask.astype(mx.bool_), axis=axis).astype(mx.float32)


def nonzero_denominator(denominator: float | mx.array) -> mx.array:
    """``denominator`` with 0 replaced by 1, so that a mean over no tokens is 0 and not NaN."""
    value = mx.array(denominator, dtype=mx.float32)
    return mx.where(value == 0, 1.0, value)


def masked_sum(x: mx.array, mask: mx.array, axis: int | None = None) -> mx.array:
    """Sum of ``x`` over the True positions: of all of them, or along ``axis``."""
    return mx.sum(zero_masked(x, mask), axis=axis)


def masked_mean(
    x: mx.array, mask: mx.array, denominator: float | mx.array | None = None, axis: int | None = None
) -> mx.array:
    """Mean of ``x`` over the True positions; 0 where there are none.

    Args:
        x: (B, T) or any other shape.
        mask: True where ``x`` counts, of the same shape.
        denominator: What to divide by in place of the number of True positions. A trainer passes the count
            of the whole optimiser batch, so that the means of the micro-batches add up to the mean of the
            batch; a mean of means would weigh the tokens of a short micro-batch more.
        axis: Reduce along this axis only.

    Example:
        >>> masked_mean(mx.array([1.0, 2.0, float("nan")]), mx.array([True, True, False])).item()
        1.5
    """
    count = true_count(mask, axis) if denominator is None else denominator
    return masked_sum(x, mask, axis) / nonzero_denominator(count)


def _centred(x: mx.array, mask: mx.array) -> mx.array:
    """``x`` minus its masked mean, 0 where the mask is False.

    The mean is taken off twice. The rounding error of one float32 mean, divided by a standard deviation of
    nearly 0, would come out of the whitening as a signal where all the values are equal.
    """
    once = zero_masked(x.astype(mx.float32) - masked_mean(x, mask), mask)
    return zero_masked(once - masked_mean(once, mask), mask)


def masked_var(x: mx.array, mask: mx.array, unbiased: bool = True) -> mx.array:
    """Variance of ``x`` over the n True positions; 0 where there are too few to have one.

    ``unbiased`` divides by n - 1 (Bessel's correction, as in TRL and verl), otherwise by n.
    """
    degrees_of_freedom = true_count(mask) - (1.0 if unbiased else 0.0)
    return mx.sum(mx.square(_centred(x, mask))) / mx.maximum(degrees_of_freedom, 1.0)


def masked_whiten(x: mx.array, mask: mx.array, shift_mean: bool = True) -> mx.array:
    r"""Scale the True positions to variance 1 and, with ``shift_mean``, to mean 0.

    .. math:: (x - \mu) / \sqrt{\sigma^2 + 10^{-8}} \quad [+ \mu \text{ unless } \texttt{shift\_mean}]

    with the masked mean and the masked Bessel variance. Advantages are whitened with the shift. Dense
    rewards are whitened without it, because subtracting a constant from every step changes the optimum when
    episodes differ in length.

    Fewer than two True positions have no variance: they are returned as they came, neither shifted nor
    scaled. Where the mask is False the result is 0.
    """
    centred = _centred(x, mask)
    whitened = centred * mx.rsqrt(masked_var(x, mask) + WHITEN_EPSILON)
    if not shift_mean:
        whitened = whitened + masked_mean(x, mask)
    return mx.where(true_count(mask) < 2, zero_masked(x, mask), zero_masked(whitened, mask))


def last_true_index(mask: mx.array) -> mx.array:
    """Index of the last True position of each row, -1 for a row without one: (B, T) -> (B,) int32."""
    positions = mx.arange(mask.shape[-1], dtype=mx.int32)  # (T,)
    return mx.max(mx.where(mask.astype(mx.bool_), positions, -1), axis=-1)  # (B,)
