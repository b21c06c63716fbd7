"""Rows that share prompts: each of them must come out as if it had its prompt to itself, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from models.prefix_cache import Columns, GroupCache, SharedCache, cache_for
from models.sft_model import share_weights
from token_attribution import host_attention, host_kernels, host_math, sampled_states
from token_attribution.host_attention import Grouping, SharedPast, attention_with_cache
from token_attribution.host_kernels import fast_kernels
from token_attribution.trunk import find_trunk

on_host = pytest.mark.skipif(not host_math.usable(), reason="MLX does not compute on the CPU, or it compiles")

ROWS = {
    "in order": [0, 0, 1, 1],
    "mixed": [1, 0, 1, 0],
    "uneven": [0, 1, 0, 0, 1],
    "one each": [0, 1, 2],
    "one prompt": [0, 0, 0],
    "one alone": [0],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_of_a_prompt_stand_together_and_come_apart_again(rows: list[int]) -> None:
    prompts = max(rows) + 1
    grouping = Grouping(np.array(rows), prompts)
    x = np.arange(len(rows) * 2 * 3 * 4).reshape(len(rows), 2, 3, 4).astype(np.float32)
    together = np.array(grouping.together(mx.array(x)))
    size = max(np.bincount(rows))
    assert together.shape == (prompts, 2, size * 3, 4)
    for prompt in range(prompts):
        members = [row for row in range(len(rows)) if rows[row] == prompt]
        for place, row in enumerate(members):
            assert np.array_equal(together[prompt, :, place * 3 : place * 3 + 3], x[row])
    assert np.array_equal(np.array(grouping.apart(mx.array(together))), x)
    blocks = grouping.blocks(1, 2)  # one key head of two query heads
    seen = list(zip(blocks.rows.tolist(), blocks.heads.tolist(), strict=True))
    assert len(seen) == prompts * size * 2
    first = [row for row in range(len(rows)) if rows[row] == 0]
    assert seen[: 2 * len(first)] == [(row, head) for row in first for head in (0, 1)]


class _Cache:
    def __init__(self, past: SharedPast) -> None:
        self.past = past


def masks(b: int, heads: int, n: int, prompt: int, own: int) -> dict[str, Any]:
    random = np.random.default_rng(9)
    per_row = random.random((b, 1, n, prompt + own)) > 0.4
    per_row[..., -own] = True  # nobody is left with nothing
    per_head = random.random((b, heads, n, prompt + own)) > 0.4
    per_head[..., 0] = True
    found: dict[str, Any] = {
        "causal": "causal",
        "per row": per_row,
        "per head": per_head,
        "same": per_row[:1],
    }
    return found | ({"none": None} if n == 1 else {})


@on_host
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (2, 1)], ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_attention_to_a_shared_prompt_is_attention_to_a_copy_of_it(
    rows: list[int], heads: tuple[int, int], n: int
) -> None:
    random = np.random.default_rng(0)
    b, prompts, width, own = len(rows), max(rows) + 1, 6, max(n, 3)
    shapes = {
        "queries": (b, heads[0], n, 8),
        "keys": (b, heads[1], own, 8),
        "values": (b, heads[1], own, 8),
        "past keys": (prompts, heads[1], width, 8),
        "past values": (prompts, heads[1], width, 8),
    }
    arrays = [mx.array(random.normal(size=shape).astype(np.float32)) for shape in shapes.values()]
    cotangent = mx.array(random.normal(size=shapes["queries"]).astype(np.float32))

    for name, mask in masks(b, heads[0], n, width, own).items():
        seen = mx.array(mask) if isinstance(mask, np.ndarray) else mask

        def shared(
            q: mx.array, k: mx.array, v: mx.array, pk: mx.array, pv: mx.array, seen: Any = seen
        ) -> mx.array:
            cache = _Cache(SharedPast(pk, pv, Grouping(np.array(rows), prompts)))
            return attention_with_cache(q, k, v, cache, 0.3, seen)

        def copied(
            q: mx.array, k: mx.array, v: mx.array, pk: mx.array, pv: mx.array, seen: Any = seen
        ) -> mx.array:
            whose = mx.array(rows)
            keys, values = mx.concatenate([pk[whose], k], axis=2), mx.concatenate([pv[whose], v], axis=2)
            return host_attention.own_attention(q, keys, values, scale=0.3, mask=seen)

        (ours,), slopes = mx.vjp(shared, arrays, [cotangent])
        (theirs,), expected = mx.vjp(copied, arrays, [cotangent])
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-5, err_msg=name)
        for part, slope, wanted in zip(shapes, slopes, expected, strict=True):
            np.testing.assert_allclose(
                np.array(slope), np.array(wanted), atol=2e-5, err_msg=f"{name}, {part}"
            )


@on_host
@pytest.mark.parametrize("kind", ["bfloat16", "sinks", "an additive mask"])
def test_what_is_not_plain_float32_gets_a_copy_of_its_prompt(kind: str) -> None:
    random = np.random.default_rng(1)
    q, k, v, pk, pv = (mx.array(random.normal(size=(2, 2, n, 8)).astype(np.float32)) for n in (3, 3, 3, 4, 4))
    options: dict[str, Any] = {"mask": "causal"}
    if kind == "bfloat16":
        q, k, v, pk, pv = (x.astype(mx.bfloat16) for x in (q, k, v, pk, pv))
    elif kind == "sinks":
        options["sinks"] = mx.array([0.5, -0.5])
    else:
        options["mask"] = mx.array(random.normal(size=(3, 7)).astype(np.float32))
    cache = _Cache(SharedPast(pk, pv, Grouping(np.array([1, 0]), 2)))
    ours = attention_with_cache(q, k, v, cache, 0.3, **options)
    keys, values = (mx.concatenate([mx.stack([x[1], x[0]]), own], axis=2) for x, own in ((pk, k), (pv, v)))
    assert mx.array_equal(ours, host_attention.own_attention(q, keys, values, scale=0.3, **options))


# Caches ------------------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_decoding_shares_prompts_where_attention_is_what_we_think(
    architecture: Callable[[str], nn.Module], name: str
) -> None:
    """gemma2 multiplies keys and queries by itself, and does not ask for the past."""
    model = architecture(name)
    trunk = find_trunk(model)
    prompts = make_prompt_cache(model)
    model(mx.array([[1, 2, 3]]), cache=prompts)
    keys, values = prompts[0].keys_and_values()
    enough = -(-(1 << 18) // (keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]))
    assert cache_for(model, trunk, prompts, enough) is (GroupCache if name == "gemma2" else SharedCache)
    assert cache_for(model, trunk, prompts, enough - 1) is GroupCache
    assert cache_for(model, None, prompts, enough) is GroupCache
    assert cache_for(model, trunk, [], enough) is GroupCache
    for cache in prompts:
        cache.keys, cache.values = (x.astype(mx.bfloat16) for x in (cache.keys, cache.values))
    assert cache_for(model, trunk, prompts, enough) is GroupCache


@on_host
def test_a_cache_that_shares_gives_out_everything_where_nobody_would_look_up_the_past() -> None:
    columns = Columns()
    columns.enter([2, 2, 2], [7, 5, 7])
    cache = SharedCache(columns, 3)
    prompts = [mx.full((1, 1, 2, 4), value) for value in (7.0, 5.0)]

    class Filled:
        def keys_and_values(self) -> tuple[mx.array, mx.array]:
            return mx.concatenate(prompts), mx.concatenate(prompts)

    cache.enter(Filled(), [0, 1, 0])  # type: ignore[arg-type]
    columns.advance()
    new = mx.full((3, 1, 1, 4), 1.0)
    keys, _ = cache.update_and_fetch(new, new)
    assert np.array(keys)[:, 0, :, 0].tolist() == [[7, 7, 1], [5, 5, 1], [7, 7, 1]]
    with fast_kernels():
        keys, _ = cache.update_and_fetch(new, new)
    assert keys.shape == (3, 1, 1, 4)
    columns.keep(np.array([1]))  # the second row's prompt alone
    cache.keep(np.array([1]))
    assert np.array(cache.past.keys)[:, 0, 0, 0].tolist() == [5]
    columns.enter([2], [7])
    cache.enter(Filled(), [0])  # type: ignore[arg-type]
    assert np.array(cache.past.keys)[:, 0, 0, 0].tolist() == [5, 7]
    assert cache.past.rows.prompt_of.tolist() == [0, 1]


# The gradient pass -------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize(("members", "groups"), [((3, 3), True), ((2, 3), True), ((1, 1, 1, 6), False)])
def test_prompts_are_read_once_unless_groups_are_too_uneven(
    architecture: Callable[[str], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    members: tuple[int, ...],
    groups: bool,
) -> None:
    """Whichever it is, states and the gradient of every weight are those of rows that go through whole."""
    model = share_weights(architecture("llama"))
    trunk = find_trunk(model)
    assert trunk is not None
    random = np.random.default_rng(3)
    prompts = random.integers(0, 60, (len(members), 20))
    completions = random.integers(0, 60, (sum(members), 4))
    tokens = mx.array(np.concatenate([prompts.repeat(members, axis=0), completions], axis=1).astype(np.int32))
    mask = mx.array(np.arange(23) >= 19)[None] & mx.ones((sum(members), 1), dtype=mx.bool_)
    asked: list[SharedPast] = []
    own = host_kernels.attention_with_cache

    def spied(queries: Any, keys: Any, values: Any, cache: Any, *rest: Any, **named: Any) -> mx.array:
        if getattr(cache, "past", None) is not None:
            asked.append(cache.past)
        return own(queries, keys, values, cache, *rest, **named)

    weights = mx.array(random.normal(size=(int(mask.sum()), 1)).astype(np.float32))

    def loss(model: nn.Module) -> mx.array:
        return mx.sum(weights * sampled_states.sampled_states(trunk, tokens, mask).rows)

    assert trunk.sharing is not None
    assert trunk.sharing.takes_groups
    monkeypatch.setattr(host_kernels, "attention_with_cache", spied)
    value, slopes = nn.value_and_grad(model, loss)(model)
    assert bool(asked) is groups
    monkeypatch.setattr(sampled_states, "_worth_sharing", lambda trunk, layout: False)
    plain, expected = nn.value_and_grad(model, loss)(model)
    assert value.item() == pytest.approx(plain.item(), rel=1e-4)
    wanted = dict(tree_flatten(expected))
    for name, slope in tree_flatten(slopes):
        atol = 2e-4 * float(mx.max(mx.abs(wanted[name])))
        np.testing.assert_allclose(
            np.array(slope), np.array(wanted[name]), atol=max(atol, 1e-6), err_msg=name
        )
