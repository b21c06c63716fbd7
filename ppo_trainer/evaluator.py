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
    """Call the rewards with everything that rollouts know, dataset columns as keyword lists.

    As in TRL, a prompt that is a conversation arrives as its messages and its completion as the assistant's.
    """
    columns: dict[str, list[Any]] = {
        key: [r.prompt.columns.get(key) for r in rollouts]
        for key in dict.fromkeys(k for r in rollouts for k in r.prompt.columns)
    }
    if any(r.prompt.ending for r in rollouts):  # a template may open the thinking
        columns["prompt_ending"] = [r.prompt.ending for r in rollouts]
    return rewards.score(
        [r.prompt.text if r.prompt.messages is None else list(r.prompt.messages) for r in rollouts],
        [
            r.text if r.prompt.messages is None else [{"role": "assistant", "content": r.text}]
            for r in rollouts
        ],
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
            "extra": {name: values[i] for name, values in (scored.extra or {}).items()},
        }
        for i, r in enumerate(rollouts[:count])
    ]


def score_metrics(
    rewards: RewardSet, scored: ScoredBatch, groups: Sequence[int] | None = None
) -> dict[str, float]:
    """Mean and spread of the total and of each component over the rows they apply to, and how many those are.

    ``groups``: the group of each row, where they are to be compared with one another.
    """
    metrics = dict(scored.measured or {})  # first, so that no reward can overwrite a number of ours
    metrics |= {"reward": _mean(scored.total), "reward_std": _std(scored.total)}
    for name in rewards.names:
        values = scored.components[name]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = _std(values)
        metrics[f"rewards/{name}/applied"] = float(np.mean(~np.isnan(values))) if values.size else 0.0
        if groups is not None:
            metrics[f"rewards/{name}/frac_zero_std"] = _frac_without_spread(values, np.asarray(groups))
    metrics["reward_errors"] = float(np.sum(scored.failed)) if scored.failed is not None else 0.0
    return metrics


def _frac_without_spread(values: np.ndarray, groups: np.ndarray) -> float:
    """Share of the rows that a reward applies to in whose group it says one thing only; NaN for no rows."""
    applies = ~np.isnan(values)
    values, groups = values[applies].astype(np.float64), groups[applies]
    if not values.size:
        return float("nan")
    _, group = np.unique(groups, return_inverse=True)
    least, most = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
    np.minimum.at(least, group, values)
    np.maximum.at(most, group, values)
    return float(np.mean((most - least)[group] < 1e-8))


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
