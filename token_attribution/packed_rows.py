"""Several sequences in one row, none of which sees another: less padding, the same numbers.

Attention is block-diagonal. Positions run on through a row: with rotary embeddings attention knows differences of
positions alone, and within a sequence these are what they would be in a row of its own. Where an architecture does
otherwise (learned positions, a recurrent state), a test drive notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from token_attribution.shared_prompts import PromptKeys
from token_attribution.trunk import Trunk

_SHORT_WINDOW = 64  # a sliding window that the test drive can look beyond


class PackedKeys(PromptKeys):
    """One layer's cache in mlx-lm's protocol: it keeps nothing, and its mask keeps the sequences of a row apart."""

    def __init__(self, segments: mx.array) -> None:
        """``segments`` (B, T): a number for each token's sequence."""
        super().__init__()
        self._segments = segments

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Hand them back."""
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """(B, 1, T, T) bool: the same sequence, not later, and within the window if there is one."""
        own, other = mx.arange(n)[:, None], mx.arange(n)[None]
        seen = (self._segments[:, :, None] == self._segments[:, None, :]) & (other <= own)  # (B, T, T)
        if window_size is not None:
            seen = seen & (own < other + window_size)
        return seen[:, None]


def packed_hidden(trunk: Trunk, layers: int, tokens: mx.array, segments: mx.array) -> mx.array:
    """States (B, T, D) of packed tokens (B, T)."""
    caches = [PackedKeys(segments) for _ in range(layers)]
    return trunk.hidden(tokens, cache=caches)


def can_pack(model: nn.Module, trunk: Trunk | None) -> bool:
    """Whether sequences that share a row come out as they do alone. The model must be in evaluation mode."""
    if trunk is None:
        return False
    kinds = make_prompt_cache(model)
    if not all(type(kind) in (KVCache, RotatingKVCache) for kind in kinds):
        return False  # a recurrent state, or keys that are packed in some way
    windows = [int(kind.max_size) for kind in kinds if isinstance(kind, RotatingKVCache)]
    longest = 5 + min([window for window in windows if window <= _SHORT_WINDOW], default=0)
    lengths = [3, longest, 2]
    tokens = (np.arange(sum(lengths)) * 7 + 1) % 5
    segments = np.repeat(np.arange(len(lengths)), lengths)
    try:
        packed = packed_hidden(trunk, len(kinds), mx.array(tokens)[None], mx.array(segments)[None])[0]
        alone = [trunk.hidden(mx.array(tokens[segments == i])[None])[0] for i in range(len(lengths))]
        apart = mx.concatenate(alone).astype(mx.float32)
        packed = packed.astype(mx.float32)
        mx.eval(packed, apart)
    except (ValueError, TypeError, AttributeError, IndexError):
        return False
    # 16-bit rounding comes to a hundredth of the states' spread; a token wrongly seen, to far more.
    return bool(mx.mean(mx.abs(packed - apart)) < 0.05 * mx.std(apart))


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which sequences go into which row of at most ``capacity`` tokens: longest first, into the first that has room.

    First-fit decreasing needs at most 11/9 of the fewest rows possible, and one more.

    >>> fill_rows([3, 6, 4, 5], 9)
    [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((row for row, left in enumerate(room) if left >= lengths[i]), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows
