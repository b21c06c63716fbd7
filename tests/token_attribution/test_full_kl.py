"""The exact KL: against float64 sums over small vocabularies, and every way of chunking against none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.lora import LoRALinear

from models.sft_model import share_weights
from token_attribution.extractor import pad_sequences
from token_attribution.full_kl import full_kl, full_kl_from_states
from token_attribution.trunk import Trunk, find_trunk

TOKENS, MASK = pad_sequences(
    [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], [[7, 8, 9, 10, 3, 2], [2, 5], [1]]
)  # (3, 9), (3, 8) with 9 True
VOCABULARY = 61


def same(x: mx.array) -> mx.array:
    return x


# The formula -----------------------------------------------------------------------------------------------


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl_by_hand(z: np.ndarray, z_ref: np.ndarray, temperature: float) -> np.ndarray:
    logp, logq = log_softmax(z / temperature), log_softmax(z_ref / temperature)
    return (np.exp(logp) * (logp - logq)).sum(axis=-1)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).normal(size=shape)


SMALL_MASK = np.array([[True, False, True, True], [False, True, True, False]])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_value_and_gradient_are_those_of_float64_arithmetic(rows: int, temperature: float) -> None:
    z, z_ref, weights = draw(2, 4, 7), draw(2, 4, 7, seed=1), draw(2, 4, seed=2)
    z_ref = z_ref.astype(np.float32).astype(np.float64)
    z = z.astype(np.float32).astype(np.float64)

    def kl(logits: mx.array) -> mx.array:
        return full_kl_from_states(
            logits, same, mx.array(z_ref), same, mx.array(SMALL_MASK), temperature, chunk_elements=7 * rows
        )

    expected = np.where(SMALL_MASK, kl_by_hand(z, z_ref, temperature), 0)
    assert expected[SMALL_MASK].min() > 0.1
    np.testing.assert_allclose(np.array(kl(mx.array(z))), expected, atol=2e-6)

    def total(z: np.ndarray) -> float:
        return float((weights * np.where(SMALL_MASK, kl_by_hand(z, z_ref, temperature), 0)).sum())

    ours = mx.grad(lambda x: mx.sum(mx.array(weights) * kl(x)))(mx.array(z))
    differences, small = np.zeros_like(z), 1e-6
    for at in np.ndindex(*z.shape):
        nudge = np.zeros_like(z)
        nudge[at] = small
        differences[at] = (total(z + nudge) - total(z - nudge)) / (2 * small)
    np.testing.assert_allclose(np.array(ours), differences, atol=5e-6)
    assert not np.array(ours)[~SMALL_MASK].any()


def test_logits_in_sixteen_bits_are_summed_in_thirty_two() -> None:
    z, z_ref = (mx.array(draw(1, 2, 50, seed=seed)).astype(mx.bfloat16) for seed in (0, 1))
    mask = mx.array([[True, True]])
    ours = full_kl_from_states(z, same, z_ref, same, mask)
    exact = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (z, z_ref))
    assert ours.dtype == mx.float32
    np.testing.assert_allclose(np.array(ours), kl_by_hand(*exact, 1.0), rtol=1e-5)
    head = nn.Linear(50, 50)
    head.set_dtype(mx.bfloat16)
    for module in (None, head):
        _, gradient = nn.value_and_grad(
            head,
            lambda module=module: mx.sum(full_kl_from_states(z, head, z_ref, same, mask, head_module=module)),
        )()
        assert gradient["weight"].dtype == gradient["bias"].dtype == mx.bfloat16


def test_a_token_that_the_policy_cannot_produce_adds_nothing_and_learns_nothing() -> None:
    z, z_ref = draw(1, 1, 4), draw(1, 1, 4, seed=1)
    z[..., 2] = -np.inf

    def kl(x: mx.array) -> mx.array:
        return mx.sum(full_kl_from_states(x, same, mx.array(z_ref), same, mx.array([[True]])))

    logp, logq = log_softmax(z[..., [0, 1, 3]]), log_softmax(z_ref)[..., [0, 1, 3]]
    value, gradient = mx.value_and_grad(kl)(mx.array(z))
    expected = (np.exp(logp) * (logp - logq)).sum()
    assert float(value) == pytest.approx(expected, abs=1e-6)
    slope = np.exp(logp) * (logp - logq - expected)
    np.testing.assert_allclose(np.array(gradient)[0, 0, [0, 1, 3]], slope[0, 0], atol=1e-6)
    assert float(gradient[0, 0, 2]) == 0


# Whole models ----------------------------------------------------------------------------------------------


def untied(architecture: Callable[[str], nn.Module]) -> tuple[nn.Module, Trunk | None]:
    model = share_weights(architecture("llama"))
    return model.unfreeze(), find_trunk(model)


def tied(architecture: Callable[[str], nn.Module]) -> tuple[nn.Module, Trunk | None]:
    model = share_weights(architecture("qwen2"))
    return model.unfreeze(), find_trunk(model)


def adapted(layer: nn.Module) -> LoRALinear:
    lora = LoRALinear.from_base(layer, r=2, scale=1.0)
    lora.lora_a, lora.lora_b = (
        0.3 * mx.random.normal(x.shape, key=mx.random.key(x.shape[0])) for x in (lora.lora_a, lora.lora_b)
    )
    return lora


def lora_on_the_head(architecture: Callable[[str], nn.Module]) -> tuple[nn.Module, Trunk | None]:
    model = share_weights(architecture("llama")).freeze()
    trunk = find_trunk(model)  # before the adapter is there
    model.lm_head = adapted(model.lm_head)
    return model, trunk


def lora_on_attention(architecture: Callable[[str], nn.Module]) -> tuple[nn.Module, Trunk | None]:
    model = share_weights(architecture("llama")).freeze()
    trunk = find_trunk(model)
    model.layers[0].self_attn.q_proj = adapted(model.layers[0].self_attn.q_proj)
    return model, trunk


POLICIES = [untied, tied, lora_on_the_head, lora_on_attention]


def other_weights(model: nn.Module) -> nn.Module:
    """A reference over the same vocabulary that predicts something else."""
    reference = share_weights(model)
    reference.update(
        tree_map(lambda x: 0.8 * x + 0.02 if x.dtype == mx.float32 else x, reference.parameters())
    )
    return reference.freeze()


def position_weights() -> mx.array:
    return mx.random.uniform(0.5, 1.5, MASK.shape, key=mx.random.key(5))


def all_at_once(model: nn.Module, reference: nn.Module, temperature: float) -> mx.array:
    """Every position through both models, MLX's own gradient of the sum as it stands in the books."""
    z, z_ref = (m(TOKENS[:, :-1]) / temperature for m in (model, reference))
    logp, logq = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (z, mx.stop_gradient(z_ref)))
    return mx.where(MASK, mx.sum(mx.exp(logp) * (logp - logq), axis=-1), 0)


def in_chunks(model: nn.Module, trunk: Trunk, reference: nn.Module, rows: int, recompute: bool) -> mx.array:
    theirs = find_trunk(reference)
    return full_kl_from_states(
        trunk.hidden(TOKENS[:, :-1]),
        trunk.head,
        theirs.hidden(TOKENS[:, :-1]),
        theirs.head,
        MASK,
        0.7,
        head_module=trunk.head_module() if recompute else None,
        chunk_elements=rows * VOCABULARY,
    )


def differentiated(model: nn.Module, kl: Callable[[], mx.array]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The KL of every position, and the gradient of their weighted sum in each trained parameter."""

    def loss() -> tuple[mx.array, mx.array]:
        value = kl()
        return mx.sum(position_weights() * value), value

    (_, value), gradient = nn.value_and_grad(model, loss)()
    return np.array(value), {name: np.array(g) for name, g in tree_flatten(gradient)}


def check_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    size = max(np.abs(g).max() for g in theirs.values())
    for name, g in theirs.items():
        np.testing.assert_allclose(ours[name] / size, g / size, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("make", POLICIES, ids=lambda make: make.__name__)
def test_chunked_and_recomputed_or_not_they_are_the_sum_over_everything(
    architecture: Callable[[str], nn.Module], make: Callable[..., Any]
) -> None:
    model, trunk = make(architecture)
    assert trunk is not None
    reference = other_weights(model)
    value, gradient = differentiated(model, lambda: all_at_once(model, reference, 0.7))
    assert value[np.array(MASK)].min() > 1e-3
    assert all(np.abs(g).max() > 0 for g in gradient.values())
    ways = [(1, True), (3, True), (1000, True), (1, False), (3, False), (1000, False)]
    done = [
        differentiated(
            model, lambda rows=rows, way=way: in_chunks(model, trunk, reference, rows, recompute=way)
        )
        for rows, way in ways
    ]
    for ours, slope in done:
        np.testing.assert_allclose(ours, value, atol=1e-5)
        np.testing.assert_allclose(ours, done[0][0], rtol=1e-6, atol=5e-6)
        check_same(slope, gradient, 1e-5)
        check_same(slope, done[0][1], 5e-6)


def test_a_tied_embedding_learns_as_head_and_as_input(architecture: Callable[[str], nn.Module]) -> None:
    model, trunk = tied(architecture)
    assert trunk is not None
    assert "lm_head" not in model
    reference = other_weights(model)
    _, gradient = differentiated(model, lambda: full_kl(model, reference, TOKENS, MASK))
    states = trunk.hidden(TOKENS[:, :-1])  # a constant below: only the head learns
    theirs = find_trunk(reference)
    _, head_alone = differentiated(
        model,
        lambda: full_kl_from_states(
            states,
            trunk.head,
            theirs.hidden(TOKENS[:, :-1]),
            theirs.head,
            MASK,
            head_module=trunk.head_module(),
        ),
    )
    name = "model.embed_tokens.weight"
    read = np.isin(np.arange(VOCABULARY), np.array(TOKENS[:, :-1]))
    assert np.abs(head_alone[name]).max(axis=1).min() > 0
    size = np.abs(gradient[name]).max()
    np.testing.assert_allclose(gradient[name][~read], head_alone[name][~read], atol=1e-5 * size)
    moved = np.abs(gradient[name] - head_alone[name]).max(axis=1)[read]
    assert np.median(moved) > 1e-3 * size


@pytest.mark.parametrize("make", POLICIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("recompute", [True, False])
def test_a_policy_that_is_its_reference_has_no_kl_and_no_gradient_at_all(
    architecture: Callable[[str], nn.Module], make: Callable[..., Any], recompute: bool
) -> None:
    model, trunk = make(architecture)
    for reference in (share_weights(model).freeze(), model):
        value, gradient = differentiated(
            model, lambda ref=reference: in_chunks(model, trunk, ref, 3, recompute)
        )
        assert not value.any()
        assert not any(g.any() for g in gradient.values())


def test_a_frozen_quantised_head_lets_the_states_learn() -> None:
    """Its packed weights are integers, which nothing can be differentiated by."""
    head = nn.QuantizedLinear.from_linear(nn.Linear(32, 10), group_size=32)
    states, z_ref, mask = mx.array(draw(2, 4, 32)), mx.array(draw(2, 4, 10, seed=1)), mx.array(SMALL_MASK)

    def slope(module: nn.Module | None) -> np.ndarray:
        def loss(x: mx.array) -> mx.array:
            return mx.sum(
                full_kl_from_states(x, head, z_ref, same, mask, head_module=module, chunk_elements=30)
            )

        return np.array(mx.grad(loss)(states))

    assert slope(None).any()
    np.testing.assert_allclose(slope(head), slope(None), atol=1e-6)


def test_the_reference_receives_no_gradient(architecture: Callable[[str], nn.Module]) -> None:
    model, trunk = untied(architecture)
    assert trunk is not None
    reference = other_weights(model).unfreeze()
    for recompute in (True, False):
        value, gradient = differentiated(
            reference, lambda way=recompute: in_chunks(model, trunk, reference, 3, way)
        )
        assert value.any()
        assert not any(g.any() for g in gradient.values())


def test_a_model_that_does_not_show_its_trunk_gives_the_same(
    architecture: Callable[[str], nn.Module],
) -> None:
    model, trunk = untied(architecture)
    reference = other_weights(model)
    shown = differentiated(model, lambda: full_kl(model, reference, TOKENS, MASK, 0.7))
    both = differentiated(model, lambda: all_at_once(model, reference, 0.7))
    for ours, theirs in ((lambda x: model(x), reference), (model, lambda x: reference(x))):
        value, gradient = differentiated(
            model, lambda one=ours, other=theirs: full_kl(one, other, TOKENS, MASK, 0.7)
        )
        np.testing.assert_allclose(value, shown[0], atol=1e-5)
        np.testing.assert_allclose(value, both[0], atol=1e-5)
        check_same(gradient, shown[1], 1e-5)
    value, _ = differentiated(
        model,
        lambda: full_kl(model, reference, TOKENS, MASK, 0.7, trunk=trunk, ref_trunk=find_trunk(reference)),
    )
    assert np.array_equal(value, shown[0])


def test_an_architecture_without_a_visible_head_works(architecture: Callable[[str], nn.Module]) -> None:
    model = share_weights(architecture("gemma2")).unfreeze()  # its logits are capped after the head
    assert find_trunk(model) is None
    reference = other_weights(model)
    value, gradient = differentiated(model, lambda: full_kl(model, reference, TOKENS, MASK, 0.7))
    expected, slope = differentiated(model, lambda: all_at_once(model, reference, 0.7))
    np.testing.assert_allclose(value, expected, atol=1e-5)
    check_same(gradient, slope, 1e-5)


# Positions, chunks and weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [np.inf, -np.inf, np.nan, 1e30])
def test_garbage_where_the_mask_is_false_changes_nothing(garbage: float) -> None:
    head, ref_head = nn.Linear(3, 5), nn.Linear(4, 5)  # the reference may be of another width
    clean, ref_clean = mx.array(draw(2, 4, 3)), mx.array(draw(2, 4, 4, seed=1))
    mask = mx.array(SMALL_MASK)
    dirty, ref_dirty = (mx.where(mask[..., None], x, garbage) for x in (clean, ref_clean))

    def run(states: mx.array, ref_states: mx.array) -> list[np.ndarray]:
        def loss(parameters: Any, states: mx.array) -> mx.array:
            head.update(parameters)
            kl = full_kl_from_states(
                states, head, ref_states, ref_head, mask, head_module=head, chunk_elements=10
            )
            return mx.sum(kl * mx.arange(1.0, 9.0).reshape(2, 4))

        value, (weights, slope) = mx.value_and_grad(loss, argnums=(0, 1))(head.parameters(), states)
        assert not np.array(slope)[~SMALL_MASK].any()
        return [np.array(x) for x in (value, weights["weight"], weights["bias"], slope)]

    for ours, theirs in zip(run(dirty, ref_dirty), run(clean, ref_clean), strict=True):
        assert np.isfinite(ours).all()
        assert np.array_equal(ours, theirs)


def test_where_nothing_is_sampled_there_is_no_kl() -> None:
    nowhere = mx.zeros((2, 3), dtype=mx.bool_)
    states = mx.full((2, 3, 4), mx.nan)
    value, gradient = mx.value_and_grad(
        lambda x: mx.sum(full_kl_from_states(x, same, states, same, nowhere))
    )(states)
    assert float(value) == 0
    assert not np.array(gradient).any()


class Watched(nn.Linear):
    """A head that writes down how many rows it is given."""

    def __init__(self) -> None:
        super().__init__(3, 10)
        self._rows: list[int] = []

    def __call__(self, x: mx.array) -> mx.array:
        self._rows.append(x.shape[0])
        return super().__call__(x)


def test_the_head_sees_no_more_rows_than_the_chunk_has_room_for() -> None:
    """The first call, of one row, asks for the shape. 7 rows of 10 logits, and with recomputation twice."""
    head, reference = Watched(), nn.Linear(3, 10)
    states, mask = mx.array(draw(1, 8, 3)), mx.array([[True] * 7 + [False]])

    def rows_seen(head_module: nn.Module | None, chunk_elements: int) -> list[int]:
        def loss() -> mx.array:
            return mx.sum(
                full_kl_from_states(
                    *(states, head, states, reference, mask),
                    head_module=head_module,
                    chunk_elements=chunk_elements,
                )
            )

        head._rows.clear()
        nn.value_and_grad(head, loss)()
        return list(head._rows)

    assert rows_seen(head, 39) == [1, 3, 3, 1, 3, 3, 1]
    assert rows_seen(None, 39) == [1, 3, 3, 1]
    assert rows_seen(None, 5) == [1] * 8  # less than one row is one row
    assert rows_seen(None, 70) == [1, 7]


def test_the_head_has_its_own_arrays_again_afterwards(architecture: Callable[[str], nn.Module]) -> None:
    """An array of the backward pass left in the module would keep its whole graph in memory."""
    model, trunk = untied(architecture)
    assert trunk is not None
    reference = other_weights(model)
    held: list[mx.array] = []

    def loss() -> mx.array:
        held.append(model.lm_head.weight)
        kl = mx.sum(in_chunks(model, trunk, reference, 3, recompute=True))
        assert model.lm_head.weight is held[0]
        return kl

    nn.value_and_grad(model, loss)()
    assert model.lm_head.weight is held[0]


def test_what_does_not_fit_is_refused() -> None:
    states, mask = mx.zeros((1, 2, 3)), mx.array([[True, False]])
    with pytest.raises(ValueError, match="must begin with mask"):
        full_kl_from_states(states[:, :1], same, states, same, mask)
    with pytest.raises(ValueError, match="must begin with mask"):
        full_kl_from_states(states, same, states[:, :1], same, mask)
    with pytest.raises(ValueError, match="logits"):  # two vocabularies
        full_kl_from_states(states, same, states[..., :2], same, mask)
    with pytest.raises(ValueError, match="chunk_elements must be at least 1"):
        full_kl_from_states(states, same, states, same, mask, chunk_elements=0)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        full_kl_from_states(states, same, states, same, mask, 0.0)
    with pytest.raises(ValueError, match=r"must be \(B, T\+1\)"):
        full_kl(same, same, mx.array([[1, 2]]), mx.array([[True, True]]))  # type: ignore[arg-type]
