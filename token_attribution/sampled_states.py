"""Hidden states of the sampled tokens, from as few computed positions as will do.

Rows that sampled nothing are not computed; each distinct prompt is computed once, whatever the number of its
completions; rows of like length go through together, so that little of a pass is padding; and of what is computed
only the states from which a token was sampled are handed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from base_setup.backend import device_kind
from token_attribution import host_math
from token_attribution.host_attention import Grouping
from token_attribution.shared_prompts import ContinuedKeys, PromptSharing
from token_attribution.trunk import Trunk

#: What one more pass costs, in tokens: the same operations dispatched again, on smaller matrices.
_PASS_TOKENS = {"cpu": 32, "metal": 512, "cuda": 512}

_FILLED_UP = 1.5  # times as many rows as there are, where groups are of different sizes


class SampledStates(NamedTuple):
    """The state from which each sampled token was chosen."""

    rows: mx.array  # (N, D), in the order of the flattened mask
    positions: mx.array  # (N,) int32, where the flattened mask is True
    shape: tuple[int, int]  # (B, T)

    def back_in_place(self, x: mx.array) -> mx.array:
        """One number per sampled token, (N,), as (B, T) float32 with exact zeros elsewhere."""
        flat = mx.zeros(self.shape).reshape(-1)
        return flat.at[self.positions].add(x.astype(mx.float32)).reshape(self.shape)


def true_positions(mask: mx.array) -> mx.array:
    """Where the flattened mask is True: (N,) int32. It reads the mask's values, so it waits for them."""
    return mx.array(np.flatnonzero(np.array(mask)).astype(np.int32))


def picked_states(states: mx.array, mask: mx.array) -> SampledStates:
    """The same of states (B, T, D) that exist already."""
    positions = true_positions(mask)
    return SampledStates(
        states.reshape(-1, states.shape[-1])[positions], positions, (mask.shape[0], mask.shape[1])
    )


def sampled_states(trunk: Trunk, tokens: mx.array, mask: mx.array) -> SampledStates:
    """States at the True positions of ``mask``, differentiable in the trunk's weights.

    Args:
        trunk: the model's. tokens: (B, T+1) int32, right-padded.
        mask: (B, T) bool, its values known: an input, not a result of the function being differentiated. What a row
            holds before its first True position is its prompt; rows with equal prompts share its pass.
    """
    layout = _Layout(np.array(tokens), np.array(mask).astype(bool))
    positions = mx.array(layout.positions)
    shape = (mask.shape[0], mask.shape[1])
    if layout.positions.size == 0:
        return SampledStates(mx.zeros((0, 1)), positions, shape)
    parts, index = _shared(trunk, layout) if _worth_sharing(trunk, layout) else _plain(trunk, layout)
    states = parts[0] if len(parts) == 1 else mx.concatenate(parts)  # (M, D)
    if len(index) == states.shape[0] and (index == np.arange(len(index))).all():
        return SampledStates(states, positions, shape)
    return SampledStates(states[mx.array(index)], positions, shape)


