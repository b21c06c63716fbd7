"""The rewards still to come: the critic-free return of REINFORCE."""

from __future__ import annotations

import mlx.core as mx

from advantage.discounted_sum import masked_discounted_sum


def reward_to_go(rewards: mx.array, mask: mx.array, gamma: float) -> mx.array:
    r"""Discounted sum of the rewards from each sampled token on: (B, T) float32, 0 where the mask is False.

    .. math:: G_t = \sum_{k \ge t} \gamma^{k - t} r_k

    over True positions, counted along them (a hole in the mask costs no discount).
    """
    return masked_discounted_sum(rewards, mask, gamma)
