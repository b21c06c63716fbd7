"""Rollouts to experience: score them, compare with the reference, work out each token's advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from advantage.group_relative import group_statistics
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Experience, Rollout, TokenBatch
from models.policy_model import FrozenPolicy, PolicyModel
from models.value_model import ValueModel
from ppo_trainer.algorithms import Algorithm
from ppo_trainer.credit import Scored, assign_credit
from ppo_trainer.evaluator import length_metrics, score_metrics
from ppo_trainer.score_shaper import ScoreShaper
from reward_kl.kl_divergence import FixedKLController, kl_per_token
from reward_kl.reward_computer import token_rewards, whiten_rewards
from rewards.composition import RewardSet
from rewards.scored_batch import ScoredBatch
from token_attribution.extractor import extract
from token_attribution.logprob_computer import read_states
from token_attribution.masking import masked_mean, masked_sum, masked_var
from token_attribution.sampled_states import SampledStates
from token_attribution.trunk import Trunk
from token_attribution.vocabulary import Wanted
from training.value_loss import explained_variance


class PolicyPass(NamedTuple):
    """What one forward of the policy says, each (B, T); None where nobody wants it."""

    logprobs: mx.array
    entropy: mx.array | None
    kl: mx.array | None  # exact, to the reference
    values: mx.array | None  # of a critic on the policy's trunk
    ref_logprobs: mx.array | None  # where the exact KL needed the reference's states anyway


Part = TypeVar("Part", mx.array, PolicyPass)


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
        self.shaper = ScoreShaper(config)

    def make(
        self,
        rollouts: Sequence[Rollout],
        scored: ScoredBatch,
        *,
        single_update: bool,
        greedy_scores: np.ndarray | None = None,
        teaches: bool = True,
        values_of_only_update: Callable[[Experience], mx.array] | None = None,
    ) -> tuple[Experience, dict[str, float]]:
        """Experience of one batch, and its metrics.

        ``single_update``: one optimiser step follows, at which the policy is still the one that the ratio is
        measured from, so no pass for old logprobs is made unless something else needs it.
        ``greedy_scores`` ``(B,)``: the score of the likeliest answer to each row's prompt.
        ``teaches=False``: only measure; nothing will be learned from this batch.
        ``values_of_only_update``: what tells the values ``(B, T)``, in place of a pass for them; it is given the
        experience so far, with its rewards.
        """
        batch = extract(rollouts)
        raw = mx.array(scored.total)  # (B,), NaN where no reward applies
        # A row without a score teaches nothing: it leaves every mask, and so every mean.
        batch = batch._replace(mask=batch.mask & ~mx.isnan(raw)[:, None])
        scores = self.shaper.shape(raw, rollouts)

        trainer = None if self._skips_old_pass(single_update) else self._in_batches(self._policy_pass, batch)
        ref = trainer.ref_logprobs if trainer is not None else None
        if self.reference is not None and ref is None:
            ref = self._in_batches(self._ref_logprobs, batch)
        kl = self._kl_penalty(trainer, ref, batch.mask)
        rewards = token_rewards(
            mx.where(mx.isnan(scores), 0.0, scores), kl, batch.mask, self.kl_controller.value
        )
        if self.config.whiten_rewards:
            rewards = whiten_rewards(rewards, batch.mask)
        values = trainer.values if trainer is not None else None
        if values_of_only_update is not None:
            so_far = Experience(*batch[:2], mx.zeros_like(rewards), batch.sampler_logprobs, rewards=rewards)
            values = values_of_only_update(so_far)
        elif self.value is not None and values is None:
            values = self._in_batches(self._values, batch)

        group_ids = mx.array([r.prompt.index for r in rollouts])
        components, weights = self._components(scored, rewards, batch.mask)
        greedy = self.shaper.comparable(mx.array(greedy_scores)) if greedy_scores is not None else None
        what_counts = Scored(scores, rewards, values, batch.mask, group_ids, components, weights, greedy)
        advantages, returns = assign_credit(self.algorithm.credit, what_counts, self.config)
        if trainer is not None and trainer.entropy is not None:
            advantages = self._at_forks(advantages, trainer.entropy, self._learned_from(batch, rollouts))
        old = None if trainer is None or single_update else trainer.logprobs
        if self.config.old_logprobs_from == "rollout":
            old = batch.sampler_logprobs
        experience = Experience(
            tokens=batch.tokens,
            mask=self._learned_from(batch, rollouts) if teaches else mx.zeros_like(batch.mask),
            advantages=advantages,
            sampler_logprobs=batch.sampler_logprobs,
            old_logprobs=old,
            ref_logprobs=ref,
            values=values,
            returns=returns,
        )
        # One evaluation: everything the update will read many times over.
        mx.eval(experience)
        # Of the policy that sampled. The update's own passes see it only if one update follows.
        measured = trainer.logprobs if trainer is not None else None if single_update else old
        k1 = None
        if measured is not None and ref is not None and bool(mx.any(batch.mask)):
            k1 = kl_per_token(measured, ref, "k1", batch.mask)
        metrics = self._metrics(experience, batch.mask, scores, rewards, k1, group_ids)
        groups = [r.prompt.index for r in rollouts] if self.config.group_size > 1 else None
        said = score_metrics(self.rewards, scored, groups)
        return experience, {**said, **length_metrics(rollouts), **metrics}

    # -- Passes over the models -----------------------------------------------------------------------

    def _skips_old_pass(self, single_update: bool) -> bool:
        config = self.config
        ratio_needs_none = single_update or config.old_logprobs_from == "rollout"
        in_reward = config.kl_placement == "reward" and self.reference is not None
        return ratio_needs_none and not in_reward and config.top_entropy_quantile == 1

    def _policy_pass(self, tokens: mx.array, mask: mx.array) -> PolicyPass:
        """All that anybody wants of the policy before its update, from one forward."""
        full_kl = self.config.kl_placement == "reward" and self.config.kl_estimator == "full"
        read, _, states, theirs = self.policy.read(
            tokens,
            mask,
            self.config.temperature,
            wanted=Wanted(entropy=self.config.top_entropy_quantile < 1, kl=full_kl),
            reference=self.reference if full_kl else None,
        )
        shares = self.value is not None and self.value.shared
        return PolicyPass(
            states.back_in_place(read.logprobs),
            states.back_in_place(read.entropy) if read.entropy is not None else None,
            states.back_in_place(read.kl) if read.kl is not None else None,
            self.value.at_sampled(states) if shares and self.value is not None else None,
            self._logprobs_of(theirs, tokens) if theirs is not None else None,
        )

    def _logprobs_of(self, model: tuple[SampledStates, Trunk], tokens: mx.array) -> mx.array:
        states, trunk = model
        return states.back_in_place(read_states(states, trunk, tokens, self.config.temperature).logprobs)

    def _ref_logprobs(self, tokens: mx.array, mask: mx.array) -> mx.array:
        assert self.reference is not None
        return self.reference.logprobs(tokens, mask, self.config.temperature)

    def _values(self, tokens: mx.array, mask: mx.array) -> mx.array:
        assert self.value is not None
        return self.value.values(tokens, mask)

    def _in_batches(self, run: Callable[[mx.array, mx.array], Part], batch: TokenBatch) -> Part:
        size = self.config.micro_batch_size or batch.tokens.shape[0]
        parts = []
        for start in range(0, batch.tokens.shape[0], size):
            part = run(batch.tokens[start : start + size], batch.mask[start : start + size])
            mx.eval(part)  # one micro-batch's activations at a time
            parts.append(part)
        if isinstance(parts[0], PolicyPass):
            columns = [list(column) for column in zip(*parts, strict=True)]
            return PolicyPass._make(c[0] if c[0] is None else mx.concatenate(c) for c in columns)
        return mx.concatenate(parts)

    # -- What is made of them -------------------------------------------------------------------------

    def _kl_penalty(
        self, trainer: PolicyPass | None, ref: mx.array | None, mask: mx.array
    ) -> mx.array | None:
        """The KL (B, T) that is taken off the rewards, where the row has it there."""
        if self.config.kl_placement != "reward" or ref is None:
            return None
        estimator = self.config.kl_estimator
        assert trainer is not None
        if estimator == "full":
            return trainer.kl
        assert estimator is not None
        assert estimator != "k3_plain"
        return kl_per_token(trainer.logprobs, ref, estimator, mask)

    def _components(
        self, scored: ScoredBatch, rewards: mx.array, mask: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Each reward alone ``(B, K + 1)``, and last what shaping and KL have added to their sum; weights."""
        columns = [mx.array(scored.components[name]) for name in self.rewards.names]
        added = masked_sum(rewards, mask, axis=1) - mx.array(scored.total)  # NaN where no reward applies
        return mx.stack([*columns, added], axis=1), mx.array([*self.rewards.weights, 1.0])

    def _at_forks(self, advantages: mx.array, entropy: mx.array, mask: mx.array) -> mx.array:
        """Advantages at the tokens of highest entropy, 0 elsewhere: the forks of a chain of thought.

        https://arxiv.org/abs/2506.01939 learns from the top fifth of the batch's tokens. The threshold is the
        batch's, so it does not depend on how the batch is split. Means go on dividing by all tokens, as in the
        paper's formula and TRL; the authors' code divides by the chosen ones, so its steps are 1/share as long.
        """
        measured = np.array(entropy)[np.array(mask)]
        if measured.size == 0:
            return advantages
        threshold = float(np.quantile(measured, 1.0 - self.config.top_entropy_quantile))
        return mx.where(entropy >= threshold, advantages, 0.0)

    def _learned_from(self, batch: TokenBatch, rollouts: Sequence[Rollout]) -> mx.array:
        """The mask, without cut-off completions if asked for: their scores have counted in their groups."""
        if not self.config.mask_truncated_completions:
            return batch.mask
        return batch.mask & mx.array([r.terminated for r in rollouts])[:, None]

    def _metrics(
        self,
        experience: Experience,
        mask: mx.array,
        scores: mx.array,
        rewards: mx.array,
        kl: mx.array | None,
        group_ids: mx.array,
    ) -> dict[str, float]:
        scorable = ~mx.isnan(scores)
        rows = mx.maximum(mx.sum(scorable), 1)
        mean_score = masked_mean(scores, scorable)
        values = {
            "objective/scores": mean_score,
            "advantages/mean": masked_mean(experience.advantages, mask),
            "advantages/std": mx.sqrt(masked_var(experience.advantages, mask)),
        }
        if kl is not None:
            values["objective/kl"] = masked_sum(kl, mask) / rows
            values["objective/kl_per_token"] = masked_mean(kl, mask)
        if kl is not None and self.config.kl_placement == "reward":
            values["objective/rlhf_reward"] = masked_sum(rewards, mask) / rows
            values["objective/non_score_reward"] = values["objective/rlhf_reward"] - mean_score
        if self.config.group_size > 1:
            values["frac_reward_zero_std"] = group_statistics(scores, group_ids).frac_zero_std
        if experience.values is not None and experience.returns is not None:
            values["explained_variance"] = explained_variance(experience.values, experience.returns, mask)
        mx.eval(values)
        metrics = {name: float(value) for name, value in values.items()}
        if self.config.score_scaling != "none":
            metrics["scores/running_mean"] = float(self.shaper.moments.mean)
            metrics["scores/running_std"] = float(self.shaper.moments.std)
        return metrics | {"kl_coef": self.kl_controller.value}
