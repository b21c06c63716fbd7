"""Exponentials on the CPU through NumPy, in place on MLX's own buffers.

MLX's element-wise kernels on CPU are scalar and run on one thread: an exponential costs 11 to 20 ns there and 0.4 ns
in NumPy, whose loops are vectorised. So where MLX computes on the CPU, what is wide (a vocabulary, attention scores,
the gate of an MLP) is evaluated and handed to NumPy as a view of the same memory; the matrix products stay with MLX.
On a GPU none of this is used.

Work is cut into blocks of rows that fit into a core's cache, and the blocks are shared out to threads (NumPy lets go
of the interpreter's lock).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import mlx.core as mx
import numpy as np

from base_setup.backend import device_kind

_BLOCK = 1 << 18  # float32 elements that a thread works on at a time, 1 MiB: measured best of 2^14 to 2^18
_PARALLEL = 1 << 18  # up to this many elements a second thread costs more than it brings
#: Exponentials that MLX computes faster than it can stop for NumPy: 4,096 take it 60 µs, and stopping some 50.
FEW = 1 << 12
_SUMMED = 1 << 14  # squares that are added in float32 before they go on in float64
_LOWEST = -1e30  # in place of -inf where it meets a probability of 0: their product must be 0, not NaN


def usable() -> bool:
    """Whether MLX computes on the CPU now, and outside ``mx.compile``, which cannot stop for NumPy."""
    return bool(os.environ.get("MLX_DISABLE_COMPILE")) and device_kind() == "cpu"


def view(x: mx.array) -> np.ndarray:
    """The memory of ``x``, evaluated, as NumPy sees it. Whoever writes there must be the only one who reads it."""
    return np.array(x, copy=False)


def alone(x: mx.array) -> mx.array:
    """``x``, evaluated, as a new array without the graph behind it.

    Evaluated in the middle of a differentiation, MLX lets nothing go that another array still points to.
    """
    if x.dtype == mx.bfloat16:  # NumPy has no such type
        return mx.array(view(x.view(mx.uint16))).view(mx.bfloat16)
    return mx.array(view(x))


def in_blocks(work: Callable[[slice], None], rows: int, width: int) -> None:
    """Call ``work`` on slices that together are ``range(rows)``, each row ``width`` elements wide."""
    step = max(1, _BLOCK // max(width, 1))
    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(slices) > 1 and rows * width >= _PARALLEL and _threads() > 1:
        for _ in _pool().map(work, slices):  # the loop hands exceptions on
            pass
    else:
        for part in slices:
            work(part)


def read_logits(
    logits: np.ndarray, targets: np.ndarray, temperature: float, *, entropy: bool, slopes: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logprob of each target, entropy (or zeros) and logsumexp, each (n,) float32.

    ``logits`` (n, V) are lost; with ``slopes``, each logprob's gradient with respect to them stands in their place.
    """
    n, width = logits.shape
    logprobs, entropies, normalisers = (np.zeros(n, dtype=np.float32) for _ in range(3))

    def work(rows: slice) -> None:
        z = logits[rows]
        if temperature != 1.0:
            np.divide(z, np.float32(temperature), out=z)
        chosen = z[np.arange(len(z)), targets[rows]]
        top = z.max(axis=-1, keepdims=True)
        np.subtract(z, top, out=z)
        if entropy:
            np.maximum(z, np.float32(_LOWEST), out=z)
            weights = np.exp(z)
        else:
            weights = np.exp(z, out=z)
        total = weights.sum(axis=-1)
        log_total = np.log(total)
        normalisers[rows] = log_total + top[:, 0]
        logprobs[rows] = chosen - normalisers[rows]
        if entropy:
            entropies[rows] = log_total - np.einsum("nv,nv->n", weights, z) / total
        if slopes:
            tau = np.float32(temperature)
            np.multiply(weights, (-1.0 / (total * tau))[:, None], out=z)
            z[np.arange(len(z)), targets[rows]] += 1 / tau

    in_blocks(work, n, width)
    return logprobs, entropies, normalisers


