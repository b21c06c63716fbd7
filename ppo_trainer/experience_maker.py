"""Rollouts to experience: score them, compare with the reference, work out each token's advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from advantage.group_relative import group_statistics
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Experience, Rollout, TokenBatch
from models.policy_model import FrozenPolicy, PolicyModel
from models.value_model import ValueModel
from ppo_trainer.algorithms import Algorithm, Scored
from ppo_trainer.evaluator import length_metrics, score_metrics
from reward_kl.kl_divergence import FixedKLController, kl_per_token
from reward_kl.reward_computer import apply_missing_end_penalty, token_rewards
from rewards.composition import RewardSet, ScoredBatch
from token_attribution.extractor import extract
from token_attribution.masking import masked_mean, masked_sum, masked_var
from training.value_loss import explained_variance


class ExperienceMaker:
    """Makes the batch that an update learns from. Nothing here is differentiated."""

    def __init__(
        self,
        policy: PolicyModel,
        value: ValueModel | None,
        reference: FrozenPolicy | None,
        rewards: RewardSet,
        algorithm: Algorithm,
        kl_controller: FixedKLController,
        config: PPOConfig,
    ) -> None:
        self.policy = policy
        self.value = value
        self.reference = reference
        self.rewards = rewards
        self.algorithm = algorithm
        self.kl_controller = kl_controller
        self.config = config

    def make(
        self, rollouts: Sequence[Rollout], scored: ScoredBatch, *, single_update: bool
    ) -> tuple[Experience, dict[str, float]]:
        """Experience of one batch, and its metrics.

        ``single_update``: one optimiser step follows, at which the policy is still the sampling policy, so
        no pass for old logprobs is made unless the KL in the reward needs it.
        """
        batch = extract(rollouts)
        raw = mx.array(scored.total)  # (B,), NaN where no reward applies
        # A row without a score teaches nothing: it leaves every mask, and so every mean.
        batch = batch._replace(mask=batch.mask & ~mx.isnan(raw)[:, None])
        terminated = mx.array([r.terminated for r in rollouts])
        scores = apply_missing_end_penalty(raw, terminated, self.config.missing_end_penalty)

        in_reward = self.algorithm.kl_placement == "reward" and self.reference is not None
        old = None if single_update and not in_reward else self._in_batches(self._old_logprobs, batch)
        ref = self._in_batches(self._ref_logprobs, batch) if self.reference is not None else None
        values = self._in_batches(self._values, batch) if self.value is not None else None
        kl = kl_per_token(old, ref, "k1", batch.mask) if old is not None and ref is not None else None

        rewards = token_rewards(
            mx.where(mx.isnan(scores), 0.0, scores),
            kl if in_reward else None,
            batch.mask,
            self.kl_controller.value,
        )
        group_ids = mx.array([r.prompt.index for r in rollouts])
        credit = self.algorithm.credit(Scored(scores, rewards, values, batch.mask, group_ids), self.config)
        experience = Experience(batch.tokens, batch.mask, credit.advantages, old, ref, values, credit.returns)
        # One evaluation: everything the update will read many times over.
        mx.eval(experience)
        metrics = self._metrics(experience, batch, scores, rewards, kl, group_ids)
        return experience, {**score_metrics(self.rewards, scored), **length_metrics(rollouts), **metrics}

    def _old_logprobs(self, tokens: mx.array, mask: mx.array) -> mx.array:
        return self.policy.logprobs(tokens, mask, self.config.temperature)

    def _ref_logprobs(self, tokens: mx.array, mask: mx.array) -> mx.array:
        assert self.reference is not None
        return self.reference.logprobs(tokens, mask, self.config.temperature)

    def _values(self, tokens: mx.array, mask: mx.array) -> mx.array:
        assert self.value is not None
        return mx.where(mask, self.value.values(tokens), 0.0)

    def _in_batches(self, run: Callable[[mx.array, mx.array], mx.array], batch: TokenBatch) -> mx.array:
        size = self.config.micro_batch_size or batch.tokens.shape[0]
        parts = []
        for start in range(0, batch.tokens.shape[0], size):
            part = run(batch.tokens[start : start + size], batch.mask[start : start + size])
            mx.eval(part)  # one micro-batch's activations at a time
            parts.append(part)
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def _metrics(
        self,
        experience: Experience,
        batch: TokenBatch,
        scores: mx.array,
        rewards: mx.array,
        kl: mx.array | None,
        group_ids: mx.array,
    ) -> dict[str, float]:
        mask, scorable = experience.mask, ~mx.isnan(scores)
        rows = mx.maximum(mx.sum(scorable), 1)
        mean_score = masked_mean(scores, scorable)
        values = {
            "objective/scores": mean_score,
            "advantages/mean": masked_mean(experience.advantages, mask),
            "advantages/std": mx.sqrt(masked_var(experience.advantages, mask)),
        }
        if kl is not None:
            values["objective/kl"] = masked_sum(kl, mask) / rows
            values["objective/rlhf_reward"] = masked_sum(rewards, mask) / rows
            values["objective/non_score_reward"] = values["objective/rlhf_reward"] - mean_score
        if self.algorithm.needs_groups:
            values["frac_reward_zero_std"] = group_statistics(scores, group_ids).frac_zero_std
        if experience.values is not None and experience.returns is not None:
            values["explained_variance"] = explained_variance(experience.values, experience.returns, mask)
        if experience.old_logprobs is not None:
            difference = mx.where(mask, mx.abs(experience.old_logprobs - batch.sampler_logprobs), 0.0)
            values["sampling/sampling_logp_difference/mean"] = masked_mean(difference, mask)
            values["sampling/sampling_logp_difference/max"] = mx.max(difference)
        mx.eval(values)
        return {name: float(value) for name, value in values.items()} | {"kl_coef": self.kl_controller.value}
