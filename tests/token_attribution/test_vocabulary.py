"""The vocabulary read in each of four ways, against a log-softmax in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from token_attribution import host_math, vocabulary
from token_attribution.vocabulary import Reading, Reference, Wanted, read_vocabulary

N, WIDTH, VOCABULARY = 7, 6, 11
TARGETS = np.array([0, VOCABULARY - 1, 3, 3, 0, 5, VOCABULARY - 1])  # both ends of the vocabulary
WAYS = ("kept", "recomputed", "slopes ready", "slopes kept")
WANTED = {
    "logprobs": Wanted(),
    "entropy": Wanted(entropy=True),
    "entropy with gradient": Wanted(entropy=True, entropy_gradient=True),
    "kl": Wanted(kl=True),
    "kl alone": Wanted(kl=True, logprobs=False),
    "everything": Wanted(entropy=True, entropy_gradient=True, kl=True),
}


@pytest.fixture(params=["host", "mlx"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the exponentials are computed."""
    if request.param == "mlx":
        monkeypatch.setattr(host_math, "usable", lambda: False)
    elif not host_math.usable():
        pytest.skip("MLX does not compute on the CPU here, or it compiles")
    return str(request.param)


# By hand -----------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """Float64: the three numbers of each row, and the gradient of their weighted sum."""

    logprobs: np.ndarray  # (N,)
    entropy: np.ndarray
    kl: np.ndarray
    slopes: np.ndarray  # (N, V), of the logits


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def times(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``p x``, and 0 where p is."""
    return np.where(p == 0, 0.0, p * np.where(p == 0, 0.0, x))


def by_hand(
    z: np.ndarray,
    targets: np.ndarray,
    temperature: float,
    weights: np.ndarray,
    wanted: Wanted,
    ref_z: np.ndarray | None = None,
) -> Expected:
    """What is differentiated: ``sum(weights[0] logprob + weights[1] entropy + weights[2] KL)``, as far as wanted."""
    logp = log_softmax(z / temperature)
    p = np.exp(logp)
    entropy = -times(p, logp).sum(axis=-1)
    slopes = np.zeros_like(z)
    if wanted.logprobs:
        slopes += weights[0][:, None] * (np.eye(z.shape[1])[targets] - p)
    if wanted.entropy_gradient:
        slopes -= weights[1][:, None] * times(p, logp + entropy[:, None])
    kl = np.zeros(len(z))
    if wanted.kl:
        assert ref_z is not None
        ratio = logp - log_softmax(ref_z / temperature)
        kl = times(p, ratio).sum(axis=-1)
        slopes += weights[2][:, None] * times(p, ratio - kl[:, None])
    return Expected(logp[np.arange(len(z)), targets], entropy, kl, slopes / temperature)


def draw(*shape: int, seed: int) -> np.ndarray:
    """Random numbers that float32 holds exactly."""
    numbers: np.ndarray = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return numbers.astype(np.float64)


WEIGHTS = draw(3, N, seed=1)
ROWS = draw(N, WIDTH, seed=2)
REF_ROWS, REF_WEIGHT = draw(N, 4, seed=3), draw(VOCABULARY, 4, seed=4)


def single(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32)) if x.dtype.kind == "f" else mx.array(x)


def exactly(x: Any) -> np.ndarray:
    """An array of any float dtype in float64."""
    numbers: np.ndarray = np.array(x.astype(mx.float32)).astype(np.float64)
    return numbers


def linear() -> nn.Linear:
    module = nn.Linear(WIDTH, VOCABULARY)
    module.weight, module.bias = single(draw(VOCABULARY, WIDTH, seed=5)), single(draw(VOCABULARY, seed=6))
    return module


def reader(
    way: str, wanted: Wanted, temperature: float, **more: Any
) -> Callable[[Callable[[mx.array], mx.array], nn.Module, mx.array], Reading]:
    """``read(head, module, rows)`` in one of the ways; a frozen module makes slopes ready, any other keeps them."""

    def read(head: Callable[[mx.array], mx.array], module: nn.Module, rows: mx.array) -> Reading:
        ref_weight = single(REF_WEIGHT)
        return read_vocabulary(
            rows,
            head,
            single(TARGETS)[: rows.shape[0]],
            temperature,
            wanted=wanted,
            reference=Reference(single(REF_ROWS), lambda h: h @ ref_weight.T) if wanted.kl else None,
            head_module=None if way == "kept" else module,
            for_gradient=way in ("slopes ready", "slopes kept"),
            **more,
        )

    return read


def total(reading: Reading, weights: np.ndarray = WEIGHTS) -> mx.array:
    """The weighted sum of all that was read."""
    parts = [mx.sum(single(weights[0]) * reading.logprobs)]
    if reading.entropy is not None:
        parts.append(mx.sum(single(weights[1]) * reading.entropy))
    if reading.kl is not None:
        parts.append(mx.sum(single(weights[2]) * reading.kl))
    return sum(parts, mx.zeros(()))


def assert_reads(reading: Reading, expected: Expected, wanted: Wanted, atol: float = 3e-6) -> None:
    if wanted.logprobs:
        np.testing.assert_allclose(
            np.array(reading.logprobs), expected.logprobs, atol=atol, rtol=0 if atol > 1e-3 else 1e-6
        )
    assert (reading.entropy is not None) == wanted.entropy
    assert (reading.kl is not None) == wanted.kl
    if reading.entropy is not None:
        np.testing.assert_allclose(
            np.array(reading.entropy), expected.entropy, atol=atol, rtol=0 if atol > 1e-3 else 1e-6
        )
    if reading.kl is not None:
        np.testing.assert_allclose(
            np.array(reading.kl), expected.kl, atol=atol, rtol=0 if atol > 1e-3 else 1e-6
        )


def differentiated(
    module: nn.Module, rows: mx.array, loss: Callable[[mx.array], tuple[mx.array, Reading]]
) -> tuple[Reading, np.ndarray, dict[str, np.ndarray]]:
    """What was read, and the gradients of rows and of what trains in the module."""

    def of_both(parameters: Any, rows: mx.array) -> tuple[mx.array, Reading]:
        module.update(parameters)
        return loss(rows)

    own = module.trainable_parameters()
    (_, reading), (gradient, by_row) = mx.value_and_grad(of_both, argnums=(0, 1))(own, rows)
    module.update(own)
    slopes = {name: exactly(g) for name, g in list(tree_flatten(gradient))}
    return reading, exactly(by_row), slopes


# Values and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_float64(
    path: str, way: str, temperature: float, wanted: Wanted
) -> None:
    module = linear()
    weight, bias = exactly(module.weight), exactly(module.bias)
    z, ref_z = ROWS @ weight.T + bias, REF_ROWS @ REF_WEIGHT.T
    expected = by_hand(z, TARGETS, temperature, WEIGHTS, wanted, ref_z)
    if way == "slopes ready":
        module.freeze()
    for chunk in (None, 3 * VOCABULARY, 1):  # all at once; 3, 3 and 1; one by one
        read = reader(way, wanted, temperature, chunk_elements=chunk)

        def loss(
            rows: mx.array,
            read: Callable[..., Reading] = read,
        ) -> tuple[mx.array, Reading]:
            reading = read(module, module, rows)
            return total(reading), reading

        value_alone = read(module, module, single(ROWS))
        assert_reads(value_alone, expected, wanted)
        reading, by_row, gradient = differentiated(module, single(ROWS), loss)
        assert_reads(reading, expected, wanted)
        np.testing.assert_allclose(by_row, expected.slopes @ weight, atol=2e-5)
        assert bool(gradient) == (way != "slopes ready")
        if gradient:
            np.testing.assert_allclose(gradient["weight"], expected.slopes.T @ ROWS, atol=2e-5)
            np.testing.assert_allclose(gradient["bias"], expected.slopes.sum(axis=0), atol=2e-5)


def test_each_way_is_taken_where_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    functions = ("_kept", "_recomputed", "_with_slopes_ready", "_with_slopes_kept")
    for name in functions:
        own = getattr(vocabulary, name)

        def noted(*more: Any, own: Any = own, name: str = name) -> Any:
            taken.append(name)
            return own(*more)

        monkeypatch.setattr(vocabulary, name, noted)
    frozen = linear()
    frozen.freeze()

    def take(way: str, module: nn.Module, wanted: Wanted = WANTED["entropy"], **more: Any) -> str:
        mx.eval(reader(way, wanted, 1.0, **more)(module, module, single(ROWS)).logprobs)
        return taken.pop()

    assert [take(way, frozen if way == "slopes ready" else linear()) for way in WAYS] == list(functions)
    assert take("slopes ready", frozen, chunk_elements=1) == "_with_slopes_ready"
    # Slopes of a head that trains are kept for one chunk alone, and one number per row carries them.
    assert take("slopes kept", linear(), chunk_elements=1) == "_recomputed"
    for name in ("entropy with gradient", "kl", "everything"):
        assert take("slopes kept", linear(), WANTED[name]) == "_recomputed"
        assert take("slopes ready", frozen, WANTED[name]) == "_recomputed"


@pytest.mark.parametrize("way", ["kept", "recomputed", "slopes kept"])
def test_a_tied_embedding_learns_as_head_and_as_input(path: str, way: str) -> None:
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    weight = draw(VOCABULARY, WIDTH, seed=5)
    embedding.weight = single(weight)
    ids = np.array([1, 2, 2, 5, 0, 10, 2])
    wanted = WANTED["entropy"]
    read = reader(way, wanted, 0.7, chunk_elements=VOCABULARY * (N if way == "slopes kept" else 3))
    _, gradient = nn.value_and_grad(
        embedding, lambda: total(read(embedding.as_linear, embedding, embedding(mx.array(ids))))
    )()
    rows = weight[ids]
    slopes = by_hand(rows @ weight.T, TARGETS, 0.7, WEIGHTS, wanted).slopes
    expected = slopes.T @ rows
    np.add.at(expected, ids, slopes @ weight)
    np.testing.assert_allclose(np.array(gradient["weight"]), expected, atol=2e-5)


@pytest.mark.parametrize("chunk", [None, 2 * VOCABULARY])
@pytest.mark.parametrize("way", ["kept", "recomputed", "slopes kept"])
def test_the_adapter_of_a_head_learns_and_its_base_does_not(path: str, way: str, chunk: int | None) -> None:
    base = linear()
    base.freeze()
    adapted = LoRALinear.from_base(base, r=2, scale=3.0, dropout=0.0)
    down, up = draw(WIDTH, 2, seed=8), draw(2, VOCABULARY, seed=9)
    adapted.lora_a, adapted.lora_b = single(down), single(up)
    weight, bias = exactly(base.weight), exactly(base.bias)
    z = ROWS @ weight.T + bias + 3.0 * ROWS @ down @ up
    slopes = by_hand(z, TARGETS, 0.7, WEIGHTS, Wanted()).slopes
    read = reader(way, Wanted(), 0.7, chunk_elements=chunk)

    def loss(rows: mx.array) -> tuple[mx.array, Reading]:
        reading = read(adapted, adapted, rows)
        return total(reading), reading

    _, by_row, gradient = differentiated(adapted, single(ROWS), loss)
    assert gradient.keys() == {"lora_a", "lora_b"}
    scale = np.abs(slopes).max() * np.abs(ROWS).max() * 10
    np.testing.assert_allclose(gradient["lora_b"], 3 * (ROWS @ down).T @ slopes, atol=1e-6 * scale)
    np.testing.assert_allclose(gradient["lora_a"], 3 * ROWS.T @ slopes @ up.T, atol=1e-6 * scale)
    np.testing.assert_allclose(by_row, slopes @ (weight + 3 * (down @ up).T), atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy with gradient"])
@pytest.mark.parametrize("way", ["kept", "recomputed", "slopes ready"])
def test_a_frozen_quantised_head_lets_the_rows_learn(path: str, way: str, name: str) -> None:
    plain = nn.Linear(64, 32)
    plain.weight = single(draw(32, 64, seed=5) / 4)
    head = nn.QuantizedLinear.from_linear(plain, group_size=32, bits=4)
    head.freeze()
    weight = mx.dequantize(head.weight, head.scales, head.biases, group_size=32, bits=4)
    exact, bias = exactly(weight), exactly(head.bias)
    rows, wanted = draw(N, 64, seed=7), WANTED[name]
    expected = by_hand(rows @ exact.T + bias, TARGETS, 0.7, WEIGHTS, wanted)
    read = reader(way, wanted, 0.7, chunk_elements=64)

    def loss(rows: mx.array) -> tuple[mx.array, Reading]:
        reading = read(head, head, rows)
        return total(reading), reading

    reading, by_row, gradient = differentiated(head, single(rows), loss)
    assert not gradient
    assert_reads(reading, expected, wanted, atol=2e-5)
    np.testing.assert_allclose(by_row, expected.slopes @ exact, atol=5e-5)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy with gradient", "everything"])
@pytest.mark.parametrize("way", WAYS)
def test_sixteen_bit_logits_are_summed_in_thirty_two(path: str, way: str, name: str) -> None:
    wanted, module = WANTED[name], linear()
    module.set_dtype(mx.bfloat16)
    if way == "slopes ready":
        module.freeze()
    rows = single(ROWS).astype(mx.bfloat16)
    z = exactly(module(rows))
    expected = by_hand(z, TARGETS, 0.7, WEIGHTS, wanted, REF_ROWS @ REF_WEIGHT.T)
    read = reader(way, wanted, 0.7)

    def loss(rows: mx.array) -> tuple[mx.array, Reading]:
        reading = read(module, module, rows)
        return total(reading), reading

    reading, by_row, gradient = differentiated(module, rows, loss)
    assert reading.logprobs.dtype == mx.float32
    assert_reads(reading, expected, wanted, atol=1e-5)
    weight = exactly(module.weight)
    near = 0.08 * np.abs(expected.slopes).max()
    np.testing.assert_allclose(by_row, expected.slopes @ weight, atol=near)
    if gradient:
        np.testing.assert_allclose(gradient["weight"], expected.slopes.T @ ROWS, atol=near)


# Numbers at the edge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy with gradient", "everything"])
@pytest.mark.parametrize("way", WAYS)
def test_forbidden_tokens_add_nothing_and_learn_nothing(path: str, way: str, name: str) -> None:
    """A bias of -inf, at the target of no row."""
    wanted, module = WANTED[name], linear()
    forbidden = [1, 4, 9]
    bias = exactly(module.bias)
    bias[forbidden] = -np.inf
    module.bias = single(bias)
    if way == "slopes ready":
        module.freeze()
    weight = exactly(module.weight)
    expected = by_hand(ROWS @ weight.T + bias, TARGETS, 0.7, WEIGHTS, wanted, REF_ROWS @ REF_WEIGHT.T)
    read = reader(way, wanted, 0.7)

    def loss(rows: mx.array) -> tuple[mx.array, Reading]:
        reading = read(module, module, rows)
        return total(reading), reading

    reading, by_row, gradient = differentiated(module, single(ROWS), loss)
    assert np.isfinite(expected.logprobs).all()
    assert_reads(reading, expected, wanted)
    np.testing.assert_allclose(by_row, expected.slopes @ weight, atol=2e-5)
    if gradient:
        assert not gradient["weight"][forbidden].any()
        assert not gradient["bias"][forbidden].any()
        np.testing.assert_allclose(gradient["weight"], expected.slopes.T @ ROWS, atol=2e-5)


@pytest.mark.parametrize("name", ["logprobs", "entropy with gradient"])
@pytest.mark.parametrize("way", WAYS)
def test_logits_far_from_zero_do_not_overflow(path: str, way: str, name: str) -> None:
    wanted, module = WANTED[name], linear()
    bias = 1e4 * draw(VOCABULARY, seed=10)
    bias[7] = bias.max()  # two tokens that are equally likely, or nearly
    module.bias = single(bias)
    if way == "slopes ready":
        module.freeze()
    weight = exactly(module.weight)
    z = (ROWS @ weight.T + bias).astype(np.float32).astype(np.float64)
    expected = by_hand(z, TARGETS, 0.7, WEIGHTS, wanted)
    read = reader(way, wanted, 0.7)

    def loss(rows: mx.array) -> tuple[mx.array, Reading]:
        reading = read(module, module, rows)
        return total(reading), reading

    reading, by_row, _ = differentiated(module, single(ROWS), loss)
    assert np.abs(expected.logprobs).max() > 1e4
    # A float32 of this size has steps of a thousandth, and the matrix product has rounded too.
    assert_reads(reading, expected, wanted, atol=2e-2)
    np.testing.assert_allclose(by_row, expected.slopes @ weight, atol=2e-2)


@pytest.mark.parametrize("way", WAYS)
def test_one_row_is_enough(path: str, way: str) -> None:
    module, wanted = linear(), WANTED["entropy"]
    weight, bias = exactly(module.weight), exactly(module.bias)
    if way == "slopes ready":
        module.freeze()
    rows = ROWS[:1]
    expected = by_hand(rows @ weight.T + bias, TARGETS[:1], 0.7, WEIGHTS[:, :1], wanted)
    read = reader(way, wanted, 0.7)

    def loss(rows: mx.array) -> tuple[mx.array, Reading]:
        reading = read(module, module, rows)
        return total(reading, WEIGHTS[:, :1]), reading

    reading, by_row, _ = differentiated(module, single(rows), loss)
    assert_reads(reading, expected, wanted)
    np.testing.assert_allclose(by_row, expected.slopes @ weight, atol=1e-5)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy with gradient"])
def test_blocks_that_threads_share_come_together_again(
    monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    """Enough rows for several blocks, and two threads whatever the machine has."""
    monkeypatch.setattr(host_math, "_BLOCK", 5000)
    monkeypatch.setattr(host_math, "_PARALLEL", 1)
    monkeypatch.setattr(host_math, "_threads", lambda: 2)
    wanted, n, v = WANTED[name], 100, 300
    z, targets, weights = draw(n, v, seed=1), np.arange(n) * 3 % v, draw(3, n, seed=2)
    expected = by_hand(z, targets, 0.7, weights, wanted)

    def loss(logits: mx.array) -> mx.array:
        return total(read_vocabulary(logits, lambda x: x, mx.array(targets), 0.7, wanted=wanted), weights)

    value, slopes = mx.value_and_grad(loss)(single(z))
    both = (weights[0] * expected.logprobs).sum() + wanted.entropy * (weights[1] * expected.entropy).sum()
    assert float(value) == pytest.approx(both, abs=1e-3)
    np.testing.assert_allclose(np.array(slopes), expected.slopes, atol=1e-5)


# What is in place and what is kept ---------------------------------------------------------------------


@pytest.mark.parametrize("name", WANTED)
def test_logits_that_the_caller_holds_are_not_written_over(path: str, name: str) -> None:
    wanted = WANTED[name]
    z = draw(N, VOCABULARY, seed=1)
    logits, ref, targets = single(z), single(REF_ROWS @ REF_WEIGHT.T), mx.array(TARGETS)
    view = logits[:]  # and another name for the same memory, perhaps
    mx.eval(logits, ref, targets, view)

    def loss(x: mx.array) -> mx.array:
        reading = read_vocabulary(
            x, lambda z: z, targets, 0.7, wanted=wanted, reference=Reference(ref, lambda z: z)
        )
        return total(reading) + mx.sum(x * x)

    value, gradient = mx.value_and_grad(loss)(logits)
    mx.eval(value, gradient, loss(logits))
    for x, before in ((logits, z), (view, z), (ref, REF_ROWS @ REF_WEIGHT.T), (targets, TARGETS)):
        assert np.array_equal(np.array(x), before.astype(np.array(x).dtype))
    expected = by_hand(z, TARGETS, 0.7, WEIGHTS, wanted, REF_ROWS @ REF_WEIGHT.T)
    np.testing.assert_allclose(np.array(gradient), expected.slopes + 2 * z, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_weights_are_as_they_were(path: str, way: str) -> None:
    module, rows = linear(), single(ROWS)
    if way == "slopes ready":
        module.freeze()
    mx.eval(rows, module.parameters())
    read = reader(way, WANTED["entropy"], 0.7)

    def loss(x: mx.array) -> tuple[mx.array, Reading]:
        reading = read(module, module, x)
        return total(reading), reading

    before = [np.array(x, copy=True) for x in (rows, module.weight, module.bias)]
    held = (rows, module.weight, module.bias)
    mx.eval(read(module, module, rows).logprobs)
    differentiated(module, rows, loss)
    assert all(np.array_equal(np.array(x), y) for x, y in zip(held, before, strict=True))
    # The module has its own arrays again, none of those that were put in its place.
    assert module.weight is held[1]
    assert module.bias is held[2]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_numbers_come_again_however_often_and_in_whatever_order(path: str, way: str) -> None:
    """State that is kept from forward to backward belongs to one call of the loss alone."""
    module = linear()
    weight, bias = exactly(module.weight), exactly(module.bias)
    if way == "slopes ready":
        module.freeze()
    wanted = WANTED["entropy"]
    read = reader(way, wanted, 0.7)
    other = draw(N, WIDTH, seed=20)

    def slopes(rows: np.ndarray, weights: np.ndarray = WEIGHTS) -> np.ndarray:
        slope: np.ndarray = by_hand(rows @ weight.T + bias, TARGETS, 0.7, weights, wanted).slopes @ weight
        return slope

    def loss(rows: mx.array) -> mx.array:
        return total(read(module, module, rows))

    differentiate = mx.grad(loss)
    ours, theirs = single(ROWS), single(other)
    first = differentiate(ours)
    mx.eval(loss(theirs))  # a value without a gradient in between
    second, third = differentiate(theirs), differentiate(ours)  # neither evaluated before the other is begun
    for gradient, rows in ((third, ROWS), (second, other), (first, ROWS)):
        np.testing.assert_allclose(np.array(gradient), slopes(rows), atol=1e-5)

    # Twice in one loss, on different rows; the first read is differentiated last.
    def twice(a: mx.array, b: mx.array) -> mx.array:
        first, _unused, second = read(module, module, a), read(module, module, b), read(module, module, b)
        return total(second) + 2 * total(first)

    by_a, by_b = mx.grad(twice, argnums=(0, 1))(ours, theirs)
    np.testing.assert_allclose(np.array(by_a), 2 * slopes(ROWS), atol=2e-5)
    np.testing.assert_allclose(np.array(by_b), slopes(other), atol=1e-5)

    # One reading that stands in the loss twice, and whose value is used outside too.
    def squared(rows: mx.array) -> tuple[mx.array, mx.array]:
        reading = read(module, module, rows)
        return total(reading) + mx.sum(reading.logprobs * reading.logprobs), reading.logprobs

    (_, logprobs), gradient = mx.value_and_grad(squared)(ours)
    exact = by_hand(ROWS @ weight.T + bias, TARGETS, 0.7, WEIGHTS, wanted).logprobs
    np.testing.assert_allclose(np.array(logprobs), exact, atol=3e-6)
    np.testing.assert_allclose(
        np.array(gradient), slopes(ROWS, np.stack([WEIGHTS[0] + 2 * exact, *WEIGHTS[1:]])), atol=5e-5
    )

    # Computed again in the backward, as a checkpoint does.
    again = mx.grad(lambda rows: mx.checkpoint(loss)(rows))(ours)
    np.testing.assert_allclose(np.array(again), slopes(ROWS), atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_value_can_be_differentiated_within_another_differentiation(path: str, way: str) -> None:
    module = linear()
    if way == "slopes ready":
        module.freeze()
    read = reader(way, Wanted(), 0.7)

    def loss(rows: mx.array) -> mx.array:
        return total(read(module, module, rows))

    def both(rows: mx.array) -> mx.array:
        value, _ = mx.value_and_grad(loss)(rows)
        return value

    rows = single(ROWS)
    if way == "slopes kept":  # they have been used up: no number is better than a wrong one
        with pytest.raises(RuntimeError, match="differentiated once"):
            mx.grad(both)(rows)
        return
    np.testing.assert_allclose(np.array(mx.grad(both)(rows)), np.array(mx.grad(loss)(rows)), atol=1e-6)


# Memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy with gradient", "kl"])
@pytest.mark.parametrize("way", ["recomputed", "slopes ready"])
def test_memory_does_not_grow_with_the_number_of_rows(path: str, way: str, name: str) -> None:
    width, size = 8, 4096
    module = nn.Linear(width, size, bias=False)
    if way == "slopes ready":
        module.freeze()
    wanted = WANTED[name]
    ref_weight = mx.random.normal((size, width), key=mx.random.key(1))

    def peak(n: int) -> int:
        rows = mx.random.normal((n, width), key=mx.random.key(0))
        mx.eval(rows, ref_weight, module.parameters())

        def loss(parameters: Any, rows: mx.array) -> mx.array:
            module.update(parameters)
            reading = read_vocabulary(
                rows,
                module,
                mx.zeros((n,), dtype=mx.int32),
                0.7,
                wanted=wanted,
                reference=Reference(rows, lambda h: h @ ref_weight.T) if wanted.kl else None,
                head_module=module,
                for_gradient=way == "slopes ready",
                chunk_elements=16 * size,
            )
            parts = [x for x in reading if x is not None]
            return sum((mx.sum(x) for x in parts), mx.zeros(()))

        own = module.trainable_parameters()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        value, gradient = mx.value_and_grad(loss, argnums=(0, 1))(own, rows)
        mx.eval(value, gradient)
        module.update(own)
        return mx.get_peak_memory() - before

    peak(16)
    few, many = peak(128), peak(512)
    chunk = 16 * size * 4  # bytes
    assert few >= chunk
    assert many - few < 6 * chunk  # of 24 chunks more: in what order MLX computes is not always the same


@pytest.mark.parametrize("limit", [0, -1])
def test_a_chunk_has_room_for_one_logit_at_least(limit: int) -> None:
    with pytest.raises(ValueError, match="chunk_elements must be at least 1"):
        read_vocabulary(mx.zeros((1, 3)), lambda z: z, mx.array([0]), chunk_elements=limit)
