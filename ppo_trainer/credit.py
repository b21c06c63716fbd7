"""Who gets the credit: from scored rollouts to an advantage per token.

Each function is one row's answer to "how much better than expected was this token?". They take a scored batch
and the resolved config and return advantages (and, with a critic, what it should learn). ``assign_credit`` adds
the whitening that some rows ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from advantage.gae_advantage import gae
from advantage.group_relative import group_advantages, leave_one_out, length_weighted_advantages
from advantage.reward_to_go import reward_to_go
from config.ppo_config import PPOConfig
from token_attribution.masking import masked_sum, masked_whiten, true_count


class Scored(NamedTuple):
    """A batch of rollouts after scoring: what an advantage may be computed from."""

    scores: mx.array  # (B,) float32, NaN for a row that no reward applied to
    rewards: mx.array  # (B, T) float32, the score on the last token, KL penalties where the row puts them
    values: mx.array | None  # (B, T) float32, with a critic
    mask: mx.array  # (B, T) bool
    group_ids: mx.array  # (B,) int32, equal for completions of one prompt
    components: mx.array | None = None  # (B, K) float32, each reward alone, and what was added to their sum
    weights: mx.array | None = None  # (K,) float32, theirs in the score
    greedy_scores: mx.array | None = None  # (B,) float32, of the likeliest answer to the row's prompt

    @property
    def outcomes(self) -> mx.array:
        """What each completion earned as a whole ``(B,)``: its score, minus the KL where that is in the reward."""
        return mx.where(mx.isnan(self.scores), mx.nan, masked_sum(self.rewards, self.mask, axis=1))


class Credit(NamedTuple):
    """What the update learns from."""

    advantages: mx.array  # (B, T) float32
    returns: mx.array | None  # (B, T) float32, the value network's target


CreditFunction = Callable[[Scored, PPOConfig], Credit]


def assign_credit(credit: CreditFunction, batch: Scored, config: PPOConfig) -> Credit:
    """The row's credit, whitened over all tokens of the batch if asked for; returns stay those of the raw one."""
    advantages, returns = credit(batch, config)
    return Credit(masked_whiten(advantages, batch.mask) if config.whiten_advantages else advantages, returns)


def from_critic(batch: Scored, config: PPOConfig) -> Credit:
    """Generalised advantage estimation."""
    assert batch.values is not None
    return Credit(*gae(batch.rewards, batch.values, batch.mask, config.gamma, config.lam))


def from_group(batch: Scored, config: PPOConfig) -> Credit:
    """Distance from the group's mean, divided as ``scale_rewards`` says; the same for every token."""
    advantages = group_advantages(
        batch.outcomes, batch.group_ids, scale=config.scale_rewards, eps=config.advantage_epsilon
    )
    return Credit(_every_token(advantages, batch.mask), None)


def from_others_of_group(batch: Scored, config: PPOConfig) -> Credit:
    """Distance from the mean of the others of the group; the same for every token."""
    return Credit(_every_token(leave_one_out(batch.outcomes, batch.group_ids), batch.mask), None)


def from_length_weighted_group(batch: Scored, config: PPOConfig) -> Credit:
    """Distance from the group's mean weighted by length; the same for every token."""
    lengths = true_count(batch.mask, axis=1)  # (B,)
    advantages = length_weighted_advantages(batch.outcomes, lengths, batch.group_ids)
    return Credit(_every_token(advantages, batch.mask), None)


def from_each_reward(batch: Scored, config: PPOConfig) -> Credit:
    """Each reward normalised in its group by itself, then their weighted sum over the whole batch."""
    assert batch.components is not None
    assert batch.weights is not None
    # A row without a score, since one of its rewards failed, is nobody's measure in the others either.
    unscored = mx.isnan(batch.outcomes)[:, None]
    components = mx.where(unscored, mx.nan, batch.components)  # (B, K + 1)
    added = components[:, -1]
    # What was added to their sum has a size of its own (kl_coef, a penalty): it is centred and not divided.
    total = batch.weights[-1] * group_advantages(added, batch.group_ids, scale="none")  # (B,)
    for k in range(components.shape[1] - 1):
        own = group_advantages(
            components[:, k], batch.group_ids, scale=config.scale_rewards, eps=config.advantage_epsilon
        )
        total = total + batch.weights[k] * own
    applies = mx.where(mx.isnan(batch.outcomes), mx.nan, total)
    whole_batch = mx.zeros_like(batch.group_ids)
    advantages = group_advantages(applies, whole_batch, scale="group", eps=config.advantage_epsilon)
    return Credit(_every_token(advantages, batch.mask), None)


def from_return(batch: Scored, config: PPOConfig) -> Credit:
    """The rewards still to come, compared with nothing."""
    return Credit(reward_to_go(batch.rewards, batch.mask, config.gamma), None)


def from_return_and_others(batch: Scored, config: PPOConfig) -> Credit:
    """The rewards still to come, minus the mean outcome of the batch's other completions."""
    # Leave-one-out over the whole batch: outcome - baseline is what leave_one_out returns.
    whole_batch = mx.zeros_like(batch.group_ids)
    outcomes = mx.where(mx.isnan(batch.outcomes), 0.0, batch.outcomes)
    baseline = outcomes - leave_one_out(batch.outcomes, whole_batch)  # (B,)
    return _minus_baseline(batch, baseline, config)


def from_return_and_greedy(batch: Scored, config: PPOConfig) -> Credit:
    """The rewards still to come, minus the score of the likeliest answer."""
    assert batch.greedy_scores is not None
    return _minus_baseline(batch, batch.greedy_scores, config)


def _minus_baseline(batch: Scored, baseline: mx.array, config: PPOConfig) -> Credit:
    to_go = reward_to_go(batch.rewards, batch.mask, config.gamma)  # (B, T)
    return Credit(mx.where(batch.mask, to_go - baseline[:, None], 0.0), None)


def _every_token(advantages: mx.array, mask: mx.array) -> mx.array:
    """(B,) to (B, T), 0 where the mask is False."""
    return mx.where(mask, advantages[:, None], 0.0)
