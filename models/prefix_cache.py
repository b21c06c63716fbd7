"""Keys and values of prompts, computed once per distinct prompt and shared by every completion of it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

_GROWTH = 64  # columns added at a time: few reallocations, little memory that is never used


class GroupCache:
    """One layer's keys and values while a batch of completions is decoded, in mlx-lm's cache protocol.

    Prompts are right-padded to the longest, P columns; completions follow from column P on, so all rows
    write the same column. A row's padding, between its own prompt's end and P, is masked out, and
    ``offset`` (a number where all prompts are equally long, else one per row) is its true position, so
    rotary positions and attention are those of the row alone.
    """

    def __init__(self, prompt: KVCache, lengths: list[int], rows: list[int]) -> None:
        """``prompt``: the filled cache of N prompts; ``lengths`` (N,); ``rows[b]``: the prompt of row b."""
        width = prompt.offset
        pick = mx.array(rows)
        keys, values = prompt.keys_and_values()  # (N, H, P, D)
        self.keys, self.values = keys[pick], values[pick]  # (B, H, P, D)
        self._prompt_width = width
        self._column = width
        ragged = len(set(lengths)) > 1
        self._lengths = mx.array([lengths[r] for r in rows]) if ragged else None  # (B,)
        self.offset: Any = self._lengths if ragged else lengths[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append one column per row; all columns so far come back, each (B, H, L, D)."""
        start, stop = self._column, self._column + keys.shape[2]
        if stop > self.keys.shape[2]:
            grow = [(0, 0), (0, 0), (0, max(_GROWTH, keys.shape[2])), (0, 0)]
            self.keys, self.values = mx.pad(self.keys, grow), mx.pad(self.values, grow)
        self.keys[..., start:stop, :] = keys
        self.values[..., start:stop, :] = values
        self._column = stop
        self.offset = self.offset + keys.shape[2]
        return self.keys[..., :stop, :], self.values[..., :stop, :]

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        """Which columns the next token may see: (B, 1, 1, L) bool, or None for all of them."""
        if n != 1:
            raise ValueError(f"a GroupCache decodes one token at a time, not {n}")
        if self._lengths is None and window_size is None and not return_array:
            return None
        columns = mx.arange(self._column + 1)[None]  # (1, L)
        lengths = self._lengths[:, None] if self._lengths is not None else mx.array([[self._prompt_width]])
        in_prompt = columns < self._prompt_width
        position = mx.where(in_prompt, columns, columns - self._prompt_width + lengths)  # (B, L)
        seen = ~in_prompt | (columns < lengths)
        if window_size is not None:
            newest = lengths + (self._column - self._prompt_width)
            seen = seen & (newest < position + window_size)
        return seen[:, None, None, :]

    def keep(self, rows: mx.array) -> None:
        """Drop the rows that are not named."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        if self._lengths is not None:
            self._lengths, self.offset = self._lengths[rows], self.offset[rows]


class RepeatedCache:
    """The same for architectures whose caches are not plain keys and values (sliding, recurrent).

    It wraps mlx-lm's own cache of N equally long prompts and picks the batch rows of its state.
    """

    def __init__(self, prompt: Any, rows: list[int]) -> None:
        self.cache = prompt
        self.keep(mx.array(rows))

    def keep(self, rows: mx.array) -> None:
        """Drop or repeat rows, by index."""
        self.cache.state = _pick(self.cache.state, rows)


def _pick(state: Any, rows: mx.array) -> Any:
    if isinstance(state, mx.array):
        return state[rows] if state.ndim else state
    if isinstance(state, (list, tuple)):
        return type(state)(_pick(part, rows) for part in state)
    return state


def has_plain_caches(caches: list[Any]) -> bool:
    """Whether every layer keeps plain keys and values."""
    return all(type(cache) is KVCache for cache in caches)


def shares_ragged_prompts(model: nn.Module) -> bool:
    """Whether prompts of different lengths can be decoded together, tried out on two tiny ones.

    The caches must be plain, and attention must heed a mask per row, which a few architectures do not
    (gemma2 gives its scores a fifth axis, older ones make their own mask).
    """
    caches = make_prompt_cache(model)
    if not has_plain_caches(caches):
        return False
    long, short, following = [0, 1, 2, 3], [2], 1
    model(mx.array([long, short + [0] * 3]), cache=caches)
    shared = [GroupCache(cache, [4, 1], [0, 1]) for cache in caches]
    try:
        together = model(mx.array([[following]] * 2), cache=shared)[:, -1].astype(mx.float32)
        mx.eval(together)
    except (ValueError, TypeError, AttributeError):
        return False
    alone = [model(mx.array([[*prompt, following]]))[0, -1].astype(mx.float32) for prompt in (long, short)]
    difference = mx.mean(mx.abs(together - mx.stack(alone)))
    # 16-bit rounding comes to a hundredth of the logits' spread; a token that should be hidden, to a fifth or more.
    return bool(difference < 0.05 * mx.std(mx.stack(alone)))
