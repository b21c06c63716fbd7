"""Attention and gates on the host: float64 arithmetic, nobody else's memory, and MLX's own functions afterwards."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations, llama

from token_attribution import host_attention, host_kernels, host_math
from token_attribution.host_kernels import attention, fast_kernels, silu, swiglu

on_host = pytest.mark.skipif(not host_math.usable(), reason="MLX does not compute on the CPU, or it compiles")

OWN = (mx.fast.scaled_dot_product_attention, nn.silu, activations.swiglu)
OURS = (attention, silu, swiglu)


def installed() -> tuple[Any, ...]:
    return mx.fast.scaled_dot_product_attention, nn.silu, activations.swiglu


def draw(*shape: int, seed: int) -> np.ndarray:
    """Random numbers that float32 holds exactly."""
    numbers: np.ndarray = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return numbers.astype(np.float64)


def single(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


# Attention ---------------------------------------------------------------------------------------------


def attended(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, seen: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Output, and the gradients of q, k and v under ``sum(cotangent * output)``, one head after the other."""
    out, dq, dk, dv = np.zeros(cotangent.shape), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[1] // k.shape[1]
    seen = np.broadcast_to(seen, (*q.shape[:3], k.shape[2]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // group
            s = np.where(seen[b, h], scale * q[b, h] @ k[b, kv].T, -np.inf)
            w = np.exp(s - s.max(axis=-1, keepdims=True))
            w /= w.sum(axis=-1, keepdims=True)
            out[b, h] = w @ v[b, kv]
            dw = cotangent[b, h] @ v[b, kv].T
            ds = w * (dw - (dw * w).sum(axis=-1, keepdims=True))
            dq[b, h] = scale * ds @ k[b, kv]
            dk[b, kv] += scale * ds.T @ q[b, h]
            dv[b, kv] += w.T @ cotangent[b, h]
    return out, dq, dk, dv


def causal(n: int, columns: int) -> np.ndarray:
    """The last of n queries sees all the columns, each before it one less."""
    return np.tril(np.ones((n, columns), dtype=bool), k=columns - n)


def nearly_hidden(n: int, columns: int) -> np.ndarray:
    """Each query sees a single column, the last one all."""
    seen = np.eye(n, columns, k=1, dtype=bool)
    seen[-1] = True
    return seen


RANDOM = np.random.default_rng(3).random((2, 4, 5, 8)) < 0.5
RANDOM[..., 0] = True
#: heads, heads of the keys, queries, keys, the mask handed in, what it means
CASES: dict[str, tuple[int, int, int, int, Any, np.ndarray]] = {
    "no mask": (2, 2, 5, 5, None, np.array(True)),
    "no mask, one query": (4, 2, 1, 6, None, np.array(True)),
    "causal": (4, 4, 5, 5, "causal", causal(5, 5)),
    "causal, grouped heads": (4, 2, 5, 5, "causal", causal(5, 5)),
    "causal, all heads on one": (4, 1, 5, 5, "causal", causal(5, 5)),
    "causal, continuation": (4, 2, 3, 8, "causal", causal(3, 8)),
    "causal, one query": (4, 2, 1, 6, "causal", np.array(True)),
    "a mask of two axes": (4, 2, 5, 8, causal(5, 8), causal(5, 8)),
    "a mask per row": (4, 2, 5, 8, RANDOM[:, :1], RANDOM[:, :1]),
    "a mask per head": (4, 2, 5, 8, RANDOM, RANDOM),
    "a mask of three axes": (4, 2, 5, 8, RANDOM[0], RANDOM[:1]),
    "all is seen": (4, 2, 5, 8, np.ones((1, 1, 5, 8), dtype=bool), np.array(True)),
    "hardly anything is seen": (4, 2, 5, 8, nearly_hidden(5, 8), nearly_hidden(5, 8)),
    "a mask, one query": (4, 2, 1, 8, RANDOM[:, :1, :1], RANDOM[:, :1, :1]),
}


@on_host
@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_gradients_are_those_of_float64(name: str) -> None:
    heads, kv_heads, n, columns, mask, seen = CASES[name]
    q, k, v = (
        draw(2, heads, n, 3, seed=1),
        draw(2, kv_heads, columns, 3, seed=2),
        draw(2, kv_heads, columns, 4, seed=3),
    )
    cotangent = draw(2, heads, n, 4, seed=4)
    given = mx.array(mask) if isinstance(mask, np.ndarray) else mask
    inputs, weights = [single(x) for x in (q, k, v)], single(cotangent)
    outputs, gradients = mx.vjp(lambda *x: attention(*x, scale=0.6, mask=given), inputs, [weights])
    for ours, expected in zip([*outputs, *gradients], attended(q, k, v, 0.6, seen, cotangent), strict=True):
        np.testing.assert_allclose(np.array(ours), expected, atol=3e-6)


@on_host
def test_large_scores_do_not_overflow() -> None:
    q, k, v = 300 * draw(1, 1, 4, 3, seed=1), 300 * draw(1, 1, 4, 3, seed=2), draw(1, 1, 4, 2, seed=3)
    out = attention(single(q), single(k), single(v), scale=1.0, mask="causal")
    expected = attended(q, k, v, 1.0, causal(4, 4), np.zeros((1, 1, 4, 2)))[0]
    np.testing.assert_allclose(np.array(out), expected, atol=1e-4)


@on_host
def test_a_query_that_may_see_nothing_is_finite_as_in_mlx() -> None:
    """Rows of padding do so; NaN there would reach the other rows through the next layer's keys."""
    q, k, v = (single(draw(1, 2, 3, 4, seed=i)) for i in range(3))
    mask = mx.array([[True, False, True], [False, False, False], [True, True, True]])
    results = [
        mx.vjp(lambda *x, f=f: f(*x, scale=0.5, mask=mask), [q, k, v], [mx.ones(q.shape)])
        for f in (attention, OWN[0])
    ]
    (ours, slopes), (theirs, own_slopes) = results
    assert np.isfinite(np.array(theirs[0])).all()
    np.testing.assert_allclose(np.array(ours[0]), np.array(theirs[0]), atol=1e-6)
    np.testing.assert_allclose(np.array(slopes[2]), np.array(own_slopes[2]), atol=1e-6)
    assert all(np.isfinite(np.array(g)).all() for g in slopes)


@on_host
def test_many_heads_are_shared_out_to_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_math, "_BLOCK", 100)
    monkeypatch.setattr(host_math, "_PARALLEL", 1)
    monkeypatch.setattr(host_math, "_threads", lambda: 2)
    q, k, v = draw(3, 6, 7, 3, seed=1), draw(3, 2, 9, 3, seed=2), draw(3, 2, 9, 3, seed=3)
    cotangent, seen = draw(3, 6, 7, 3, seed=4), causal(7, 9)
    outputs, gradients = mx.vjp(
        lambda *x: attention(*x, scale=0.6, mask="causal"),
        [single(x) for x in (q, k, v)],
        [single(cotangent)],
    )
    for ours, expected in zip([*outputs, *gradients], attended(q, k, v, 0.6, seen, cotangent), strict=True):
        np.testing.assert_allclose(np.array(ours), expected, atol=3e-6)


@on_host
@pytest.mark.parametrize("mask", [None, "causal"])
def test_attention_writes_over_nothing_that_anybody_holds(mask: str | None) -> None:
    """The output stands in the loss three times, and each input in other places too."""
    arrays = [draw(2, 2, 4, 3, seed=i) for i in range(3)]
    inputs, weights = [single(x) for x in arrays], draw(2, 2, 4, 3, seed=4)
    cotangent = single(weights)
    mx.eval(inputs, cotangent)
    others = [x[:] for x in inputs]

    def loss(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        out = attention(q, k, v, scale=0.6, mask=mask)
        scores = q @ k.swapaxes(-1, -2)  # the product that attention begins with
        rest = mx.sum(q * q) + mx.sum(k * v) + mx.sum(scores * scores)
        return mx.sum(cotangent * out) + mx.sum(out * out) + rest, out

    (_, out), gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*inputs)
    mx.eval(gradients, out)
    for x, other, before in zip(inputs, others, arrays, strict=True):
        assert np.array_equal(np.array(x), before)
        assert np.array_equal(np.array(other), before)
    assert np.array_equal(np.array(cotangent), weights)
    q, k, v = arrays
    seen = np.array(True) if mask is None else causal(4, 4)
    expected = attended(q, k, v, 0.6, seen, weights)
    np.testing.assert_allclose(np.array(out), expected[0], atol=3e-6)
    _, dq, dk, dv = attended(q, k, v, 0.6, seen, weights + 2 * expected[0])
    scores = q @ np.swapaxes(k, -1, -2)
    dq = dq + 2 * q + 2 * scores @ k
    dk = dk + v + 2 * np.swapaxes(scores, -1, -2) @ q
    for ours, exact in zip(gradients, (dq, dk, dv + k), strict=True):
        np.testing.assert_allclose(np.array(ours), exact, atol=2e-4)


@on_host
def test_one_array_can_be_queries_keys_and_values_at_once() -> None:
    x, weights = draw(1, 2, 4, 3, seed=0), draw(1, 2, 4, 3, seed=1)
    ours = mx.grad(
        lambda x: mx.sum(single(weights) * attention(x, x, x, scale=0.6, mask="causal")),
    )(single(x))
    _, dq, dk, dv = attended(x, x, x, 0.6, causal(4, 4), weights)
    np.testing.assert_allclose(np.array(ours), dq + dk + dv, atol=3e-6)


@on_host
def test_cotangents_are_not_written_over() -> None:
    q, k, v = (single(draw(1, 1, 4, 4, seed=i)) for i in range(3))
    held = single(draw(1, 1, 4, 4, seed=5))
    before = np.array(held, copy=True)
    for function, inputs in (
        (lambda q, k, v: attention(q, k, v, scale=1.0), [q, k, v]),
        # Values that are the identity hand the cotangent on as it is.
        (lambda q, k: attention(q, k, mx.eye(4)[None, None], scale=1.0), [q, k]),
        (silu, [q]),
        (swiglu, [q, k]),
    ):
        _, gradients = mx.vjp(function, inputs, [held])
        mx.eval(gradients)
        assert np.array_equal(np.array(held), before)


@on_host
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "keys in 16 bits", "an additive mask", "sinks"])
def test_what_is_not_plain_float32_goes_to_mlx(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[Any] = []

    def own(*arrays: mx.array, **options: Any) -> mx.array:
        asked.append(options)
        return OWN[0](*arrays, **options)

    monkeypatch.setattr(host_attention, "own_attention", own)
    q, k, v = (single(draw(1, 2, 4, 8, seed=i)) for i in range(3))
    options: dict[str, Any] = {"scale": 0.5, "mask": "causal"}
    if kind in ("bfloat16", "float16"):
        q, k, v = (x.astype(getattr(mx, kind)) for x in (q, k, v))
    elif kind == "keys in 16 bits":
        k = k.astype(mx.float16)
    elif kind == "an additive mask":
        options["mask"] = single(draw(4, 4, seed=5))
    else:
        options["sinks"] = mx.array([0.5, -0.5])
    ours = attention(q, k, v, **options)
    assert len(asked) == 1
    theirs = OWN[0](q, k, v, **options)
    assert ours.dtype == theirs.dtype
    assert mx.array_equal(ours, theirs)
    attention(*(single(draw(1, 2, 4, 8, seed=i)) for i in range(3)), scale=0.5, mask="causal")
    assert len(asked) == 1


# Gates -------------------------------------------------------------------------------------------------

EXTREMES = np.array([[-1e4, -100.0, -20.0, -1.0], [0.0, 1e-6, 1.0, 20.0], [100.0, 1e4, 88.0, -88.0]])


def sigmoid(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        s: np.ndarray = 1 / (1 + np.exp(-z))
    return s


@on_host
@pytest.mark.parametrize(
    "z", [draw(2, 3, 5, seed=1), draw(7, seed=2), EXTREMES], ids=["3 axes", "1 axis", "extremes"]
)
def test_gates_and_their_gradients_are_those_of_float64(z: np.ndarray) -> None:
    x, cotangent = draw(*z.shape, seed=3), draw(*z.shape, seed=4)
    s = sigmoid(z)
    slope = s * (1 + z * (1 - s))
    (out,), (dz,) = mx.vjp(silu, [single(z)], [single(cotangent)])
    np.testing.assert_allclose(np.array(out), z * s, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.array(dz), cotangent * slope, rtol=2e-6, atol=2e-6)
    (out,), (dz, dx) = mx.vjp(swiglu, [single(z), single(x)], [single(cotangent)])
    np.testing.assert_allclose(np.array(out), z * s * x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.array(dz), cotangent * slope * x, rtol=4e-6, atol=2e-6)
    np.testing.assert_allclose(np.array(dx), cotangent * z * s, rtol=2e-6, atol=2e-6)


@on_host
def test_gates_write_over_nothing_that_anybody_holds() -> None:
    z, x = draw(3, 4, seed=1), draw(3, 4, seed=2)
    a, b = single(z), single(x)
    mx.eval(a, b)

    def loss(a: mx.array, b: mx.array) -> tuple[mx.array, list[mx.array]]:
        outputs = [silu(a), swiglu(a, b), swiglu(b, b), silu(a)]
        twice = sum((mx.sum(out * out) for out in outputs), mx.zeros(()))
        return twice + mx.sum(a * b), outputs

    (_, outputs), (da, db) = mx.value_and_grad(loss, argnums=(0, 1))(a, b)
    mx.eval(da, db)
    assert np.array_equal(np.array(a), z)
    assert np.array_equal(np.array(b), x)
    s, t = sigmoid(z), sigmoid(x)
    values = [z * s, z * s * x, x * t * x, z * s]
    for out, expected in zip(outputs, values, strict=True):
        np.testing.assert_allclose(np.array(out), expected, atol=2e-6)
    ds, dt = s * (1 + z * (1 - s)), t * (1 + x * (1 - t))
    by_a = 2 * (2 * values[0]) * ds + 2 * values[1] * ds * x + x
    by_b = 2 * values[1] * z * s + 2 * values[2] * (dt * x + x * t) + z
    np.testing.assert_allclose(np.array(da), by_a, atol=2e-5)
    np.testing.assert_allclose(np.array(db), by_b, atol=2e-5)


@on_host
def test_inputs_need_not_lie_in_order_in_memory() -> None:
    wide = single(draw(4, 6, seed=1))
    for z in (wide.T, wide[:, ::2], mx.broadcast_to(wide[:1], (4, 6))):
        exact = np.array(z).astype(np.float64)
        cotangent = mx.broadcast_to(mx.array(2.0), z.shape)
        (out,), (slope,) = mx.vjp(silu, [z], [cotangent])
        s = sigmoid(exact)
        np.testing.assert_allclose(np.array(out), exact * s, atol=1e-6)
        np.testing.assert_allclose(np.array(slope), 2 * s * (1 + exact * (1 - s)), atol=2e-6)
        (both,), _ = mx.vjp(swiglu, [z, z], [cotangent])
        np.testing.assert_allclose(np.array(both), exact * s * exact, atol=2e-6)


@on_host
def test_gates_in_sixteen_bits_and_of_unequal_shapes_are_mlxs() -> None:
    z, x = single(draw(3, 4, seed=1)), single(draw(1, 4, seed=2))
    half = z.astype(mx.bfloat16)
    assert silu(half).dtype == swiglu(half, half).dtype == mx.bfloat16
    assert mx.array_equal(silu(half), OWN[1](half))
    assert mx.array_equal(swiglu(half, half), OWN[2](half, half))
    assert mx.array_equal(swiglu(z, x), OWN[2](z, x))


# Where they are in force -------------------------------------------------------------------------------


@on_host
def test_they_are_in_force_within_the_block_alone() -> None:
    assert installed() == OWN
    with fast_kernels():
        assert installed() == OURS
        assert llama.swiglu is swiglu  # models import this one by name
        with fast_kernels():
            assert installed() == OURS
        assert installed() == OURS  # not before the outer block ends
    assert installed() == OWN
    assert llama.swiglu is OWN[2]


def fail_within() -> None:
    with fast_kernels(), fast_kernels():
        raise KeyError("inside")


@on_host
def test_an_exception_does_not_leave_them_in_force() -> None:
    with pytest.raises(KeyError):
        fail_within()
    assert installed() == OWN
    with fast_kernels():
        assert installed() == OURS
    assert installed() == OWN


@on_host
def test_a_model_whose_module_is_loaded_within_the_block_has_mlxs_own_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "mlx_lm.models.helium"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with fast_kernels():
        late = importlib.import_module(name)
        assert late.swiglu is swiglu
    assert late.swiglu is OWN[2]
    with fast_kernels():
        assert late.swiglu is swiglu
    assert late.swiglu is OWN[2]


@on_host
def test_the_last_of_two_threads_to_leave_puts_mlxs_own_back() -> None:
    entered, may_leave = threading.Event(), threading.Event()
    seen: list[tuple[Any, ...]] = []

    def other() -> None:
        with fast_kernels():
            entered.set()
            may_leave.wait(10)
            seen.append(installed())

    thread = threading.Thread(target=other)
    with fast_kernels():
        thread.start()
        assert entered.wait(10)
    assert installed() == OURS  # the other one is still at it
    may_leave.set()
    thread.join(10)
    assert seen == [OURS]
    assert installed() == OWN


def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)


def computes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    monkeypatch.setattr(host_math, "device_kind", lambda: "metal")


@pytest.mark.parametrize("setting", [compiles, computes_on_a_gpu])
def test_where_mlx_compiles_or_computes_on_a_gpu_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, setting: Callable[[pytest.MonkeyPatch], None]
) -> None:
    setting(monkeypatch)
    assert not host_math.usable()
    with fast_kernels():
        assert installed() == OWN
        assert llama.swiglu is OWN[2]
    assert installed() == OWN


@on_host
@pytest.mark.parametrize("name", ["attention", "silu", "swiglu"])
def test_what_is_soon_computed_is_not_stopped_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Scores of 2 heads, 4 queries and 8 columns are 64, a gate of 8 × 8 too: below 65 they are MLX's own."""
    q, k = single(draw(1, 2, 4, 8, seed=1)), single(draw(1, 2, 8, 8, seed=2))
    gate = single(draw(8, 8, seed=3))
    call: Callable[[], mx.array] = {
        "attention": lambda: attention(q, k, k, scale=0.5),
        "silu": lambda: silu(gate),
        "swiglu": lambda: swiglu(gate, gate),
    }[name]
    stops: list[str] = []

    def counted(x: mx.array) -> np.ndarray:
        stops.append(name)
        return host_math.view(x)

    monkeypatch.setattr(host_attention, "view", counted)
    monkeypatch.setattr(host_kernels, "view", counted)
    monkeypatch.setattr(host_math, "FEW", 64)
    on_host_too = np.array(call())
    assert stops
    stops.clear()
    monkeypatch.setattr(host_math, "FEW", 65)
    np.testing.assert_allclose(np.array(call()), on_host_too, atol=1e-6)
    assert not stops
