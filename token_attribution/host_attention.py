"""Attention on the CPU with its softmax in NumPy, in place; see ``host_math`` for what that is worth.

Rows that continue a few prompts share what they have in common: the queries of a prompt's rows are put together, so
that one matrix product takes the place of one per row, and a prompt's keys and values are neither copied per row nor
read per row. Values and gradients agree with MLX's own attention to float32 rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models import base as models_base

from token_attribution import host_math
from token_attribution.host_math import in_blocks, view

own_attention = mx.fast.scaled_dot_product_attention
own_attention_with_cache = models_base.scaled_dot_product_attention

_LOWEST = np.finfo(np.float32).min
Mask = mx.array | str | None


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention``: (B, H, L, D), (B, H', S, D), (B, H', S, E) -> (B, H, L, E)."""
    b, heads, n, _ = queries.shape
    plain = sinks is None and not _of_its_own_kind(mask) and queries.dtype == keys.dtype == mx.float32
    if not plain or b * heads * n * keys.shape[2] < host_math.FEW:
        return own_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    folded = _folded(queries * scale, keys.shape[1])
    scores = folded @ keys.swapaxes(-1, -2)  # (b, H', r, S)
    blocks = Blocks(np.arange(b).repeat(heads), np.tile(np.arange(heads), b))
    (weights,) = _softmax([scores.reshape(b * heads, n, -1)], mask, blocks)
    return (weights.reshape(scores.shape) @ values).reshape(b, heads, n, -1)


