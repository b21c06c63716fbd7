"""Generalised advantage estimation."""

from __future__ import annotations

import mlx.core as mx

from advantage.discounted_sum import masked_discounted_sum
from advantage.td_error import td_error
from token_attribution.masking import zero_masked


def gae(
    rewards: mx.array, values: mx.array, mask: mx.array, gamma: float, lam: float
) -> tuple[mx.array, mx.array]:
    r"""Advantages as exponentially weighted sums of TD errors, and the returns they imply.

    .. math::
        A_t = \delta_t + \gamma\lambda\, A_{next}, \qquad
        R_t = A_t + V_t

    (https://arxiv.org/abs/1506.02438). One number makes a whole family: lam = 0 is the TD error, and with
    lam = 1 the returns are the reward-to-go, whatever the values say. Tool output inside a completion is
    skipped: the last token before the hole is followed by the first one after it.

    The advantages are *not* whitened, because the returns, which the critic learns, must be made from the raw
    ones. Whiten afterwards, once per rollout batch, with ``token_attribution.masking.masked_whiten``.

    Args:
        rewards, values, mask: (B, T).
        gamma: Discount, in [0, 1].
        lam: Trade between bias (0) and variance (1).

    Returns:
        advantages and returns, (B, T) float32 each, zero where the mask is False.
    """
    advantages = masked_discounted_sum(td_error(rewards, values, mask, gamma), mask, gamma * lam)  # (B, T)
    returns = advantages + zero_masked(values, mask)  # (B, T)
    return advantages, returns
