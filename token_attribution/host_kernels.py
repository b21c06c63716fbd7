"""Attention and gates of a model's trunk on the CPU, with their exponentials in NumPy.

Within :func:`fast_kernels` the functions that mlx-lm's models call (``mx.fast.scaled_dot_product_attention``,
``nn.silu``, ``swiglu``) are these; outside it, and wherever MLX does not compute on the CPU, they
are MLX's own. Values and gradients agree with MLX's to float32 rounding. See ``host_math`` for what it is worth.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import activations

from token_attribution.host_math import in_blocks, usable, view

_own_attention = mx.fast.scaled_dot_product_attention
_own_silu = nn.silu
_own_swiglu = activations.swiglu

_LOWEST = np.finfo(np.float32).min

_lock = threading.RLock()
_depth = 0


@contextmanager
def fast_kernels() -> Iterator[None]:
    """Within the block, models compute with the functions below if MLX runs on the CPU."""
    global _depth
    if not usable():
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            _install(attention, silu, swiglu)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _install(_own_attention, _own_silu, _own_swiglu)


def _install(*functions: Callable[..., mx.array]) -> None:
    mx.fast.scaled_dot_product_attention, nn.silu = functions[:2]
    for module in _modules_with_swiglu():
        module.swiglu = functions[2]


_swiglu_modules: list[Any] = []
_modules_seen = 0


def _modules_with_swiglu() -> list[Any]:
    """Models import this one by name, so each has its own."""
    global _modules_seen
    if len(sys.modules) != _modules_seen:
        _modules_seen = len(sys.modules)
        loaded = [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]
        _swiglu_modules[:] = [m for m in loaded if getattr(m, "swiglu", None) in (_own_swiglu, swiglu)]
    return _swiglu_modules


# -- Attention ----------------------------------------------------------------------------------------


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention``: (B, H, L, D), (B, H', S, D), (B, H', S, E) -> (B, H, L, E)."""
    own_mask = isinstance(mask, mx.array) and (mask.dtype != mx.bool_ or mask.ndim > 4)
    if sinks is not None or own_mask or queries.dtype != mx.float32 or keys.dtype != mx.float32:
        return _own_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    b, heads, n, _ = queries.shape
    kv_heads, columns = keys.shape[1], keys.shape[2]
    # All the query heads of a key head at once: one product in place of several.
    folded = (queries * scale).reshape(b, kv_heads, heads // kv_heads * n, -1)
    scores = (folded @ keys.swapaxes(-1, -2)).reshape(b, heads, n, columns)
    weights = _softmax(scores, _hidden(mask, b, heads, n, columns))
    mixed = weights.reshape(b, kv_heads, heads // kv_heads * n, columns) @ values
    return mixed.reshape(b, heads, n, -1)


def _hidden(mask: mx.array | str | None, b: int, heads: int, n: int, columns: int) -> np.ndarray | None:
    """What is added to the scores, 0 or nearly -inf, broadcast to (b, heads, n, columns)."""
    if mask is None or (n == 1 and isinstance(mask, str)):
        return None
    if isinstance(mask, str):
        seen = np.arange(columns) <= np.arange(columns - n, columns)[:, None]  # (n, columns)
    else:
        seen = np.array(mask)
    # As in MLX a row that may see nothing, such as one of padding, sees all alike: not NaN, which would spread.
    bias = np.where(seen, np.float32(0), _LOWEST)
    shape = (1,) * (4 - bias.ndim) + bias.shape
    return np.broadcast_to(bias.reshape(shape), (b, heads, n, columns))


def _softmax(scores: mx.array, bias: np.ndarray | None) -> mx.array:
    """Over the last of four axes. The scores' memory, and that of the cotangent, become the result's."""

    @mx.custom_function
    def softmax(scores: mx.array) -> mx.array:
        out = mx.stop_gradient(scores)  # the same memory under another name
        z = view(out)
        b, heads, n, columns = z.shape

        def work(rows: slice) -> None:
            for i in range(rows.start, rows.stop):
                _normalise(z[i // heads, i % heads], None if bias is None else bias[i // heads, i % heads])

        def work_on_single_queries(rows: slice) -> None:
            _normalise(z.reshape(b * heads, columns)[rows], None if added is None else added[rows])

        if n == 1:  # a step of decoding: a loop over rows and heads would cost more than their few scores do
            added = None if bias is None else bias.reshape(b * heads, columns)
            in_blocks(work_on_single_queries, b * heads, columns)
        else:
            in_blocks(work, b * heads, n * columns)
        return out

    @softmax.vjp
    def softmax_vjp(_: mx.array, cotangent: mx.array, weights: mx.array) -> mx.array:
        # Only ``attention`` calls this, and there the weights go into one matrix product alone, whose gradient is
        # a new array that nobody else has seen.
        g, p = view(cotangent), view(weights)
        b, heads, n, columns = p.shape

        def work(rows: slice) -> None:
            for i in range(rows.start, rows.stop):
                slope, weight = g[i // heads, i % heads], p[i // heads, i % heads]
                inner = np.einsum("nc,nc->n", slope, weight)
                np.subtract(slope, inner[:, None], out=slope)
                np.multiply(slope, weight, out=slope)

        in_blocks(work, b * heads, n * columns)
        return cotangent

    return cast(mx.array, softmax(scores))


def _normalise(scores: np.ndarray, bias: np.ndarray | None) -> None:
    """Softmax over the last axis, in place."""
    if bias is not None:
        np.add(scores, bias, out=scores)
    np.subtract(scores, scores.max(axis=-1, keepdims=True), out=scores)
    np.exp(scores, out=scores)
    np.divide(scores, scores.sum(axis=-1, keepdims=True), out=scores)


# -- Gates --------------------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) may be inf: its reciprocal is the 0 that is meant
        y = np.exp(np.negative(x))
    np.add(y, np.float32(1), out=y)
    return np.reciprocal(y, out=y)


def silu(x: mx.array) -> mx.array:
    """``x σ(x)``."""
    return _gated(x, None) if x.dtype == mx.float32 else _own_silu(x)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """``gate σ(gate) x``."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32 or gate.shape != x.shape:
        return _own_swiglu(gate, x)
    return _gated(gate, x)


def _rows(*arrays: mx.array) -> list[np.ndarray]:
    return [view(x).reshape(-1, x.shape[-1]) for x in arrays]


def _gated(gate: mx.array, x: mx.array | None) -> mx.array:
    @mx.custom_function
    def gated(*inputs: mx.array) -> mx.array:
        out = mx.zeros_like(inputs[0])
        a, o, *rest = _rows(inputs[0], out, *inputs[1:])

        def work(rows: slice) -> None:
            np.multiply(a[rows], _sigmoid(a[rows]), out=o[rows])
            if rest:
                np.multiply(o[rows], rest[0][rows], out=o[rows])

        in_blocks(work, *a.shape)
        return out

    @gated.vjp
    def gated_vjp(inputs: Any, cotangent: mx.array, _: mx.array) -> Any:
        inputs = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        slopes = [mx.zeros_like(i) for i in inputs]
        a, g, dgate, *rest = _rows(inputs[0], cotangent, slopes[0], *inputs[1:], *slopes[1:])

        def work(rows: slice) -> None:
            z, s = a[rows], _sigmoid(a[rows])
            swish = np.multiply(z, s)
            # σ (1 + z (1 - σ)) = σ + swish - swish σ
            slope = dgate[rows]
            np.multiply(swish, s, out=slope)
            np.subtract(swish, slope, out=slope)
            np.add(slope, s, out=slope)
            np.multiply(slope, g[rows], out=slope)
            if rest:
                np.multiply(slope, rest[0][rows], out=slope)
                np.multiply(swish, g[rows], out=rest[1][rows])

        in_blocks(work, *a.shape)
        return slopes if len(slopes) > 1 else slopes[0]

    return cast(mx.array, gated(gate) if x is None else gated(gate, x))