def logit_slopes(
    logits: np.ndarray,
    targets: np.ndarray,
    normalisers: np.ndarray,
    temperature: float,
    slope: np.ndarray,
    entropy_slope: np.ndarray | None,
) -> None:
    r"""Write over ``logits`` (n, V) their gradient.

    .. math:: \frac{\partial}{\partial\,\text{logits}_v} =
              \bigl(g\,(1[v = y] - p_v) - h\, p_v\,(\log p_v + H)\bigr) / \tau

    with g and h the cotangents (n,) of logprob and entropy H.
    """
    n, width = logits.shape
    tau = np.float32(temperature)

    def work(rows: slice) -> None:
        z, g = logits[rows], slope[rows]
        if temperature != 1.0:
            np.divide(z, tau, out=z)
        np.subtract(z, normalisers[rows, None], out=z)  # log p
        if entropy_slope is None:
            np.exp(z, out=z)
            np.multiply(z, (-g / tau)[:, None], out=z)
        else:
            np.maximum(z, np.float32(_LOWEST), out=z)
            p = np.exp(z)
            own = -np.einsum("nv,nv->n", p, z)  # H
            np.add(z, own[:, None], out=z)
            np.multiply(z, (-entropy_slope[rows] / tau)[:, None], out=z)
            np.subtract(z, (g / tau)[:, None], out=z)
            np.multiply(z, p, out=z)
        z[np.arange(len(z)), targets[rows]] += g / tau

    in_blocks(work, n, width)


def scale_rows(x: np.ndarray, factors: np.ndarray) -> None:
    """Multiply each row of ``x`` (n, V) by its factor, in place."""

    def work(rows: slice) -> None:
        np.multiply(x[rows], factors[rows, None], out=x[rows])

    in_blocks(work, *x.shape)


def adamw(
    weights: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    gradient: np.ndarray,
    *,
    factor: float,
    beta1: float,
    beta2: float,
    step_size: float,
    root_scale: float,
    eps: float,
    keep: float,
) -> None:
    """One AdamW step, written over ``weights`` and both moments, all of one shape.

    With g = ``factor`` · gradient: m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g², and
    w ← ``keep`` · w - ``step_size`` · m / (``root_scale`` · √v + ε).
    """
    w, m, v, gradients = (x.reshape(-1) for x in (weights, first, second, gradient))

    def work(part: slice) -> None:
        g = np.multiply(gradients[part], np.float32(factor))
        scratch = np.multiply(g, np.float32(1 - beta1))
        np.multiply(m[part], np.float32(beta1), out=m[part])
        np.add(m[part], scratch, out=m[part])
        np.multiply(g, g, out=scratch)
        np.multiply(scratch, np.float32(1 - beta2), out=scratch)
        np.multiply(v[part], np.float32(beta2), out=v[part])
        np.add(v[part], scratch, out=v[part])
        np.sqrt(v[part], out=scratch)
        np.multiply(scratch, np.float32(root_scale), out=scratch)
        np.add(scratch, np.float32(eps), out=scratch)
        np.divide(m[part], scratch, out=scratch)
        np.multiply(scratch, np.float32(step_size), out=scratch)
        if keep != 1:
            np.multiply(w[part], np.float32(keep), out=w[part])
        np.subtract(w[part], scratch, out=w[part])

    in_blocks(work, w.size, 1)


def sum_of_squares(x: np.ndarray) -> float:
    """Block by block, so that float32 holds every partial sum."""
    flat = x.reshape(-1)
    blocks = (flat[i : i + _SUMMED] for i in range(0, flat.size, _SUMMED))
    return sum(float(np.vdot(block, block)) for block in blocks)


@cache
def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(asked), available) if asked.isdecimal() and int(asked) > 0 else available


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="host-math")
