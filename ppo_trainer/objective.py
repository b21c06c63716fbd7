"""What is differentiated: one micro-batch's share of the minibatch's loss, and what is watched while it is.

    loss = reduce( w · keep · surrogate(ρ, Â) + β · KL ) − c₂ · entropy + c₁ · value loss (on a shared trunk)

ρ is the policy's ratio to the old policy, w the importance weight of the old policy over the sampler, keep the
off-policy sequence mask. Which ratio, surrogate, reduction and KL is what the config's columns say.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import mlx.core as mx

from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import Minibatch
from experience_buffer.data_structures import Experience
from models.policy_model import FrozenPolicy, PolicyModel
from models.value_model import ValueModel
from ppo_trainer.resolution import kl_is_used
from reward_kl.kl_divergence import Estimator, FixedKLController, kl_per_token
from token_attribution.logprob_computer import TokenStatistics
from token_attribution.masking import masked_mean, masked_sum
from token_attribution.sampled_states import SampledStates
from token_attribution.vocabulary import Wanted
from training.importance_correction import (
    Correction,
    MismatchStatistics,
    importance_weights,
    mismatch_statistics,
)
from training.policy_loss import (
    PolicyLossStatistics,
    aggregate,
    importance_ratio,
    off_policy_sequence_mask,
    policy_loss,
    policy_loss_statistics,
)
from training.value_loss import value_clip_fraction, value_loss


class Watched(NamedTuple):
    """Sums over tokens that a loss reports beside its value."""

    policy: PolicyLossStatistics
    mismatch: MismatchStatistics | None  # of sampler and trainer: only where the policy is still the old one
    n_rows: mx.array
    n_dropped: mx.array  # rows that the off-policy sequence mask leaves out
    entropy: mx.array
    kl_k1: mx.array
    kl_k3: mx.array
    kl_term: mx.array  # the KL as it stands in the loss, summed over tokens, before its coefficient
    policy_loss: mx.array  # its share of the minibatch's loss
    value_loss: mx.array
    value_clipped: mx.array  # share of the minibatch's tokens

    def merge(self, other: Watched) -> Watched:
        """Both together."""
        sums = [mine + theirs for mine, theirs in zip(self[2:], other[2:], strict=True)]
        mismatch = self.mismatch
        if mismatch is not None and other.mismatch is not None:
            mismatch = mismatch.merge(other.mismatch)
        return Watched(self.policy.merge(other.policy), mismatch, *sums)


class PolicyObjective:
    """The loss of one algorithm's row, for one config."""

    def __init__(
        self,
        policy: PolicyModel,
        value: ValueModel | None,
        reference: FrozenPolicy | None,
        kl_controller: FixedKLController,
        config: PPOConfig,
    ) -> None:
        self.policy = policy
        self.value = value
        self.reference = reference
        self.kl_controller = kl_controller
        self.config = config
        self._correction = cast(Correction, config.correction)
        ratio: dict[str, Any] = {
            "ratio": config.ratio,
            "clip_epsilon": config.clip_epsilon,
            "clip_epsilon_high": config.clip_epsilon_high,
            "ratio_cap": config.ratio_cap,
        }
        self._watched_options = ratio
        self._loss_options = ratio | {
            "surrogate": config.surrogate,
            "dual_clip": config.dual_clip,
            "delta": config.delta,
            "sapo_temperature_pos": config.sapo_temperature_pos,
            "sapo_temperature_neg": config.sapo_temperature_neg,
        }

    def __call__(self, part: Experience, whole: Minibatch, *, first: bool) -> tuple[mx.array, Watched]:
        """The loss of ``part``, a micro-batch of ``whole``. Differentiated.

        ``first``: no optimiser step has been made on this batch yet, so the policy still is the old one.
        """
        config, mask = self.config, part.mask
        tokens, full_kl, states = self._forward(part)
        logprobs = tokens.logprobs  # (B, T)
        old = self._old(part, logprobs, first)
        per_token = policy_loss(logprobs, old, part.advantages, mask, **self._loss_options)
        keep = self._keep(part, logprobs)  # (B, T) or None
        if keep is not None:
            per_token = per_token * keep
        kl, sampled = self._kl(part, logprobs, old, full_kl)
        beta = self.kl_controller.value
        # The sampler's tokens stand for the policy's only with their weight, in an estimated KL as in the rest; a
        # sum over the vocabulary was not sampled.
        if kl is not None and sampled:
            per_token = per_token + beta * kl
        if self._correction != "none":
            per_token = per_token * importance_weights(
                old,
                part.sampler_logprobs,
                mask,
                self._correction,
                config.importance_cap,
                config.importance_floor,
            )
        if kl is not None and not sampled:
            per_token = per_token + beta * kl
        loss = objective = aggregate(
            per_token, mask, cast(Any, config.reduction), self._denominator(whole, part)
        )
        if config.entropy_coef != 0:
            objective = objective - config.entropy_coef * masked_mean(
                tokens.entropy, mask, max(whole.n_tokens, 1)
            )
        critic = clipped = mx.zeros(())
        if self.value is not None and self.value.shared:
            critic, clipped = self.critic_loss(self.value.at_sampled(states), part, whole)
            objective = objective + config.vf_coef * critic
        watched = self._watch(part, tokens, old, kl, keep, first)
        return objective, watched._replace(policy_loss=loss, value_loss=critic, value_clipped=clipped)

    def critic_loss(self, values: mx.array, part: Experience, whole: Minibatch) -> tuple[mx.array, mx.array]:
        """Value loss and share of clipped values of ``part``, divided by the tokens of the minibatch."""
        assert part.values is not None
        assert part.returns is not None
        arguments = (values, part.values, part.returns, part.mask, self.config.clip_range_value)
        count = max(whole.n_tokens, 1)
        return value_loss(*arguments, denominator=count), value_clip_fraction(*arguments, denominator=count)

    # -- Its parts ------------------------------------------------------------------------------------

    def _forward(self, part: Experience) -> tuple[TokenStatistics, mx.array | None, SampledStates]:
        """Logprobs and entropies, the exact KL (B, T) if the loss has it, and the states, all from one forward."""
        read, _, states, _ = self.policy.read(
            part.tokens,
            part.mask,
            self.config.temperature,
            wanted=Wanted(True, self.config.entropy_coef != 0, self._full_kl_in_loss),
            reference=self.reference if self._full_kl_in_loss else None,
            for_gradient=True,
        )
        assert read.entropy is not None
        tokens = TokenStatistics(states.back_in_place(read.logprobs), states.back_in_place(read.entropy))
        return tokens, None if read.kl is None else states.back_in_place(read.kl), states

    def _old(self, part: Experience, logprobs: mx.array, first: bool) -> mx.array:
        """What the ratio is measured from, without gradient: at the first step the policy itself."""
        if self.config.old_logprobs_from == "rollout":
            return part.sampler_logprobs
        if first or part.old_logprobs is None:
            return mx.stop_gradient(logprobs)
        return part.old_logprobs

    def _keep(self, part: Experience, logprobs: mx.array) -> mx.array | None:
        threshold = self.config.off_policy_mask_threshold
        if threshold is None:
            return None
        return off_policy_sequence_mask(
            logprobs, part.sampler_logprobs, part.advantages, part.mask, threshold
        )

    @property
    def _full_kl_in_loss(self) -> bool:
        return self.config.kl_placement == "loss" and self.config.kl_estimator == "full" and self._kl_in_loss

    @property
    def _kl_in_loss(self) -> bool:
        return self.config.kl_placement == "loss" and self.reference is not None and kl_is_used(self.config)

    def _kl(
        self, part: Experience, logprobs: mx.array, old: mx.array, full_kl: mx.array | None
    ) -> tuple[mx.array | None, bool]:
        """The KL term (B, T) of the loss, if there is one, and whether it is estimated from the sampled tokens."""
        if full_kl is not None:
            return full_kl, False
        if not self._kl_in_loss:
            return None, True
        assert part.ref_logprobs is not None
        estimator = self.config.kl_estimator
        if estimator == "k3":
            # The ratio stays differentiable: without it the gradient would be the forward KL's.
            ratio = importance_ratio(logprobs, old, part.mask)
            return ratio * kl_per_token(logprobs, part.ref_logprobs, "k3", part.mask), True
        plain = cast(Estimator, "k3" if estimator == "k3_plain" else estimator)
        return kl_per_token(logprobs, part.ref_logprobs, plain, part.mask), True

    def _denominator(self, whole: Minibatch, part: Experience) -> float | mx.array:
        """What the loss divides by, counted over the whole minibatch so that micro-batches add up."""
        rows = max(whole.n_rows, 1)
        if self.config.reduction == "token_mean":
            return max(whole.n_tokens, 1)
        if self.config.reduction == "fixed_length":
            return rows * self.config.max_new_tokens
        if self.config.reduction == "micro_batch_mean":  # a mean of the micro-batches' own means, TRL's bnpo
            return mx.maximum(mx.sum(part.mask), 1) * len(whole.micro_batches)
        return rows

    def _watch(
        self,
        part: Experience,
        tokens: TokenStatistics,
        old: mx.array,
        kl: mx.array | None,
        keep: mx.array | None,
        first: bool,
    ) -> Watched:
        zero, mask, measured = mx.zeros(()), part.mask, mx.stop_gradient(tokens.logprobs)
        k1 = k3 = zero
        if part.ref_logprobs is not None:
            k1 = masked_sum(kl_per_token(measured, part.ref_logprobs, "k1", mask), mask)
            k3 = masked_sum(kl_per_token(measured, part.ref_logprobs, "k3", mask), mask)
        real = mx.any(mask, axis=1)  # (B,)
        dropped = zero if keep is None else mx.sum(mx.any((keep == 0) & mask, axis=1)).astype(mx.float32)
        return Watched(
            policy=policy_loss_statistics(measured, old, part.advantages, mask, **self._watched_options),
            mismatch=mismatch_statistics(measured, part.sampler_logprobs, mask) if first else None,
            n_rows=mx.sum(real).astype(mx.float32),
            n_dropped=dropped,
            entropy=mx.sum(mx.stop_gradient(tokens.entropy)),
            kl_k1=k1,
            kl_k3=k3,
            kl_term=zero if kl is None else masked_sum(mx.stop_gradient(kl), mask),
            policy_loss=zero,
            value_loss=zero,
            value_clipped=zero,
        )
