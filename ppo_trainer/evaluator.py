"""How good is the policy now? The same prompts, the same random numbers, so that numbers can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.policy_model import FrozenPolicy
from ppo_trainer.generator import Generator
from rewards.composition import RewardSet
from rewards.scored_batch import ScoredBatch
from token_attribution.extractor import extract

#: Evaluation has random numbers of its own, so it never disturbs or repeats those of training steps.
EVALUATION_STEP = 1 << 31


def score_rollouts(rewards: RewardSet, rollouts: Sequence[Rollout]) -> ScoredBatch:
    """Call the rewards with everything that rollouts know, dataset columns as keyword lists."""
    columns: dict[str, list[Any]] = {
        key: [r.prompt.columns.get(key) for r in rollouts]
        for key in dict.fromkeys(k for r in rollouts for k in r.prompt.columns)
    }
    return rewards.score(
        [r.prompt.text for r in rollouts],
        [r.text for r in rollouts],
        **{
            **columns,
            "prompt_ids": [list(r.prompt.ids) for r in rollouts],
            "completion_ids": [list(r.completion_ids) for r in rollouts],
            "terminated": [r.terminated for r in rollouts],
        },
    )


def sample_records(rollouts: Sequence[Rollout], scored: ScoredBatch, count: int) -> list[dict[str, Any]]:
    """The first completions as plain records, each with its score and what the score is made of."""
    return [
        {
            "prompt": r.prompt.text,
            "completion": r.text,
            "score": float(scored.total[i]),
            "components": {name: float(values[i]) for name, values in scored.components.items()},
            "terminated": r.terminated,
            "n_tokens": len(r.completion_ids),
        }
        for i, r in enumerate(rollouts[:count])
    ]


def score_metrics(rewards: RewardSet, scored: ScoredBatch) -> dict[str, float]:
    """Mean and spread of the total and of each component, over the rows they apply to."""
    metrics = {"reward": _mean(scored.total), "reward_std": _std(scored.total)}
    for name in rewards.names:
        metrics[f"rewards/{name}/mean"] = _mean(scored.components[name])
        metrics[f"rewards/{name}/std"] = _std(scored.components[name])
    return metrics


def length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths in tokens, of all and of those that ended by themselves, and the share that was cut off."""
    lengths = [len(r.completion_ids) for r in rollouts]
    ended = [len(r.completion_ids) for r in rollouts if r.terminated]
    of_ended = {"completions/mean_terminated_length": float(np.mean(ended))} if ended else {}
    return {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([not r.terminated for r in rollouts])),
        **of_ended,
    }


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _std(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


class Evaluator:
    """Samples one completion per prompt, scores it, and measures how far the policy is from its reference."""

    def __init__(
        self, generator: Generator, rewards: RewardSet, reference: FrozenPolicy | None, config: PPOConfig
    ) -> None:
        self.generator = generator
        self.rewards = rewards
        self.reference = reference
        self.config = config

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Metrics over ``prompts`` and all samples.

        Returns:
            ``avg_reward`` (= ``reward``) and its components, ``objective/kl`` in nats per sequence (k1, at the
            training temperature) and ``completions/…``; ``samples``: one record per prompt.
        """
        rollouts = self.generator.generate(
            prompts, EVALUATION_STEP, group_size=1, temperature=self.config.eval_temperature
        )
        scored = score_rollouts(self.rewards, rollouts)
        metrics: dict[str, Any] = {**score_metrics(self.rewards, scored), **length_metrics(rollouts)}
        metrics["avg_reward"] = metrics["reward"]
        if self.reference is not None:
            metrics["objective/kl"] = self._kl(rollouts, self.reference)
        metrics["samples"] = sample_records(rollouts, scored, len(rollouts))
        return metrics

    def _kl(self, rollouts: Sequence[Rollout], reference: FrozenPolicy) -> float:
        size = self.config.micro_batch_size or self.config.rollout_batch_size
        total, policy, temperature = 0.0, self.generator.policy, self.config.temperature
        for start in range(0, len(rollouts), size):
            batch = extract(rollouts[start : start + size])
            difference = policy.logprobs(batch.tokens, batch.mask, temperature) - reference.logprobs(
                batch.tokens, batch.mask, temperature
            )
            total += float(mx.sum(difference))
        return total / len(rollouts)
