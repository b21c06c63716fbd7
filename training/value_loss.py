"""The critic's loss, and how well the critic foretells the returns."""

from __future__ import annotations

import mlx.core as mx

from token_attribution.masking import check_same_shape, masked_mean, masked_var, zero_masked


def value_loss(
    values: mx.array,
    old_values: mx.array,
    returns: mx.array,
    mask: mx.array,
    clip_range_value: float | None = 0.2,
    denominator: float | mx.array | None = None,
) -> mx.array:
    r"""Half the mean squared error, pessimistic about steps that leave the old values too far behind.

    .. math:: L = \tfrac12\, \text{mean} \max\big((V - R)^2,\;
              (\text{clip}(V, V_{old} - \epsilon, V_{old} + \epsilon) - R)^2\big)

    As in PPO's original code (https://arxiv.org/abs/2005.12729 doubts that the clip helps; None leaves it
    out). The clip is around the *old value*, not around the return.

    Args:
        values, old_values, returns, mask: (B, T). Gradient flows through ``values`` only.
        clip_range_value: epsilon above, > 0, or None for the plain squared error.
        denominator: Tokens of the whole optimiser step in place of this batch's (see ``masked_mean``).

    Returns:
        A float32 scalar; 0 if nothing is True.
    """
    unclipped, clipped = _squared_errors(values, old_values, returns, mask, clip_range_value)
    # Inside the range the two are equal, and MLX gives the gradient of a tie to the second argument: on the
    # edge of the range that must be the branch that still has one.
    return 0.5 * masked_mean(mx.maximum(clipped, unclipped), mask, denominator)


def value_clip_fraction(
    values: mx.array,
    old_values: mx.array,
    returns: mx.array,
    mask: mx.array,
    clip_range_value: float | None = 0.2,
    denominator: float | mx.array | None = None,
) -> mx.array:
    """Share of the tokens whose value gradient the clip has taken away; pass ``denominator`` to add up."""
    unclipped, clipped = _squared_errors(
        mx.stop_gradient(values), old_values, returns, mask, clip_range_value
    )
    return masked_mean(clipped > unclipped, mask, denominator)


def explained_variance(values: mx.array, returns: mx.array, mask: mx.array) -> mx.array:
    r"""How much of the returns' variance the values account for: a scalar, at most 1.

    .. math:: 1 - \text{Var}(R - V) / \text{Var}(R)

    1 is a perfect critic (up to a constant), 0 one as good as any constant, below 0 is worse than that.
    Returns that do not vary leave nothing to explain: 0. Not additive over micro-batches; take it over a
    whole batch of rollouts.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    values = mx.stop_gradient(values).astype(mx.float32)
    returns = mx.stop_gradient(returns).astype(mx.float32)
    total = masked_var(returns, mask)
    unexplained = masked_var(returns - values, mask)
    return mx.where(total > 0, 1.0 - unexplained / mx.where(total > 0, total, 1.0), 0.0)


def _squared_errors(
    values: mx.array,
    old_values: mx.array,
    returns: mx.array,
    mask: mx.array,
    clip_range_value: float | None,
) -> tuple[mx.array, mx.array]:
    """(V - R)^2 and the same with V clipped around the old value, (B, T) each, 0 where the mask is False."""
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    if clip_range_value is not None and not clip_range_value > 0:
        raise ValueError(f"clip_range_value must be greater than 0 or None, but it is {clip_range_value}.")
    values = zero_masked(values, mask)
    old_values = zero_masked(mx.stop_gradient(old_values), mask)
    returns = zero_masked(mx.stop_gradient(returns), mask)
    unclipped = mx.square(values - returns)
    if clip_range_value is None:
        return unclipped, unclipped
    limited = mx.clip(values, old_values - clip_range_value, old_values + clip_range_value)
    return unclipped, mx.square(limited - returns)
