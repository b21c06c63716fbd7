"""Sampling completions, many rows at once: tokens in, tokens and their logprobs out.

Each distinct prompt is computed once and its cache is shared by its completions; rows leave the batch
when they end; the next step is launched before the last one is read, so the host never stands in the
way. A row's random numbers are handed in, one per token, so that a completion depends on nothing that
happens to be decoded beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from models.prefix_cache import GroupCache, RepeatedCache, has_plain_caches, shares_ragged_prompts
from models.sampling import LogitChanges, Sampling, check_sampling, draw, sampling_weights
from token_attribution.trunk import Trunk, find_trunk

_COMPACT_SHARE = 1 / 8  # rows are dropped when this share of the batch is done: copying the cache costs too


class Completion(NamedTuple):
    """One sampled completion."""

    ids: list[int]  # the end token included
    logprobs: list[float]  # under the distribution sampled from
    terminated: bool


def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    uniforms: np.ndarray,
    *,
    end_ids: frozenset[int],
    max_new_tokens: int,
    sampling: Sampling,
    trunk: Trunk | None = None,
) -> list[Completion]:
    """Sample one completion for each row.

    Args:
        model: an mlx-lm model. prompts: token ids of the distinct prompts, none empty.
        rows: the prompt of each row. uniforms: ``(B, max_new_tokens)``, see :func:`uniforms_for`.
        end_ids: tokens that end a completion (they are kept in it).
        trunk: ``find_trunk(model)``, if the caller has it already.
    Returns:
        One :class:`Completion` per row, in the order of ``rows``.
    """
    _check(sampling, uniforms, len(rows), max_new_tokens)
    trunk = trunk or find_trunk(model)
    done: dict[int, Completion] = {}
    for batch in _batches(model, prompts, rows):
        done.update(_decode(model, trunk, prompts, rows, batch, uniforms, end_ids, max_new_tokens, sampling))
    return [done[row] for row in range(len(rows))]


def _check(sampling: Sampling, uniforms: np.ndarray, rows: int, max_new_tokens: int) -> None:
    """Refuse what would be sampled from wrongly without a word: MLX reads past the end of an array."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but it is {max_new_tokens}")
    if uniforms.shape[0] != rows or uniforms.shape[1] < max_new_tokens:
        raise ValueError(
            f"uniforms {uniforms.shape} must be ({rows}, {max_new_tokens}): one per row and token"
        )
    check_sampling(sampling)


def _batches(model: nn.Module, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[list[int]]:
    """Row numbers that can be decoded together."""
    if len({len(prompts[prompt]) for prompt in rows}) == 1 or shares_ragged_prompts(model):
        return [list(range(len(rows)))]
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(rows):
        by_length.setdefault(len(prompts[prompt]), []).append(row)
    return list(by_length.values())


def _prefill(
    model: nn.Module, trunk: Trunk | None, prompts: list[Sequence[int]], rows: list[int]
) -> tuple[list[GroupCache] | list[RepeatedCache], mx.array]:
    """Caches for ``rows`` and the logits ``(B, V)`` of their first token, each prompt computed once."""
    lengths = [len(p) for p in prompts]
    padded = np.zeros((len(prompts), max(lengths)), dtype=np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt)] = prompt
    caches: list[Any] = make_prompt_cache(model)
    last = mx.array(lengths)[:, None, None] - 1
    tokens = mx.array(padded)
    if trunk is not None:
        states = trunk.hidden(tokens, cache=caches)  # (N, P, D)
        logits = trunk.head(mx.take_along_axis(states, last, axis=1))[:, 0]  # (N, V)
    else:
        logits = mx.take_along_axis(model(tokens, cache=caches), last, axis=1)[:, 0]
    first = logits[mx.array(rows)]
    if has_plain_caches(caches):
        return [GroupCache(c, lengths, rows) for c in caches], first
    return [RepeatedCache(c, rows) for c in caches], first


def _on_host(step: tuple[mx.array, mx.array]) -> tuple[list[int], list[float]]:
    """One step's tokens and logprobs as Python numbers: the one synchronisation per step."""
    return cast(list[int], step[0].tolist()), cast(list[float], step[1].tolist())


def _decode(
    model: nn.Module,
    trunk: Trunk | None,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    batch: list[int],
    uniforms: np.ndarray,
    end_ids: frozenset[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> dict[int, Completion]:
    distinct = sorted({rows[row] for row in batch})
    place = {prompt: i for i, prompt in enumerate(distinct)}
    caches, logits = _prefill(
        model, trunk, [prompts[p] for p in distinct], [place[rows[row]] for row in batch]
    )
    layers = [c.cache if isinstance(c, RepeatedCache) else c for c in caches]
    noise = mx.array(uniforms[batch])  # (B, C)
    changes: LogitChanges | None = None
    if sampling.changes_logits:
        changes = LogitChanges(sampling, [list(prompts[rows[row]]) for row in batch], logits.shape[-1])

    def step(logits: mx.array, column: int) -> tuple[mx.array, mx.array]:
        if changes is not None:
            logits = changes.apply(logits)
        if sampling.temperature == 0:
            tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
            logprobs = mx.zeros(tokens.shape)
        else:
            tokens, logprobs = draw(sampling_weights(logits, sampling), noise[:, column])
        if changes is not None:
            changes.append(tokens)
        # Asynchronous: the host reads this step's tokens while the next step runs.
        mx.async_eval(tokens, logprobs)
        return tokens, logprobs

    ids: dict[int, list[int]] = {row: [] for row in batch}
    logprobs: dict[int, list[float]] = {row: [] for row in batch}
    ended: set[int] = set()
    alive = list(batch)
    newest = step(logits, 0)
    for column in range(max_new_tokens):
        following = None
        if column + 1 < max_new_tokens:
            following = step(model(newest[0][:, None], cache=layers)[:, -1], column + 1)
        for row, token, logprob in zip(alive, *_on_host(newest), strict=True):
            if row not in ended:
                ids[row].append(token)
                logprobs[row].append(logprob)
                if token in end_ids:
                    ended.add(row)
        if following is None or len(ended) == len(batch):
            break
        newest = following
        keep = [i for i, row in enumerate(alive) if row not in ended]
        if len(alive) - len(keep) >= max(1, _COMPACT_SHARE * len(alive)):
            pick = mx.array(keep)
            for cache in caches:
                cache.keep(pick)
            if changes is not None:
                changes.keep(pick)
            newest, noise = (newest[0][pick], newest[1][pick]), noise[pick]
            alive = [alive[i] for i in keep]
    return {row: Completion(ids[row], logprobs[row], row in ended) for row in batch}
