"""Keys and values of prompts, computed once per distinct prompt and shared by every completion of it.

A batch is decoded in a buffer of rows and columns: the prompts on the left, then the columns that completions are
written to. A step writes one column, the same for all rows, so that it is a slice and nothing is copied. Who sees
which column is a mask; positions were turned into the keys already, so the order of columns means nothing, and a
column that no row needs any more is written again. Rows therefore come and go while others decode, and the buffer is
as wide as the longest completion of those present.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from base_setup.backend import device_kind
from token_attribution import host_kernels, host_math
from token_attribution.host_attention import Grouping, SharedPast
from token_attribution.trunk import Trunk

_GROWTH = 64  # columns added at a time: few reallocations, little memory that is never used
_WORTH_SHARING = 1 << 18  # numbers read again in a step of a layer: a megabyte, some 0.1 ms
_NARROW = 3 / 4  # prompts' columns are given back when those present need less than this of them


class Columns:
    """Which row sees which column of the buffer: what the caches of all layers share.

    Times are steps, counted from the first one of the batch. All of it is the host's, and small.
    """

    def __init__(self) -> None:
        self.prompt_width = 0  # P, of the longest prompt present
        self.width = 0  # completion columns in use, the next step's among them
        self.column = -1  # what the next step writes, counted from P
        self.offset: Any = 0  # the position of each row's next token: a number where all agree, else (n,)
        self._lengths = np.zeros(0, dtype=np.int64)  # (n,) of each row's prompt
        self._born = np.zeros(0, dtype=np.int64)  # (n,) its first step
        self._live = np.zeros(0, dtype=bool)  # (n,) False: has ended, and is still carried along
        self._written = np.zeros(0, dtype=np.int64)  # when each column was last written
        self._now = 0
        self._prompt_of = np.zeros(0, dtype=np.int64)  # (n,) each row's, among the prompts present
        self._prompts: list[int] = []  # those present, by number
        self.new_prompts: list[int] = []  # of the rows that entered last, those that brought a prompt along
        self.staying_prompts: np.ndarray | None = (
            None  # of the prompts before rows left last; None: all of them
        )
        self._grouping: Grouping | None = None
        self._masks: dict[tuple[int | None, bool], mx.array | None] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    def enter(self, lengths: list[int], prompts: list[int] | None = None) -> None:
        """Rows with prompts of these lengths come in, below those that are there.

        ``prompts``: their numbers, where rows share them.
        """
        first_new = len(self._prompts)
        for prompt in prompts or []:
            if prompt not in self._prompts:
                self._prompts.append(prompt)
        places = [self._prompts.index(prompt) for prompt in prompts or []]
        self.new_prompts = [places.index(place) for place in range(first_new, len(self._prompts))]
        self._prompt_of, self._grouping = np.append(self._prompt_of, places).astype(np.int64), None
        self._lengths = np.append(self._lengths, lengths)
        self._born = np.append(self._born, [self._now] * len(lengths))
        self._live = np.append(self._live, [True] * len(lengths))
        needed = int(self._lengths.max())
        if needed > self.prompt_width or needed < _NARROW * self.prompt_width:
            self.prompt_width = needed

    def keep(self, order: np.ndarray) -> None:
        """From now on row i is what row ``order[i]`` was."""
        self._lengths, self._born = self._lengths[order], self._born[order]
        self._live = self._live[order]
        if not self._prompts:
            return
        present, self._prompt_of = np.unique(self._prompt_of[order], return_inverse=True)
        self.staying_prompts = present if len(present) < len(self._prompts) else None
        self._prompts = [self._prompts[place] for place in present]
        self._grouping = None

    @property
    def all_prompts_are_new(self) -> bool:
        """Whether nobody is left of the rows that were there before others entered last."""
        return len(self.new_prompts) == len(self._prompts)

    @property
    def grouping(self) -> Grouping:
        """Which of the prompts present each row continues."""
        if self._grouping is None:
            self._grouping = Grouping(self._prompt_of, len(self._prompts))
        return self._grouping

    def retire(self, rows: np.ndarray) -> None:
        """What these rows compute does not matter any more."""
        self._live[rows] = False

    def advance(self) -> None:
        """Begin a step: choose its column, and find the positions of its tokens."""
        oldest = self._born[self._live].min()
        free = np.flatnonzero(self._written < oldest)
        if not len(free):
            free = np.array([len(self._written)])
            self._written = np.append(self._written, np.full(_GROWTH, -1))
        self.column = int(free[0])
        self._written[self.column] = self._now
        self.width = int(np.flatnonzero(self._written >= oldest)[-1]) + 1
        # Rows that have ended stay at the start: they would run over the model's last position.
        positions = self._lengths + np.where(self._live, self._now - self._born, 0)  # (n,)
        agreed = np.unique(positions[self._live])
        self.offset = int(agreed[0]) if len(agreed) == 1 else mx.array(positions.astype(np.int32))
        self._masks = {}
        self._now += 1

    def mask(self, window: int | None = None, always: bool = False) -> mx.array | None:
        """Which columns this step's tokens may see: ``(n, 1, 1, P + width)`` bool, or None for all of them.

        ``(1, 1, 1, P + width)`` where it is the same for every row: not all models can take more. ``always``: not None.
        """
        if (window, always) not in self._masks:
            seen = self._seen(window)
            live = seen[self._live]
            if (live == live[0]).all():
                seen = live[:1]
            self._masks[window, always] = (
                None if seen.all() and not always else mx.array(seen[:, None, None, :])
            )
        return self._masks[window, always]

    def _seen(self, window: int | None) -> np.ndarray:
        lengths, born = self._lengths[:, None], self._born[:, None]
        prompt = np.arange(self.prompt_width)[None]  # (1, P)
        written = self._written[None, : self.width]  # (1, W)
        seen = np.concatenate([prompt < lengths, written >= born], axis=1)  # (n, P + W)
        if window is not None:
            position = np.concatenate([prompt + 0 * lengths, written - born + lengths], axis=1)
            newest = lengths + self._now - 1 - born  # (n, 1)
            seen &= newest < position + window
        return seen


class GroupCache:
    """One layer's keys and values while completions are decoded, in mlx-lm's cache protocol."""

    def __init__(self, columns: Columns, rows: int) -> None:
        """``rows``: how many there are at most at a time."""
        self._columns, self._rows = columns, rows
        self._prompt_width = 0  # as the buffer has it
        self.keys = self.values = mx.zeros((0,))  # (rows, H, P + columns, D), from the first prompt on

    @property
    def offset(self) -> Any:
        """The position of the next token: a number, or one per row."""
        return self._columns.offset

    def enter(self, prompt: KVCache, picks: list[int]) -> None:
        """Append rows; ``picks[i]``: which of the filled cache's prompts the i-th is of. Columns know them already."""
        keys, values = prompt.keys_and_values()  # (N, H, P', D)
        if not self._prompt_width:
            self._prompt_width = self._columns.prompt_width
            columns = self._prompt_width + _GROWTH
            self.keys, self.values = (
                mx.zeros((self._rows, x.shape[1], columns, x.shape[3]), x.dtype) for x in (keys, values)
            )
        self.keys, self.values = self._fitted(self.keys), self._fitted(self.values)
        self._prompt_width = self._columns.prompt_width
        stop, width = len(self._columns), min(keys.shape[2], self._prompt_width)
        rows, pick = slice(stop - len(picks), stop), mx.array(picks)
        self.keys[rows, :, :width] = keys[pick, :, :width]
        self.values[rows, :, :width] = values[pick, :, :width]

    def _fitted(self, x: mx.array) -> mx.array:
        """The buffer with as many columns for prompts as they need now."""
        old, new = self._prompt_width, self._columns.prompt_width
        if new > old:
            more = mx.zeros((*x.shape[:2], new - old, x.shape[3]), x.dtype)
            return mx.concatenate([x[:, :, :old], more, x[:, :, old:]], axis=2)
        return x if new == old else mx.concatenate([x[:, :, :new], x[:, :, old:]], axis=2)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write this step's column; all columns in use come back, each (n, H, L, D)."""
        columns = self._columns
        n, at, stop = len(columns), self._prompt_width + columns.column, self._prompt_width + columns.width
        if stop > self.keys.shape[2]:
            grow = [(0, 0), (0, 0), (0, _GROWTH), (0, 0)]
            self.keys, self.values = mx.pad(self.keys, grow), mx.pad(self.values, grow)
        self.keys[:n, :, at : at + 1] = keys
        self.values[:n, :, at : at + 1] = values
        return self.keys[:n, :, :stop], self.values[:n, :, :stop]

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        """Which columns the next token may see: (n, 1, 1, L) bool, or None for all of them."""
        if n != 1:
            raise ValueError(f"a GroupCache decodes one token at a time, not {n}")
        return self._columns.mask(window_size, always=return_array)

    def keep(self, order: np.ndarray) -> None:
        """From now on row i is what row ``order[i]`` was: only those that move are copied."""
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            to, source = mx.array(moved), mx.array(order[moved])
            keys, values = self.keys[source], self.values[source]
            if device_kind() == "cpu":  # read before they are written to, or MLX copies the whole buffer
                mx.eval(keys, values)
            self.keys[to], self.values[to] = keys, values


