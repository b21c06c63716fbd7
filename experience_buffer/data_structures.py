"""The nouns of the pipeline.

Host-side records (``Prompt``, ``Rollout``) are frozen dataclasses of plain Python values. What goes
through the model (``TokenBatch``, ``Experience``) is a NamedTuple of arrays, because those are what
``mx.compile`` and ``tree_map`` take. One alignment everywhere: ``tokens`` is ``(B, T+1)``, prompt then
completion, right-padded; every per-token array is ``(B, T)`` and its index ``t`` is about predicting
``tokens[:, t+1]``; ``mask`` is True exactly where the policy sampled that token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx


@dataclass(frozen=True)
class Prompt:
    """One question to the policy. ``index`` names it in its data set, and so names its random numbers."""

    index: int
    text: str
    ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # further fields of its row, for rewards
    messages: tuple[Mapping[str, Any], ...] | None = None  # of a prompt that is a conversation
    ending: str = ""  # of a conversation: the last of what the policy reads, as the chat template leaves it


@dataclass(frozen=True)
class Rollout:
    """One sampled completion, in tokens, with what the sampler knew about it."""

    prompt: Prompt
    member: int  # which completion of its prompt's group
    completion_ids: tuple[int, ...]  # the end token included, when one was sampled
    logprobs: tuple[float, ...]  # of each token, under the distribution actually sampled from
    terminated: bool  # an end token was sampled; False: cut off at the length limit
    text: str  # decoded for rewards and readers; never encoded again


class TokenBatch(NamedTuple):
    """Rollouts as arrays. Made by ``token_attribution.extractor`` alone."""

    tokens: mx.array  # (B, T+1) int32, right-padded
    mask: mx.array  # (B, T) bool, True where the policy sampled tokens[:, t+1]
    sampler_logprobs: mx.array  # (B, T) float32, 0 where mask is False


class Experience(NamedTuple):
    """One batch of rollouts with everything the update needs; float32 unless said.

    ``old_logprobs`` is None when each batch is used for a single update: the ratio is then exactly 1
    and the update uses its own logprobs. ``values`` and ``returns`` are None without a critic,
    ``ref_logprobs`` where no KL is asked for.
    """

    tokens: mx.array  # (B, T+1) int32
    mask: mx.array  # (B, T) bool, True where there is something to learn
    advantages: mx.array  # (B, T) Â
    sampler_logprobs: mx.array  # (B, T) log μ, under the distribution sampled from
    old_logprobs: mx.array | None = None  # (B, T) log π_old, at the start of the update
    ref_logprobs: mx.array | None = None  # (B, T) log π_ref
    values: mx.array | None = None  # (B, T) V_old
    returns: mx.array | None = None  # (B, T) R, what the value network learns
    rewards: mx.array | None = None  # (B, T), where advantages and returns are still to be made of them

    @property
    def size(self) -> int:
        """Number of rows B."""
        return int(self.tokens.shape[0])

    def rows(self, indices: list[int]) -> Experience:
        """The experience of some rows, without the padding that they no longer need."""
        pick = mx.array(indices)
        mask = self.mask[pick]
        width = max(int(mx.max(mask * mx.arange(1, mask.shape[1] + 1))), 1)

        def cut(array: mx.array | None) -> mx.array | None:
            return None if array is None else array[pick, :width]

        return Experience(
            tokens=self.tokens[pick, : width + 1],
            mask=mask[:, :width],
            advantages=self.advantages[pick, :width],
            sampler_logprobs=self.sampler_logprobs[pick, :width],
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
            values=cut(self.values),
            returns=cut(self.returns),
            rewards=cut(self.rewards),
        )