def attention_with_cache(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """The same as mlx-lm's models call it. A cache with a ``past`` has given out the rows' own columns alone."""
    past: SharedPast | None = getattr(cache, "past", None)
    if past is None:
        return own_attention_with_cache(queries, keys, values, cache, scale, cast(Any, mask), sinks)
    if (
        sinks is not None
        or _of_its_own_kind(mask)
        or queries.dtype != mx.float32
        or past.keys.dtype != mx.float32
    ):
        keys, values = past.before(keys, values)
        return attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    b, heads, n, _ = queries.shape
    rows, kv_heads = past.rows, keys.shape[1]
    folded = _folded(queries * scale, kv_heads)  # (b, H', r, D)
    shared = rows.together(folded) @ past.keys.swapaxes(-1, -2)  # (N, H', g · r, P)
    own = rows.together(folded @ keys.swapaxes(-1, -2))  # (N, H', g · r, W)
    scores = [x.reshape(rows.places * heads, n, -1) for x in (shared, own)]
    weights = _softmax(scores, mask, rows.blocks(kv_heads, heads // kv_heads))
    shared, own = (w.reshape(x.shape) for w, x in zip(weights, (shared, own), strict=True))
    mixed = rows.apart(shared @ past.values) + rows.apart(own) @ values
    return mixed.reshape(b, heads, n, -1)


def _of_its_own_kind(mask: Mask) -> bool:
    return isinstance(mask, mx.array) and (mask.dtype != mx.bool_ or mask.ndim > 4)


def _folded(queries: mx.array, kv_heads: int) -> mx.array:
    """All the query heads of a key head at once, for one product in place of several: (b, H', H / H' · n, D)."""
    b, heads, n, _ = queries.shape
    return queries.reshape(b, kv_heads, heads // kv_heads * n, -1)


# -- Prompts that rows share --------------------------------------------------------------------------


class Grouping:
    """Which of N prompts each of b rows continues."""

    def __init__(self, prompt_of: np.ndarray, prompts: int) -> None:
        """``prompt_of`` (b,): each row's, below ``prompts``."""
        counts = np.bincount(prompt_of, minlength=prompts)
        self.prompts, self.size = prompts, int(
            counts.max(initial=0)
        )  # N, and g: the rows of the largest group
        order = np.argsort(prompt_of, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)  # (b,) of a row in its group
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._members = np.zeros(
            (prompts, self.size), dtype=np.int64
        )  # in a place that is empty, row 0 again
        self._members[prompt_of, rank] = np.arange(len(order))
        self._places = prompt_of * self.size + rank  # (b,)
        # Rows that stand in groups of one size, one after the other: there is nothing to sort.
        self._sorted = len(order) == prompts * self.size and bool(
            (self._places == np.arange(len(order))).all()
        )
        self._prompt_of = prompt_of

    @property
    def places(self) -> int:
        """N · g, for b rows."""
        return self.prompts * self.size

    @cached_property
    def _indices(self) -> tuple[mx.array, mx.array]:
        return mx.array(self._members.reshape(-1).astype(np.int32)), mx.array(self._places.astype(np.int32))

    @cached_property
    def prompt_of(self) -> mx.array:
        """(b,) int32."""
        return mx.array(self._prompt_of.astype(np.int32))

    def together(self, x: mx.array) -> mx.array:
        """Rows (b, H, r, D) as (N, H, g · r, D): the prompt's, one after the other."""
        if not self._sorted:
            x = x[self._indices[0]]
        _, heads, rows, width = x.shape
        x = x.reshape(self.prompts, self.size, heads, rows, width).swapaxes(1, 2)
        return x.reshape(self.prompts, heads, self.size * rows, width)

    def apart(self, x: mx.array) -> mx.array:
        """The way back: (N, H, g · r, D) to (b, H, r, D)."""
        _, heads, rows, width = x.shape
        x = x.reshape(self.prompts, heads, self.size, rows // self.size, width).swapaxes(1, 2)
        x = x.reshape(self.places, heads, rows // self.size, width)
        return x if self._sorted else x[self._indices[1]]

    def blocks(self, heads: int, repeats: int) -> Blocks:
        """Whose each block of queries is in the order of :meth:`together`: N · H · g · ``repeats`` of them."""
        shape = (self.prompts, heads, self.size, repeats)
        head = np.arange(heads * repeats).reshape(1, heads, 1, repeats)
        rows, numbers = (
            np.broadcast_to(x, shape).reshape(-1) for x in (self._members[:, None, :, None], head)
        )
        return Blocks(rows, numbers)


class SharedPast(NamedTuple):
    """One layer's keys and values of prompts, and who continues them."""

    keys: mx.array  # (N, H, P, D)
    values: mx.array  # (N, H, P, E)
    rows: Grouping

    def before(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values of each row, prompt and own: (b, H, P + W, D) and (b, H, P + W, E)."""
        whose = self.rows.prompt_of
        return (
            mx.concatenate([self.keys[whose], keys], axis=2),
            mx.concatenate([self.values[whose], values], axis=2),
        )


# -- Softmax ------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Whose each block of n queries is."""

    rows: np.ndarray  # (K,)
    heads: np.ndarray  # (K,)


class _Bias:
    """What is added to the scores, 0 or nearly -inf."""

    def __init__(self, mask: Mask, n: int, columns: int, blocks: Blocks) -> None:
        """``mask`` as for attention, broadcast to (rows, heads, n, columns)."""
        self._table: np.ndarray | None = None  # (rows or 1, heads or 1, n or 1, columns)
        if mask is None or (n == 1 and isinstance(mask, str)):
            return
        if isinstance(mask, str):
            seen = np.arange(columns) <= np.arange(columns - n, columns)[:, None]
        else:
            seen = np.array(mask)
        # As in MLX a row that may see nothing, such as one of padding, sees all alike: not NaN, which would spread.
        bias = np.where(seen, np.float32(0), _LOWEST)
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        self._table = np.broadcast_to(bias, (*bias.shape[:3], columns))
        self._rows, self._heads = (
            index if extent > 1 else np.zeros_like(index)
            for index, extent in zip(blocks, bias.shape[:2], strict=True)
        )

    def of(self, block: Any, columns: slice) -> np.ndarray | None:
        """For one block's queries (n or 1, columns), or for several blocks' (m, n or 1, columns)."""
        return None if self._table is None else self._table[self._rows[block], self._heads[block], :, columns]


def _softmax(scores: list[mx.array], mask: Mask, blocks: Blocks) -> Sequence[mx.array]:
    """Over the columns of all ``scores`` together, each (K, n, columns).

    Their memory, and that of the cotangents, become the result's.
    """
    _, n, _ = scores[0].shape
    widths = [x.shape[2] for x in scores]
    stops = np.cumsum(widths)
    columns = [slice(stop - width, stop) for stop, width in zip(stops, widths, strict=True)]
    bias = _Bias(mask, n, int(stops[-1]), blocks)

    def each(work: Callable[[Any], None]) -> None:
        """Call ``work`` on blocks one by one; on many at once where each is a step of decoding, a row of scores."""

        def one_by_one(some: slice) -> None:
            for block in range(some.start, some.stop):
                work(block)

        in_blocks(work if n == 1 else one_by_one, len(blocks.rows), n * int(stops[-1]))

    @mx.custom_function
    def softmax(*scores: mx.array) -> tuple[mx.array, ...]:
        out = tuple(mx.stop_gradient(x) for x in scores)  # the same memory under another name
        parts = [view(x) for x in out]
        each(lambda block: _normalise([z[block] for z in parts], [bias.of(block, c) for c in columns]))
        return out

    @softmax.vjp
    def softmax_vjp(_: Any, cotangents: Any, weights: Any) -> Any:
        # Only attention calls this, and there the weights go into one matrix product alone, whose gradient is
        # a new array that nobody else has seen.
        slopes, parts = ([view(x) for x in arrays] for arrays in (cotangents, weights))

        def work(block: Any) -> None:
            pairs = [(g[block], p[block]) for g, p in zip(slopes, parts, strict=True)]
            inner = sum(np.einsum("...c,...c->...", g, p) for g, p in pairs)
            for g, p in pairs:
                np.subtract(g, inner[..., None], out=g)
                np.multiply(g, p, out=g)

        each(work)
        return cotangents

    return cast(Sequence[mx.array], softmax(*scores))


def _normalise(scores: list[np.ndarray], biases: list[np.ndarray | None]) -> None:
    """Softmax over the last axis of all ``scores`` together, in place."""
    for z, bias in zip(scores, biases, strict=True):
        if bias is not None:
            np.add(z, bias, out=z)
    top = functools.reduce(np.maximum, [z.max(axis=-1, keepdims=True) for z in scores])
    total = np.zeros_like(top)
    for z in scores:
        np.subtract(z, top, out=z)
        np.exp(z, out=z)
        total += z.sum(axis=-1, keepdims=True)
    for z in scores:
        np.divide(z, total, out=z)
