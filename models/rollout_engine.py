"""Continuous batching: rows are decoded side by side, leave when they end, and waiting ones take their places.

On a GPU the next step is launched before the last one is read, so the host never stands in the way; on CPU the host
is what computes, and a token is known before the next step begins. Either way all rows of a step are read at once,
and no Python runs per row but when one enters or has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from models.completions import Completion, Completions
from models.prefix_cache import (
    Columns,
    RepeatedCache,
    cache_for,
    has_plain_caches,
    lead_of,
    shares_ragged_prompts,
)
from token_attribution.trunk import Trunk

#: Rows that have ended are dropped, and waiting ones come in, when they are this share of the batch, or of the places:
#: on a GPU, to which a row is next to nothing and a pause is not. On CPU each row costs time, and places are filled at
#: once: up to a quarter more tokens per second than with an eighth of them left free at times.
_DROP_SHARE = 1 / 8
_REFILL_SHARE = 1 / 8


class Sampler(Protocol):
    """Draws tokens: see ``HostSampler`` and ``DeviceSampler``."""

    lag: int  # how many steps may be launched before the oldest is read

    def draw(self, logits: mx.array, rows: np.ndarray, columns: np.ndarray) -> tuple[Any, Any]:
        """Token ``columns[i]`` of row ``rows[i]`` from ``logits[i]``: ids and logprobs, each ``(n,)``."""


class _Prefill(NamedTuple):
    """Prompts that were computed together."""

    caches: list[Any]
    logits: mx.array  # (N, V) of the first token
    places: dict[int, int]  # prompt -> its index among the N
    lead: int  # columns of plain caches before each prompt's first token: a soft prompt's


class _Launched(NamedTuple):
    """A step that may not be read yet."""

    rows: np.ndarray  # (n,)
    columns: np.ndarray  # (n,)
    tokens: Any  # (n,)
    logprobs: Any  # (n,)


@dataclass
class Engine:
    """One call of ``models.decoding.complete``, which says what the arguments are. Used once."""

    model: nn.Module
    trunk: Trunk | None
    prompts: Sequence[Sequence[int]]
    rows: Sequence[int]
    places: int
    end_ids: frozenset[int]
    max_new_tokens: int
    new_sampler: Callable[[int], Sampler]  # vocabulary -> sampler
    on_done: Callable[[int, Completion], None] | None = None

    _sampler: Sampler | None = None
    _columns: Columns = field(default_factory=Columns)
    _caches: list[Any] = field(default_factory=list)
    _prefilled: dict[int, _Prefill] = field(default_factory=dict)  # prompts of which rows are still waiting
    _launched: deque[_Launched] = field(default_factory=deque)
    _ended: list[int] = field(default_factory=list)  # rows that nobody was told about yet
    _done: dict[int, Completion] = field(default_factory=dict)

    def run(self) -> list[Completion]:
        """Decode all rows."""
        self._completions = Completions(len(self.rows), self.max_new_tokens, self.end_ids)
        for waiting in self._waves():
            self._decode(waiting)
        return [self._done[row] for row in range(len(self.rows))]

    def _waves(self) -> Iterator[deque[int]]:
        """Rows that can be decoded together, waves one after another.

        One wave where rows may come and go; else each has prompts of one length, and its rows enter together.
        """
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(self.rows):
            by_length.setdefault(len(self.prompts[prompt]), []).append(row)
        at_once = len(by_length) == 1 and len(self.rows) <= self.places
        if at_once or shares_ragged_prompts(self.model):
            yield deque(range(len(self.rows)))
            return
        for rows in by_length.values():
            for start in range(0, len(rows), self.places):
                yield deque(rows[start : start + self.places])

    def _decode(self, waiting: deque[int]) -> None:
        self._columns, self._caches, self._prefilled = Columns(), [], {}
        self._slots = np.zeros(0, dtype=np.int64)  # (n,) the rows being decoded, in the order of the caches
        self._drawn = np.zeros(0, dtype=np.int64)  # (n,) how many tokens each has
        self._tokens = mx.zeros((0,), dtype=mx.int32)  # (n,) the newest of each
        while True:
            self._drop_ended()
            while self._has_room_for(waiting):
                self._enter(waiting)
                self._drop_ended()  # the first token can be the last one
            if not len(self._slots):
                break
            logits = self._forward()
            mx.async_eval(logits)
            self._report()  # the machine computes meanwhile
            self._tokens = self._draw(logits, self._slots, self._drawn)
            self._drawn = self._drawn + 1
        self._read(0)
        self._report()

    # --- rows that come and go ---------------------------------------------------------------------------

    def _drop_ended(self) -> None:
        if not len(self._slots):
            return
        alive = ~self._completions.closed[self._slots] & (self._drawn < self.max_new_tokens)
        staying = int(alive.sum())
        gone = len(alive) - staying
        if not gone:
            return
        if staying and gone < self._patience(_DROP_SHARE) * len(alive):
            if len(self._columns):
                self._columns.retire(np.flatnonzero(~alive))
            return
        # The last rows move up into the gaps, the others stay where they are.
        order = np.arange(staying)
        order[~alive[:staying]] = np.flatnonzero(alive[staying:]) + staying
        self._slots, self._drawn = self._slots[order], self._drawn[order]
        self._tokens = self._tokens[mx.array(order)]
        if len(self._columns):
            self._columns.keep(order)
        if staying:
            for cache in self._caches:
                cache.keep(order)

    def _has_room_for(self, waiting: deque[int]) -> bool:
        free = self.places - len(self._slots)
        wanted = max(1, int(self.places * self._patience(_REFILL_SHARE))) if len(self._slots) else 1
        return bool(waiting) and free >= min(wanted, len(waiting))

    def _patience(self, share: float) -> float:
        return share if self._sampler is not None and self._sampler.lag else 0

    def _enter(self, waiting: deque[int]) -> None:
        """Rows from the front of the queue take the free places; each prompt is computed once."""
        free = self.places - len(self._slots)
        rows = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        prompts = [self.rows[row] for row in rows]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prefilled]
        if new:
            prefill = self._prefill(new)
            self._prefilled.update(dict.fromkeys(new, prefill))
        together: dict[int, list[int]] = {}  # rows by the prefill that they come from
        for row in rows:
            together.setdefault(id(self._prefilled[self.rows[row]]), []).append(row)
        entering = np.array([row for part in together.values() for row in part])
        logits = mx.concatenate([self._copy_prompts(part) for part in together.values()])  # (n, V)
        self._slots = np.append(self._slots, entering)
        self._drawn = np.append(self._drawn, np.ones(len(entering), dtype=np.int64))
        tokens = self._draw(logits, entering, np.zeros(len(entering), dtype=np.int64))
        self._tokens = mx.concatenate([self._tokens, tokens])
        wanted = {self.rows[row] for row in waiting}
        self._prefilled = {prompt: p for prompt, p in self._prefilled.items() if prompt in wanted}

    def _prefill(self, prompts: list[int]) -> _Prefill:
        lengths = [len(self.prompts[prompt]) for prompt in prompts]
        padded = np.zeros((len(prompts), max(lengths)), dtype=np.int32)
        for i, prompt in enumerate(prompts):
            padded[i, : lengths[i]] = self.prompts[prompt]
        caches: list[Any] = make_prompt_cache(self.model)
        last = mx.array(lengths)[:, None, None] - 1
        tokens = mx.array(padded)
        if self.trunk is not None:
            states = self.trunk.hidden(tokens, cache=caches)  # (N, P, D)
            logits = self.trunk.head(mx.take_along_axis(states, last, axis=1))[:, 0]  # (N, V)
        else:
            logits = mx.take_along_axis(self.model(tokens, cache=caches), last, axis=1)[:, 0]
        lead = lead_of(caches, tokens.shape[1]) if has_plain_caches(caches) else 0
        return _Prefill(caches, logits, {prompt: i for i, prompt in enumerate(prompts)}, lead)

    def _copy_prompts(self, rows: list[int]) -> mx.array:
        """Caches for rows of one prefill; the logits ``(n, V)`` of their first token."""
        prefill = self._prefilled[self.rows[rows[0]]]
        picks = [prefill.places[self.rows[row]] for row in rows]
        if has_plain_caches(prefill.caches):
            prompts = [self.rows[row] for row in rows]
            lengths = [prefill.lead + len(self.prompts[prompt]) for prompt in prompts]
            self._columns.enter(lengths, prompts)
            if not self._caches:
                repeated = sum(lengths) - sum(dict(zip(prompts, lengths, strict=True)).values())
                kind = cache_for(self.model, self.trunk, prefill.caches, repeated)
                self._caches = [kind(self._columns, self.places) for _ in prefill.caches]
            for cache, prompt in zip(self._caches, prefill.caches, strict=True):
                cache.enter(prompt, picks)
        else:  # they enter together, into an empty batch
            self._caches = [RepeatedCache(cache, picks) for cache in prefill.caches]
        return prefill.logits[mx.array(picks)]

    # --- one step ----------------------------------------------------------------------------------------

    def _forward(self) -> mx.array:
        """The logits ``(n, V)`` of each row's next token."""
        layers = [c.cache if isinstance(c, RepeatedCache) else c for c in self._caches]
        if len(self._columns):
            self._columns.advance()
        tokens = self._tokens[:, None]
        if self.trunk is None:
            return self.model(tokens, cache=layers)[:, -1]
        return self.trunk.head(self.trunk.hidden(tokens, cache=layers)[:, -1])

    def _draw(self, logits: mx.array, rows: np.ndarray, columns: np.ndarray) -> mx.array:
        """The next token ``(n,)`` of each of these rows, read some steps later on a GPU."""
        if self._sampler is None:
            self._sampler = self.new_sampler(logits.shape[-1])
        # Rows that are only carried along have run out of random numbers.
        columns = np.minimum(columns, self.max_new_tokens - 1)
        tokens, logprobs = self._sampler.draw(logits, rows, columns)
        self._launched.append(_Launched(rows, columns, tokens, logprobs))
        self._read(self._sampler.lag)
        return tokens if isinstance(tokens, mx.array) else mx.array(tokens)

    def _read(self, lag: int) -> None:
        """Record what was launched, but for the last ``lag`` steps: the one place where the host waits."""
        while len(self._launched) > lag:
            rows, columns, tokens, logprobs = self._launched.popleft()
            ended = self._completions.record(rows, columns, np.array(tokens), np.array(logprobs))
            self._ended += ended.tolist()

    def _report(self) -> None:
        """Make the records of rows that have ended, and tell whoever wants to know."""
        ended, self._ended = self._ended, []
        for row in ended:
            self._done[row] = self._completions[row]
            if self.on_done is not None:
                self.on_done(row, self._done[row])