class _Layout:
    """Where in each row prompt and completion lie. Only rows with a sampled token count, as 0 … R-1."""

    def __init__(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        live = np.flatnonzero(mask.any(axis=1))
        self.tokens, mask = tokens[live], mask[live]
        width = mask.shape[1]
        self.first = (
            mask.argmax(axis=1) if len(live) else np.zeros(0, dtype=np.int64)
        )  # (R,) of the True positions
        self.last = width - 1 - mask[:, ::-1].argmax(axis=1) if len(live) else self.first
        self.row, self.column = np.nonzero(mask)  # (N,) each
        self.positions = (live[self.row] * width + self.column).astype(np.int32)
        self.prompt = _numbered(self.tokens, self.first)  # (R,)
        _, self.one_row_of = np.unique(self.prompt, return_index=True)  # (prompts,)
        self.prompt_length = self.first[self.one_row_of] + 1


def prompt_numbers(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A number for each row, (B,), equal where rows have the same prompt; -1 for a row that sampled nothing."""
    live = mask.any(axis=1)
    numbers = np.full(len(tokens), -1)
    numbers[live] = _numbered(tokens[live], mask[live].argmax(axis=1))
    return numbers


def _numbered(tokens: np.ndarray, first: np.ndarray) -> np.ndarray:
    numbers: dict[bytes, int] = {}  # in order of appearance
    keys = [row[: n + 1].tobytes() for row, n in zip(tokens, first, strict=True)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _worth_sharing(trunk: Trunk, layout: _Layout) -> bool:
    """Whether each distinct prompt can be computed once, and fewer tokens are computed that way."""
    if trunk.sharing is None or len(layout.prompt_length) == len(layout.prompt):
        return False
    shared = int(layout.prompt_length.sum() + (layout.last - layout.first).sum())
    if shared + _pass_tokens() >= int((layout.last + 1).sum()):
        return False
    return trunk.sharing.ability.covers(int(layout.last.max()) + 1)


def _plain(trunk: Trunk, layout: _Layout) -> tuple[list[mx.array], np.ndarray]:
    """All of each row in one go: flat states, and where among them each sampled position stands."""
    parts: list[mx.array] = []
    start = np.zeros(len(layout.last), dtype=np.int64)  # of each row
    total = 0
    for rows in in_buckets(layout.last + 1, _pass_tokens()):
        width = int(layout.last[rows].max()) + 1
        states = trunk.hidden(mx.array(layout.tokens[rows, :width]))  # (b, W, D)
        parts.append(states.reshape(-1, states.shape[-1]))
        start[rows] = total + np.arange(len(rows)) * width
        total += len(rows) * width
    return parts, start[layout.row] + layout.column


def _shared(trunk: Trunk, layout: _Layout) -> tuple[list[mx.array], np.ndarray]:
    """Each prompt once, then the completions: flat states, and where among them each sampled position stands."""
    assert trunk.sharing is not None
    parts: list[mx.array] = []
    at_prompt = np.zeros(len(layout.prompt_length), dtype=np.int64)  # where each prompt's last state stands
    start = np.zeros(len(layout.prompt), dtype=np.int64)  # of each row's completion
    total = 0
    for prompts in _prompt_buckets(layout.prompt_length, trunk.sharing.ability.ragged):
        lengths = layout.prompt_length[prompts]
        width = int(lengths.max())
        tokens = layout.tokens[layout.one_row_of[prompts], :width]
        padded = np.where(np.arange(width) < lengths[:, None], tokens, 0)
        keys = trunk.sharing.new_keys()
        states = trunk.hidden(mx.array(padded), cache=keys)  # (n, P, D)
        flat = states.reshape(-1, states.shape[-1])
        parts.append(flat[mx.array(np.arange(len(prompts)) * width + lengths - 1)])
        at_prompt[prompts] = total + np.arange(len(prompts))
        total += len(prompts)
        place = np.full(len(layout.prompt_length), -1)
        place[prompts] = np.arange(len(prompts))
        members = np.flatnonzero((place[layout.prompt] >= 0) & (layout.last > layout.first))
        following = (
            layout.last - layout.first
        )  # (R,) completion tokens that are read: all but the last sampled
        for chosen in in_buckets(following[members], _pass_tokens()):
            rows = members[chosen]
            count = int(following[rows].max())
            columns = layout.first[rows, None] + 1 + np.arange(count)
            columns = np.minimum(columns, layout.tokens.shape[1] - 1)  # beyond a row's end anything will do
            which, length = place[layout.prompt[rows]], layout.prompt_length[layout.prompt[rows]]
            grouping = _grouping(trunk.sharing, which, len(prompts))
            caches = [ContinuedKeys(k, which, length, grouping) for k in keys]
            states = trunk.hidden(mx.array(layout.tokens[rows[:, None], columns]), cache=caches)  # (b, C, D)
            parts.append(states.reshape(-1, states.shape[-1]))
            start[rows] = total + np.arange(len(rows)) * count
            total += len(rows) * count
    first = layout.first[layout.row]
    return parts, np.where(
        layout.column == first,
        at_prompt[layout.prompt[layout.row]],
        start[layout.row] + layout.column - first - 1,
    )


def _grouping(sharing: PromptSharing, which: np.ndarray, prompts: int) -> Grouping | None:
    """The rows by prompt, if attention is to read each prompt once for all of its rows."""
    if not (host_math.usable() and sharing.takes_groups):
        return None
    grouping = Grouping(which, prompts)
    # A group that is smaller than the largest is filled up with rows that nobody asked for.
    return grouping if grouping.places <= _FILLED_UP * len(which) else None


def _prompt_buckets(lengths: np.ndarray, ragged: bool) -> Iterator[np.ndarray]:
    if ragged:
        yield from in_buckets(lengths, _pass_tokens())
    else:
        for length in np.unique(lengths):
            yield np.flatnonzero(lengths == length)


def in_buckets(lengths: np.ndarray, overhead: int) -> Iterator[np.ndarray]:
    """Index arrays that together are all of ``lengths``, split where that saves more padding than ``overhead``.

    Within a bucket the indices ascend, so that the order of rows does not depend on their lengths where it need not.
    """
    if len(lengths) == 0:
        return
    order = np.argsort(lengths, kind="stable")
    waiting = [order]
    while waiting:
        part = waiting.pop()
        ascending = lengths[part]
        saved = np.arange(1, len(part)) * (
            ascending[-1] - ascending[:-1]
        )  # by a cut behind each but the last
        if len(saved) and saved.max() > overhead:
            cut = int(saved.argmax()) + 1
            waiting += [part[cut:], part[:cut]]
        else:
            yield np.sort(part)


def _pass_tokens() -> int:
    return _PASS_TOKENS[device_kind()]
