"""Experience to better weights: the losses of one algorithm's row, over epochs of minibatches."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import ExperienceBuffer, Minibatch
from experience_buffer.data_structures import Experience
from models.policy_model import PolicyModel
from models.value_model import ValueModel
from ppo_trainer.algorithms import Algorithm
from reward_kl.kl_divergence import FixedKLController, kl_per_token
from token_attribution.logprob_computer import TokenStatistics, statistics_from_states
from token_attribution.masking import masked_sum
from training.model_trainer import ModelTrainer, StepReport
from training.policy_loss import (
    PolicyLossStatistics,
    aggregate,
    importance_ratio,
    policy_loss,
    policy_loss_statistics,
)
from training.value_loss import value_clip_fraction, value_loss


class Watched(NamedTuple):
    """Sums over tokens that a loss reports beside its value."""

    policy: PolicyLossStatistics
    n_rows: mx.array
    entropy: mx.array
    kl_k1: mx.array
    kl_k3: mx.array
    policy_loss: mx.array  # its share of the minibatch's loss
    value_loss: mx.array
    value_clipped: mx.array  # share of the minibatch's tokens

    def merge(self, other: Watched) -> Watched:
        """Both together."""
        sums = [mine + theirs for mine, theirs in zip(self[1:], other[1:], strict=True)]
        return Watched(self.policy.merge(other.policy), *sums)


class Updater:
    """Owns the optimisers. Policy and separate value network each have their own; a shared trunk has one."""

    def __init__(
        self,
        policy: PolicyModel,
        value: ValueModel | None,
        algorithm: Algorithm,
        kl_controller: FixedKLController,
        config: PPOConfig,
        *,
        total_steps: int,
    ) -> None:
        self.policy = policy
        self.value = value
        self.algorithm = algorithm
        self.kl_controller = kl_controller
        self.config = config
        shared = value is not None and value.shared
        module = value.module if shared and value is not None else policy.model
        self.policy_trainer = ModelTrainer(module, config, total_steps=total_steps)
        self.value_trainer: ModelTrainer | None = None
        if value is not None and not shared:
            self.value_trainer = ModelTrainer(
                value.module, config, total_steps=total_steps, learning_rate=config.value_learning_rate
            )

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """All epochs over one batch of rollouts; metrics are means over its tokens and optimiser steps."""
        config = self.config
        buffer = ExperienceBuffer(
            experience, minibatch_size=config.minibatch_size, micro_batch_size=config.micro_batch_size
        )
        merged: Watched | None = None
        reports: list[StepReport] = []
        value_reports: list[StepReport] = []
        warming_up = max(step, 1) <= config.value_warmup_steps and self.value_trainer is not None
        for epoch in range(config.num_epochs_per_rollout):
            for minibatch in buffer.minibatches(config.seed, step, epoch):
                if minibatch.n_tokens == 0:
                    continue  # nothing was scored: not even momentum is a reason to move
                if not warming_up:
                    # Before the first step the policy is still the one that sampled: its ratio is exactly 1.
                    on_policy = not reports
                    reports.append(self._policy_step(minibatch, on_policy))
                    watched = _merge(reports[-1])
                    merged = watched if merged is None else merged.merge(watched)
                    if self._too_far(watched):
                        return self._metrics(merged, reports, value_reports)
                if self.value_trainer is not None:
                    value_reports.append(self._value_step(minibatch))
        return self._metrics(merged, reports, value_reports)

    def _policy_step(self, minibatch: Minibatch, on_policy: bool) -> StepReport:
        return self.policy_trainer.step(
            lambda part: self._policy_loss(part, minibatch, on_policy), minibatch.micro_batches
        )

    def _policy_loss(self, part: Experience, whole: Minibatch, on_policy: bool) -> tuple[mx.array, Watched]:
        """One micro-batch's share of the minibatch's loss. Differentiated."""
        config, row, mask = self.config, self.algorithm, part.mask
        tokens, values = self._forward(part)
        logprobs = tokens.logprobs  # (B, T)
        old = mx.stop_gradient(logprobs) if on_policy or part.old_logprobs is None else part.old_logprobs
        clip = {"clip_epsilon": config.clip_epsilon, "clip_epsilon_high": config.clip_epsilon_high}
        per_token = policy_loss(
            logprobs, old, part.advantages, mask, ratio=row.ratio, surrogate=row.surrogate, **clip  # type: ignore[arg-type]
        )
        zero = mx.zeros(())
        kl_k1 = kl_k3 = zero
        if part.ref_logprobs is not None:
            if row.kl_placement == "loss":
                # The ratio stays differentiable: without it the gradient would be the forward KL's.
                kl = kl_per_token(logprobs, part.ref_logprobs, row.kl_estimator, mask)
                per_token = per_token + self.kl_controller.value * importance_ratio(logprobs, old, mask) * kl
            measured = mx.stop_gradient(logprobs)
            kl_k1 = masked_sum(kl_per_token(measured, part.ref_logprobs, "k1", mask), mask)
            kl_k3 = masked_sum(kl_per_token(measured, part.ref_logprobs, "k3", mask), mask)
        loss = objective = aggregate(per_token, mask, row.reduction, self._denominator(whole))
        critic = clipped = zero
        if values is not None:
            critic, clipped = self._critic_loss(values, part, whole)
            objective = objective + config.vf_coef * critic
        statistics = policy_loss_statistics(logprobs, old, part.advantages, mask, ratio=row.ratio, **clip)  # type: ignore[arg-type]
        rows = mx.sum(mx.any(mask, axis=1)).astype(mx.float32)
        watched = Watched(statistics, rows, mx.sum(tokens.entropy), kl_k1, kl_k3, loss, critic, clipped)
        return objective, watched

    def _forward(self, part: Experience) -> tuple[TokenStatistics, mx.array | None]:
        """Token statistics, and values where they come from the same trunk: one forward serves both."""
        temperature = self.config.temperature
        if self.value is None or not self.value.shared:
            return self.policy.statistics(part.tokens, part.mask, temperature), None
        trunk = self.value.trunk
        states = trunk.hidden(part.tokens[:, :-1])
        statistics = statistics_from_states(states, trunk.head, part.tokens, part.mask, temperature)
        return statistics, self.value.from_hidden(states)

    def _denominator(self, whole: Minibatch) -> float:
        """What the loss divides by, counted over the whole minibatch so that micro-batches add up."""
        return {
            "token_mean": max(whole.n_tokens, 1),
            "sequence_mean": max(whole.n_rows, 1),
            "fixed_length": max(whole.n_rows, 1) * self.config.max_new_tokens,
        }[self.algorithm.reduction]

    def _value_step(self, minibatch: Minibatch) -> StepReport:
        assert self.value_trainer is not None
        assert self.value is not None
        value = self.value

        def loss(part: Experience) -> tuple[mx.array, tuple[mx.array, mx.array]]:
            critic, clipped = self._critic_loss(value.values(part.tokens), part, minibatch)
            return critic, (critic, clipped)

        return self.value_trainer.step(loss, minibatch.micro_batches)

    def _critic_loss(self, values: mx.array, part: Experience, whole: Minibatch) -> tuple[mx.array, mx.array]:
        assert part.values is not None
        assert part.returns is not None
        arguments = (values, part.values, part.returns, part.mask, self.config.clip_range_value)
        count = max(whole.n_tokens, 1)
        return value_loss(*arguments, denominator=count), value_clip_fraction(*arguments, denominator=count)

    def _too_far(self, watched: Watched) -> bool:
        """Whether the policy has left the sampling policy by more than ``target_kl``."""
        statistics, target = watched.policy, self.config.target_kl
        return target is not None and float(statistics.approx_kl) > target * max(
            float(statistics.token_count), 1
        )

    def _metrics(
        self, watched: Watched | None, reports: list[StepReport], value_reports: list[StepReport]
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if watched is not None:
            metrics |= self._policy_metrics(watched, reports)
        if value_reports:
            metrics["value_grad_norm"] = _mean([r.grad_norm for r in value_reports])
            metrics["loss/value_avg"] = _mean([r.loss for r in value_reports])
            clipped = [sum(float(extra[1]) for extra in r.extras) for r in value_reports]
            metrics["val/clipfrac_avg"] = _mean(clipped)
        skipped = sum(r.skipped for r in [*reports, *value_reports])
        return metrics | {"skipped_updates": float(skipped), "num_updates": float(len(reports))}

    def _policy_metrics(self, watched: Watched, reports: list[StepReport]) -> dict[str, float]:
        s, n = watched.policy, len(reports)
        count = max(float(s.token_count), 1.0)
        metrics = {
            "loss/policy_avg": float(watched.policy_loss) / n,
            "grad_norm": _mean([r.grad_norm for r in reports]),
            "lr": reports[-1].learning_rate,
            "entropy": float(watched.entropy) / count,
            "policy/approxkl_avg": float(s.approx_kl) / count,
            "clip_ratio/low_mean": float(s.clip_low) / count,
            "clip_ratio/high_mean": float(s.clip_high) / count,
            "clip_ratio/region_mean": float(s.clip_region) / count,
            "val/ratio": float(s.ratio_sum) / count,
            "val/ratio_min": float(s.ratio_min),
            "val/ratio_max": float(s.ratio_max),
        }
        first = _merge(reports[0])
        metrics["first_minibatch/ratio_max"] = float(first.policy.ratio_max)
        metrics["first_minibatch/approxkl"] = float(first.policy.approx_kl) / max(
            float(first.policy.token_count), 1.0
        )
        if self.algorithm.kl_placement != "none" and self.kl_controller.value > 0:
            metrics["kl"] = float(watched.kl_k3) / count
        if self.algorithm.kl_placement == "loss" and self.kl_controller.value > 0:
            metrics["objective/kl"] = float(watched.kl_k1) / max(float(watched.n_rows), 1.0)
        if self.value is not None and self.value.shared:
            metrics["loss/value_avg"] = float(watched.value_loss) / n
            metrics["val/clipfrac_avg"] = float(watched.value_clipped) / n
        return metrics


def _merge(report: StepReport) -> Watched:
    """What the micro-batches of one step reported, together."""
    merged: Watched = report.extras[0]
    for extra in report.extras[1:]:
        merged = merged.merge(extra)
    return merged


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
