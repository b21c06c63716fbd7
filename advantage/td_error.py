"""One-step temporal difference errors."""

from __future__ import annotations

import mlx.core as mx

from advantage.discounted_sum import next_true_value
from token_attribution.masking import check_same_shape, zero_masked


def td_error(rewards: mx.array, values: mx.array, mask: mx.array, gamma: float) -> mx.array:
    r"""How much better each step went than its value foretold.

    .. math:: \delta_t = r_t + \gamma V_{next} - V_t

    "Next" is the next True position, so values in padding and in holes are never read; after the last one
    V is 0. A completion cut off by the length limit is treated as ended, as all the RLHF references do.

    Args:
        rewards, values, mask: (B, T).
        gamma: Discount, in [0, 1]; 1 in nearly all RLHF.

    Returns:
        (B, T) float32, zero where the mask is False.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values = zero_masked(rewards, mask), zero_masked(values, mask)
    return zero_masked(rewards + gamma * next_true_value(values, mask) - values, mask)
