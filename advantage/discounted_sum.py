r"""The one recurrence behind TD errors, GAE and reward-to-go, without a loop over time.

All three look backwards through a row, from each sampled token to the next sampled token, and are cases of

.. math:: y_t = a_t\, y_{t+1} + b_t, \qquad y_T = 0.

A True position has (a, b) = (discount, x_t). A False position has (1, 0): it hands on what comes after it, so
that a hole in the mask (a tool's output in the middle of a completion) is skipped and does *not* decay the
discount, and its own x is never read.
"""

from __future__ import annotations

import mlx.core as mx

from token_attribution.masking import zero_masked


def masked_discounted_sum(x: mx.array, mask: mx.array, discount: float) -> mx.array:
    r"""Discounted sum of what follows, counting True positions only: (B, T) -> (B, T) float32.

    .. math:: y_t = x_t + \text{discount} \cdot y_{\text{next True position after } t}

    and 0 where the mask is False. The discount decays per True position, not per column.

    Example:
        >>> masked_discounted_sum(mx.ones((1, 3)), mx.array([[True, False, True]]), 0.5)
        array([[1.5, 0, 1]], dtype=float32)
    """
    y = _linear_recurrence(mx.where(mask.astype(mx.bool_), discount, 1.0), zero_masked(x, mask))
    return zero_masked(y, mask)


def next_true_value(x: mx.array, mask: mx.array) -> mx.array:
    """The value of ``x`` at the next True position after each position, 0 where there is none: (B, T)."""
    # With a discount of 0 the recurrence carries x from each True position back to the one before it.
    at_or_after = _linear_recurrence(mx.where(mask.astype(mx.bool_), 0.0, 1.0), zero_masked(x, mask))
    return _shift_left(at_or_after, 1)


def _linear_recurrence(a: mx.array, b: mx.array) -> mx.array:
    """Solve y_t = a_t y_{t+1} + b_t with y_T = 0 in ceil(log2 T) steps: (B, T), (B, T) -> (B, T).

    The doubling scan of Hillis and Steele (https://doi.org/10.1145/7902.7903). If y_t = a_t y_{t+s} + b_t
    holds at every t, then putting the equation at t + s into the one at t gives
    y_t = (a_t a_{t+s}) y_{t+2s} + (a_t b_{t+s} + b_t): the span s doubles. Once it reaches T, y_{t+s} is 0.
    """
    length, span = b.shape[-1], 1
    while span < length:
        b = a * _shift_left(b, span) + b
        a = a * _shift_left(a, span)
        span *= 2
    return b


def _shift_left(x: mx.array, span: int) -> mx.array:
    """x_{t + span}, with zeros beyond the end: (B, T) -> (B, T)."""
    return mx.pad(x[:, span:], [(0, 0), (0, min(span, x.shape[1]))])
