"""Experience to better weights: epochs of minibatches through the algorithm's loss."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from advantage.gae_advantage import gae
from base_setup.backend import device_kind
from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import ExperienceBuffer, Minibatch
from experience_buffer.data_structures import Experience
from models.policy_model import FrozenPolicy, PolicyModel
from models.value_model import ValueModel
from ppo_trainer.objective import PolicyObjective, Watched
from ppo_trainer.resolution import kl_is_used
from reward_kl.kl_divergence import FixedKLController
from training.importance_correction import effective_sample_size
from training.model_trainer import ModelTrainer, StepReport

#: Tokens of a forward and backward pass where more of them at once are no faster (measured, docs/performance.md). What
#: does not stand here takes all rows at once.
PASS_TOKENS = {"cpu": 1280}


class Updater:
    """Owns the optimisers. Policy and separate value network each have their own; a shared trunk has one."""

    def __init__(
        self,
        policy: PolicyModel,
        value: ValueModel | None,
        reference: FrozenPolicy | None,
        kl_controller: FixedKLController,
        config: PPOConfig,
        *,
        total_steps: int,
    ) -> None:
        self.value = value
        self.kl_controller = kl_controller
        self.config = config
        self.objective = PolicyObjective(policy, value, reference, kl_controller, config)
        shared = value is not None and value.shared
        module = value.module if shared and value is not None else policy.model
        self.policy_trainer = ModelTrainer(module, config, total_steps=total_steps)
        self.value_trainer: ModelTrainer | None = None
        self._value_report: StepReport | None = None  # of a step on the batch at hand that was made already
        if value is not None and not shared:
            self.value_trainer = ModelTrainer(
                value.module, config, total_steps=total_steps, learning_rate=config.value_learning_rate
            )

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """All epochs over one batch of rollouts; metrics are means over its tokens and optimiser steps."""
        config = self.config
        buffer = self._buffer(experience)
        merged: Watched | None = None
        reports: list[StepReport] = []
        value_reports: list[StepReport] = []
        warming_up = max(step, 1) <= config.value_warmup_steps and self.value_trainer is not None
        for epoch in range(config.num_epochs_per_rollout):
            for minibatch in buffer.minibatches(config.seed, step, epoch):
                if minibatch.n_tokens == 0:
                    continue  # nothing was scored: not even momentum is a reason to move
                if not warming_up:
                    reports.append(self._policy_step(minibatch, first=not _has_moved(reports)))
                    watched = _merge(reports[-1])
                    merged = watched if merged is None else merged.merge(watched)
                    if self._too_far(watched):
                        return self._metrics(merged, reports, value_reports)
                if self._value_report is not None:
                    value_reports.append(self._value_report)
                elif self.value_trainer is not None:
                    value_reports.append(self._value_step(minibatch))
        self._value_report = None
        return self._metrics(merged, reports, value_reports)

    def values_of_only_update(self, experience: Experience) -> mx.array:
        """Values (B, T) of a batch from which one update is learned, and the critic's part in that, from one forward.

        What the critic learns is made of its own values and ``experience.rewards`` (B, T). The policy's part of the
        update needs the values as they were before; its advantages are still to be made of them.
        """
        minibatch = next(self._buffer(experience).minibatches())
        values = np.zeros(experience.mask.shape, dtype=np.float32)
        if minibatch.n_tokens:
            self._value_report = self._value_step(minibatch)
            for rows, extra in zip(minibatch.rows, self._value_report.extras, strict=True):
                values[rows, : extra[2].shape[1]] = np.array(extra[2])
        return mx.array(values)

    def _buffer(self, experience: Experience) -> ExperienceBuffer:
        config = self.config
        rows = config.micro_batch_size
        # The mean of micro-batches' means depends on what they are, so there a pass is what the user says it is.
        efficient = rows is None and config.reduction != "micro_batch_mean"
        return ExperienceBuffer(
            experience,
            minibatch_size=config.minibatch_size,
            micro_batch_size=rows,
            micro_batch_tokens=PASS_TOKENS.get(device_kind()) if efficient else None,
            teaches=(
                np.array(mx.any((experience.advantages != 0) & experience.mask, axis=1))
                if self._only_advantages_teach
                else None
            ),
        )

    @property
    def _only_advantages_teach(self) -> bool:
        """Whether a row whose advantages are all 0 has no gradient and decides nothing: it may stay out of the pass."""
        config = self.config
        kl_in_loss = config.kl_placement == "loss" and kl_is_used(config)
        # Limits on the mean ratio and KL are on those of all tokens.
        limited = config.target_kl is not None or config.ratio_threshold is not None
        return (
            self.value is None
            and not kl_in_loss
            and not limited
            and config.entropy_coef == 0
            and config.reduction != "micro_batch_mean"
        )

    def _policy_step(self, minibatch: Minibatch, *, first: bool) -> StepReport:
        # Until the first step the policy is still the old one: its ratio is exactly 1.
        return self.policy_trainer.step(
            lambda part: self.objective(part, minibatch, first=first),
            minibatch.micro_batches,
            accept=self._ratio_is_sane,
        )

    def _value_step(self, minibatch: Minibatch) -> StepReport:
        assert self.value_trainer is not None
        assert self.value is not None
        value = self.value

        def loss(part: Experience) -> tuple[mx.array, tuple[mx.array, ...]]:
            values = value.values(part.tokens, part.mask)
            before = mx.stop_gradient(values)
            if part.rewards is not None:  # the forward that says what the values were is this one
                returns = gae(part.rewards, before, part.mask, self.config.gamma, self.config.lam)[1]
                part = part._replace(values=before, returns=returns)
            critic, clipped = self.objective.critic_loss(values, part, minibatch)
            return critic, (critic, clipped, before)

        return self.value_trainer.step(loss, minibatch.micro_batches)

    def _ratio_is_sane(self, extras: list[Any]) -> bool:
        """Whether the minibatch's mean ratio is below ``ratio_threshold``."""
        if self.config.ratio_threshold is None:
            return True
        total = sum(float(extra.policy.ratio_sum) for extra in extras)
        count = sum(float(extra.policy.token_count) for extra in extras)
        return total / max(count, 1.0) <= self.config.ratio_threshold

    def _too_far(self, watched: Watched) -> bool:
        """Whether the policy has left the sampling policy by more than ``target_kl``."""
        statistics, target = watched.policy, self.config.target_kl
        return target is not None and float(statistics.approx_kl) > target * max(
            float(statistics.token_count), 1
        )

    # -- What a checkpoint keeps ----------------------------------------------------------------------

    @property
    def trainers(self) -> dict[str, ModelTrainer]:
        """Each optimiser with its module, by name."""
        both = {"policy": self.policy_trainer, "value": self.value_trainer}
        return {name: trainer for name, trainer in both.items() if trainer is not None}

    # -- Metrics --------------------------------------------------------------------------------------

    def _metrics(
        self, watched: Watched | None, reports: list[StepReport], value_reports: list[StepReport]
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if watched is not None:
            metrics |= self._policy_metrics(watched, reports)
            metrics |= _mismatch_metrics(_merge(reports[0]))
        if value_reports:
            metrics["value_grad_norm"] = _mean([r.grad_norm for r in value_reports])
            metrics["loss/value_avg"] = _mean([r.loss for r in value_reports])
            clipped = [sum(float(extra[1]) for extra in r.extras) for r in value_reports]
            metrics["val/clipfrac_avg"] = _mean(clipped)
        metrics["skipped_updates"] = float(sum(r.skipped for r in [*reports, *value_reports]))
        metrics["rejected_updates"] = float(sum(r.rejected for r in reports))
        return metrics | {"num_updates": float(len(reports))}

    def _policy_metrics(self, watched: Watched, reports: list[StepReport]) -> dict[str, float]:
        s, n = watched.policy, len(reports)
        count = max(float(s.token_count), 1.0)
        taken = [r for r in reports if not r.skipped] or reports  # a skipped step's numbers are not finite
        metrics = {
            "loss/policy_avg": _mean([float(_merge(r).policy_loss) for r in taken]),
            "grad_norm": _mean([r.grad_norm for r in taken]),
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
        first = _merge(reports[0]).policy
        metrics["first_minibatch/ratio_max"] = float(first.ratio_max)
        metrics["first_minibatch/approxkl"] = float(first.approx_kl) / max(float(first.token_count), 1.0)
        rows = max(float(watched.n_rows), 1.0)
        if kl_is_used(self.config) and self.kl_controller.value > 0:
            metrics["kl"] = float(watched.kl_k3) / count
            if self.config.kl_placement == "loss":
                metrics["objective/kl"] = float(watched.kl_k1) / rows
                metrics["objective/kl_per_token"] = float(watched.kl_k1) / count
                metrics["loss/kl_avg"] = float(watched.kl_term) / count
        if self.config.off_policy_mask_threshold is not None:
            metrics["off_policy/dropped_fraction"] = float(watched.n_dropped) / rows
        if self.value is not None and self.value.shared:
            metrics["loss/value_avg"] = float(watched.value_loss) / n
            metrics["val/clipfrac_avg"] = float(watched.value_clipped) / n
        return metrics


def _mismatch_metrics(first: Watched) -> dict[str, float]:
    """How far the sampler was from the trainer, token by token, before the first step on the batch."""
    s = first.mismatch
    if s is None or float(s.token_count) == 0:
        return {}
    count = float(s.token_count)
    return {
        "sampling/sampling_logp_difference/mean": float(s.abs_difference_sum) / count,
        "sampling/sampling_logp_difference/max": float(s.abs_difference_max),
        "sampling/importance_sampling_ratio/mean": float(s.weight_sum) / count,
        "sampling/importance_sampling_ratio/min": float(s.weight_min),
        "sampling/importance_sampling_ratio/max": float(s.weight_max),
        "sampling/effective_sample_size": float(effective_sample_size(s)),
    }


def _has_moved(reports: list[StepReport]) -> bool:
    """Whether any step so far changed the policy: one that was skipped or rejected did not."""
    return any(not (r.skipped or r.rejected) for r in reports)


def _merge(report: StepReport) -> Watched:
    """What the micro-batches of one step reported, together."""
    merged: Watched = report.extras[0]
    for extra in report.extras[1:]:
        merged = merged.merge(extra)
    return merged


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
