"""Sequences to arrays: the only place that pads, and the only one that knows where a prompt ends.

By example, two rows with prompts ``a b c`` and ``d``, completions ``x y`` and ``p q r``::

    tokens  a b c x y        mask (predicts the next token)   . . x x
            d p q r 0                                          p q r .

``tokens`` has one column more than ``mask``: ``mask[i, t]`` speaks of ``tokens[i, t + 1]``. Rows are padded
on the right, where causal attention never looks, so padding changes no real position's numbers. The
padding id is 0, which no mask ever lets through, so it may as well be a real token's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from experience_buffer.data_structures import Rollout, TokenBatch


def pad_sequences(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[mx.array, mx.array]:
    """Right-pad prompt + completion rows.

    Returns:
        tokens ``(B, T+1)`` int32 and mask ``(B, T)`` bool, True where the next token is of the completion.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt has no position to predict the first token of its completion")
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    width = max([*lengths, 2])  # at least one position to predict
    tokens = np.zeros((len(prompts), width), dtype=np.int32)
    mask = np.zeros((len(prompts), width - 1), dtype=bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : lengths[row]] = completion
        mask[row, len(prompt) - 1 : lengths[row] - 1] = True
    return mx.array(tokens), mx.array(mask)


def extract(rollouts: Sequence[Rollout]) -> TokenBatch:
    """Rollouts as one padded batch, each sampled token with the logprob it was sampled at."""
    tokens, mask = pad_sequences([r.prompt.ids for r in rollouts], [r.completion_ids for r in rollouts])
    sampler = np.zeros(mask.shape, dtype=np.float32)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt.ids) - 1
        sampler[row, start : start + len(rollout.logprobs)] = rollout.logprobs
    return TokenBatch(tokens, mask, mx.array(sampler))


def completion_mask(ids: mx.array, eos_ids: Iterable[int]) -> mx.array:
    """Which columns of sampled ids are part of the answer: up to and with the first end token.

    ``m_t = 1`` while no end token stands *before* t, so the end token itself is trained on; whether the
    padding id equals an end id makes no difference.

    Args:
        ids: ``(B, C)`` integer ids of completions. eos_ids: every id that ends one.
    Returns:
        ``(B, C)`` bool.
    """
    if ids.ndim != 2:
        raise ValueError(f"ids must be (B, C), got {ids.shape}")
    ends = mx.zeros(ids.shape, dtype=mx.bool_)
    for eos in eos_ids:
        ends = ends | (ids == eos)
    counts = ends.astype(mx.int32)
    return (mx.cumsum(counts, axis=1) - counts) == 0
