"""Raw scores to the scores that are learned from: scaling, limits, penalties for answers without an end."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Rollout
from reward_kl.reward_computer import apply_missing_end_penalty, clip_scores, overlong_penalty
from reward_kl.running_moments import RunningMoments


class ScoreShaper:
    """Owns the running moments of all raw scores so far; everything else is a function of the batch."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.moments = RunningMoments()

    def comparable(self, raw: mx.array) -> mx.array:
        """Scores ``(B,)`` at the scale and within the limits of :meth:`shape`, which has been called before."""
        config, scores = self.config, raw
        if config.score_scaling != "none":
            scores = self.moments.scale(scores, config.score_scaling)
        if config.score_clip is not None:
            scores = clip_scores(scores, -config.score_clip, config.score_clip)
        return scores

    def shape(self, raw: mx.array, rollouts: Sequence[Rollout]) -> mx.array:
        """Scores ``(B,)`` float32 in this order: running scale, clip, missing end, overlong.

        A NaN (no reward applies) stays NaN.
        """
        config, scores = self.config, raw
        if config.score_scaling != "none":
            self.moments.update(raw)  # the batch counts among those it is scaled by
        scores = self.comparable(raw)
        scorable = ~mx.isnan(raw)
        if config.missing_end_penalty > 0:
            terminated = mx.array([r.terminated for r in rollouts])
            scores = apply_missing_end_penalty(
                scores, terminated, config.missing_end_penalty, config.missing_end_mode
            )
        if config.overlong_buffer > 0 and config.overlong_penalty > 0:
            # A completion that ended in the very last slot is as long as one that was cut off there.
            lengths = mx.array([len(r.completion_ids) for r in rollouts])
            buffer = config.overlong_buffer * config.max_new_tokens
            scores = scores + overlong_penalty(
                lengths, config.max_new_tokens, buffer, config.overlong_penalty
            )
        return mx.where(scorable, scores, mx.nan)