class SharedCache(GroupCache):
    """The same with each prompt's keys and values there once, however many rows continue it.

    What it gives out are the rows' own columns; ``host_kernels.attention_with_cache`` looks up :attr:`past` besides.
    """

    def __init__(self, columns: Columns, rows: int) -> None:
        super().__init__(columns, rows)
        self._past: tuple[mx.array, mx.array] | None = None  # (N, H, P, D), (N, H, P, E)

    @property
    def past(self) -> SharedPast:
        """The prompts, and who continues them."""
        assert self._past is not None
        return SharedPast(*self._past, self._columns.grouping)

    def enter(self, prompt: KVCache, picks: list[int]) -> None:
        """As above; of each prompt that is there already nothing is taken."""
        columns = self._columns
        keys, values = prompt.keys_and_values()
        if self._past is None:
            shapes = ((self._rows, x.shape[1], _GROWTH, x.shape[3]) for x in (keys, values))
            self.keys, self.values = (mx.zeros(shape, keys.dtype) for shape in shapes)
        new = mx.array([picks[i] for i in columns.new_prompts], dtype=mx.int32)
        width = columns.prompt_width
        taken = [_as_wide(x[new], width) for x in (keys, values)]
        if self._past is not None and not columns.all_prompts_are_new:
            taken = [
                mx.concatenate([_as_wide(old, width), x]) for old, x in zip(self._past, taken, strict=True)
            ]
        self._past = taken[0], taken[1]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write this step's column; the rows' own columns in use come back, each (n, H, W, D)."""
        own = super().update_and_fetch(keys, values)
        return own if host_kernels.installed() else self.past.before(*own)

    def keep(self, order: np.ndarray) -> None:
        """As above; a prompt that nobody continues any more goes too."""
        super().keep(order)
        staying = self._columns.staying_prompts
        if staying is not None and self._past is not None:
            keys, values = self._past
            self._past = keys[mx.array(staying)], values[mx.array(staying)]


def _as_wide(x: mx.array, width: int) -> mx.array:
    """``(N, H, P, D)`` with this many columns in place of P."""
    missing = width - x.shape[2]
    return x[:, :, :width] if missing <= 0 else mx.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)])


class RepeatedCache:
    """The same for architectures whose caches are not plain keys and values (sliding, recurrent).

    It wraps mlx-lm's own cache of N equally long prompts and picks the batch rows of its state.
    """

    def __init__(self, prompt: Any, picks: list[int]) -> None:
        self.cache = prompt
        self.keep(np.array(picks))

    def keep(self, order: np.ndarray) -> None:
        """Drop or repeat rows, by index."""
        self.cache.state = _pick(self.cache.state, mx.array(order))


def _pick(state: Any, rows: mx.array) -> Any:
    if isinstance(state, mx.array):
        return state[rows] if state.ndim else state
    if isinstance(state, (list, tuple)):
        return type(state)(_pick(part, rows) for part in state)
    return state


def has_plain_caches(caches: list[Any]) -> bool:
    """Whether every layer keeps plain keys and values."""
    return all(type(cache) is KVCache for cache in caches)


def lead_of(caches: list[KVCache], width: int) -> int:
    """Columns that a soft prompt takes before prompts padded to ``width`` tokens, in caches that hold just these."""
    return int(caches[0].offset) - width if caches else 0


def shares_ragged_prompts(model: nn.Module) -> bool:
    """Whether prompts of different lengths can be decoded together, tried out on two tiny ones.

    The caches must be plain, and attention must heed a mask per row, which a few architectures do not
    (gemma2 gives its scores a fifth axis, older ones make their own mask). Rows that enter while others decode need
    the same two things.
    """
    if not has_plain_caches(make_prompt_cache(model)):
        return False
    return _decodes(model, model, GroupCache, [[0, 1, 2, 3], [2]])


def cache_for(
    model: nn.Module, trunk: Trunk | None, prompts: list[KVCache], repeated: int
) -> type[GroupCache]:
    """The cache to decode with after these: on CPU one that shares prompts among rows, if it may and that pays.

    ``repeated``: columns that a layer would otherwise read more than once in a step. Whether it may is tried out.
    """
    if trunk is None or not host_math.usable() or not prompts:
        return GroupCache
    keys, values = prompts[0].keys_and_values()
    numbers = repeated * sum(x.shape[1] * x.shape[3] for x in (keys, values))
    if {keys.dtype, values.dtype} != {mx.float32} or numbers < _WORTH_SHARING:
        return GroupCache
    key = trunk.sharing or trunk.hidden
    if key not in _tried:
        _tried[key] = _decodes(model, trunk.hidden, SharedCache, [[0, 1, 2, 3], [2, 1, 3, 0]])
    return SharedCache if _tried[key] else GroupCache


_tried: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _decodes(
    model: nn.Module, forward: Callable[..., mx.array], kind: type[GroupCache], prompts: list[list[int]]
) -> bool:
    """Whether a step after two tiny prompts, decoded side by side, comes out as from a forward without a cache."""
    width, following = max(map(len, prompts)), 1
    filled = make_prompt_cache(model)
    forward(mx.array([prompt + [0] * (width - len(prompt)) for prompt in prompts]), cache=filled)
    columns = Columns()
    rows = [1, 0, 1]
    lead = lead_of(filled, width)
    columns.enter([lead + len(prompts[row]) for row in rows], rows)
    caches = [kind(columns, len(rows)) for _ in filled]
    for cache, prompt in zip(caches, filled, strict=True):
        cache.enter(prompt, rows)
    columns.advance()
    try:
        together = forward(mx.array([[following]] * len(rows)), cache=caches)[:, -1].astype(mx.float32)
        mx.eval(together)
    except (ValueError, TypeError, AttributeError):
        return False
    alone = mx.stack([forward(mx.array([[*prompts[i], following]]))[0, -1].astype(mx.float32) for i in rows])
    # 16-bit rounding comes to a hundredth of the spread; a token that should be hidden, to a fifth or more.
    return bool(mx.mean(mx.abs(together - alone)) < 0.05 * mx.std(alone))
