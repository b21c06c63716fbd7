"""A model's trunk on the CPU, with the exponentials of its attention and gates in NumPy.

Within :func:`fast_kernels` the functions that mlx-lm's models call (``mx.fast.scaled_dot_product_attention`` and
mlx-lm's own of that name, which is handed the cache too; ``nn.silu``, ``swiglu``) are ours; outside it, and wherever
MLX does not compute on the CPU, they are MLX's. Values and gradients agree to float32 rounding. See ``host_math`` for
what it is worth.
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

from token_attribution import host_math
from token_attribution.host_attention import (
    attention,
    attention_with_cache,
    own_attention,
    own_attention_with_cache,
)
from token_attribution.host_math import in_blocks, usable, view

_own_silu = nn.silu
_own_swiglu = activations.swiglu

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
            _install(attention, silu, swiglu, attention_with_cache)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _install(own_attention, _own_silu, _own_swiglu, own_attention_with_cache)


def installed() -> bool:
    """Whether models compute with these functions now."""
    return _depth > 0


def _install(*functions: Callable[..., mx.array]) -> None:
    mx.fast.scaled_dot_product_attention, nn.silu = functions[:2]
    for name, function in zip(_IMPORTED, functions[2:], strict=True):
        for module in _modules_with(name):
            setattr(module, name, function)


#: What models import by name, so that each has its own.
_IMPORTED = ("swiglu", "scaled_dot_product_attention")
_modules: dict[str, list[Any]] = {}
_modules_seen = 0


def _modules_with(name: str) -> list[Any]:
    global _modules_seen
    if len(sys.modules) != _modules_seen:
        _modules_seen = len(sys.modules)
        loaded = [m for path, m in sys.modules.items() if path.startswith("mlx_lm.models.")]
        ours = {
            "swiglu": (_own_swiglu, swiglu),
            "scaled_dot_product_attention": (own_attention_with_cache, attention_with_cache),
        }
        _modules.update({n: [m for m in loaded if getattr(m, n, None) in ours[n]] for n in _IMPORTED})
    return _modules[name]


# -- Gates --------------------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) may be inf: its reciprocal is the 0 that is meant
        y = np.exp(np.negative(x))
    np.add(y, np.float32(1), out=y)
    return np.reciprocal(y, out=y)


def silu(x: mx.array) -> mx.array:
    """``x σ(x)``."""
    return _gated(x, None) if x.dtype == mx.float32 and x.size >= host_math.FEW else _own_silu(x)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """``gate σ(gate) x``."""
    plain = gate.dtype == x.dtype == mx.float32 and gate.shape == x.shape
    if not plain or x.size < host_math.FEW:
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
