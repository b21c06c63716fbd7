"""Rows side by side: thresholds one after another, rows that leave, a shared prefill, further architectures."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import _get_classes

from config.model_config import ModelConfig
from models.decoding import Completion, complete
from models.prefix_cache import Columns, GroupCache
from models.sampling import Sampling, draw, sampling_weights, uniforms_for
from models.sft_model import build_embedded

SMALL = ModelConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_layers=2,
    intermediate_size=64,
    init_std=0.3,
)
PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_embedded(SMALL, seed=1).model


def weights(**options: Any) -> list[float]:
    logits = mx.log(mx.array([PROBABILITIES]))
    return [round(x, 4) for x in sampling_weights(logits, Sampling(**options))[0].tolist()]


def sample(
    model: nn.Module,
    prompts: list[list[int]],
    rows: list[int],
    names: list[int],
    ends: frozenset[int] = frozenset(),
    length: int = 10,
    **sampling: Any,
) -> list[Completion]:
    """One completion per row; ``names`` choose each row's random numbers."""
    uniforms = np.stack([uniforms_for(0, 0, name, 0, length) for name in names])
    return complete(
        model, prompts, rows, uniforms, end_ids=ends, max_new_tokens=length, sampling=Sampling(**sampling)
    )


def full_forward(
    model: nn.Module, prompt: list[int], ids: list[int], temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logprobs of ``ids`` in float64 and each step's likeliest token, from one forward without a cache."""
    logits = np.array(model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]).astype(np.float64)
    z = (logits - logits.max(axis=1, keepdims=True)) / temperature  # (C, V)
    logprobs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return logprobs[np.arange(len(ids)), ids], logits.argmax(axis=1)


# The distribution ------------------------------------------------------------------------------------------


def test_cuts_follow_one_another() -> None:
    """Top-k renormalises before top-p looks: of 0.4, 0.3, 0.15 the first has 8/17 and the first two 14/17."""
    assert weights(top_k=3, top_p=8 / 17 - 0.01) == [1.0, 0, 0, 0, 0]
    assert weights(top_k=3, top_p=8 / 17 + 0.01) == [1.0, 0.75, 0, 0, 0]
    assert weights(top_k=3, top_p=0.99, min_p=0.5) == [1.0, 0.75, 0, 0, 0]
    assert weights(top_p=1e-6) == [1.0, 0, 0, 0, 0]  # the likeliest token always stays
    assert weights(top_k=5) == weights(top_k=6) == weights()  # as many as there are, or more: all


def test_logits_far_from_zero_keep_their_distribution() -> None:
    logits = mx.log(mx.array([PROBABILITIES]))
    for shift in (-1e4, 1e4):
        moved = np.array(sampling_weights(logits + shift, Sampling()))[0]
        np.testing.assert_allclose(moved, np.array(PROBABILITIES) / 0.4, atol=2e-3)  # float32 at 1e4
    assert sampling_weights(logits.astype(mx.bfloat16), Sampling()).dtype == mx.float32


def test_a_token_of_weight_zero_is_never_drawn_from_a_large_vocabulary() -> None:
    """Zero weights at both ends and in between, at the smallest and the largest uniform there are."""
    generator = np.random.default_rng(0)
    weight = generator.exponential(size=(8, 50_000)).astype(np.float32) ** 4
    weight[:, ::3] = 0
    weight[:, :100] = 0
    weight[:, -100:] = 0
    for u in (0.0, 2.0**-23, 0.5, 1 - 2.0**-23):
        tokens, logprobs = draw(mx.array(weight), mx.full((8,), u))
        chosen = weight[np.arange(8), np.array(tokens)]
        assert (chosen > 0).all()
        expected = np.log(chosen / weight.astype(np.float64).sum(axis=1))
        np.testing.assert_allclose(np.array(logprobs), expected, atol=1e-3)
    lowest, _ = draw(mx.array(weight), mx.zeros(8))
    assert np.array(lowest).tolist() == (weight > 0).argmax(axis=1).tolist()


# Rows ------------------------------------------------------------------------------------------------------


def test_rows_that_leave_do_not_disturb_those_that_stay(model: nn.Module) -> None:
    """Twelve rows, a fifth of the tokens are ends: rows leave one after another, and some never do."""
    prompts, rows, ends = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]], [0, 1, 2] * 4, frozenset(range(0, 259, 5))
    together = sample(model, prompts, rows, list(range(12)), ends)
    assert len({len(c.ids) for c in together}) >= 4
    assert {c.terminated for c in together} == {False, True}
    order = np.random.default_rng(0).permutation(12).tolist()
    shuffled = sample(model, prompts, [rows[i] for i in order], order, ends)
    for place, name in enumerate(order):
        alone = sample(model, [prompts[rows[name]]], [0], [name], ends)[0]
        assert alone.ids == together[name].ids == shuffled[place].ids
        np.testing.assert_allclose(alone.logprobs, together[name].logprobs, atol=1e-5)
        np.testing.assert_allclose(shuffled[place].logprobs, together[name].logprobs, atol=1e-5)
        expected, _ = full_forward(model, prompts[rows[name]], alone.ids)
        np.testing.assert_allclose(together[name].logprobs, expected, atol=1e-4)


def test_a_group_that_shares_a_prefill_is_decoded_as_each_of_it_alone(model: nn.Module) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    group = sample(model, [prompt], [0] * 6, list(range(6)))
    separate = sample(model, [prompt] * 6, list(range(6)), list(range(6)))
    assert [c.ids for c in group] == [c.ids for c in separate]
    assert len({tuple(c.ids) for c in group}) == 6  # their random numbers differ
    for one, other in zip(group, separate, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 70])
def test_the_length_limit_cuts_a_completion_off(model: nn.Module, count: int) -> None:
    """70 is more than the columns that a cache grows by at a time."""
    prompts = [[1, 2, 3], [4]]
    completions = sample(model, prompts, [0, 1], [0, 1], length=count, temperature=0.7)
    assert [(len(c.ids), c.terminated) for c in completions] == [(count, False)] * 2
    for prompt, completion in zip(prompts, completions, strict=True):
        expected, _ = full_forward(model, prompt, completion.ids, 0.7)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_an_end_token_in_the_last_place_ends_the_completion(model: nn.Module) -> None:
    free = sample(model, [[1, 2, 3]], [0], [0])[0]
    assert free.ids.count(free.ids[-1]) == 1
    ended = sample(model, [[1, 2, 3]], [0], [0], frozenset([free.ids[-1]]))[0]
    assert ended.ids == free.ids
    assert (free.terminated, ended.terminated) == (False, True)
    first = sample(model, [[1, 2, 3]], [0], [0], frozenset([free.ids[0]]))[0]
    assert (first.ids, first.terminated) == (free.ids[:1], True)


# Caches ----------------------------------------------------------------------------------------------------


def test_a_windowed_row_sees_the_newest_columns_of_its_own() -> None:
    """Prompts of 3 and 1 tokens in 3 columns, one token decoded, the next one at column 4; a window of 3."""
    prompt = KVCache()
    prompt.update_and_fetch(mx.zeros((2, 1, 3, 4)), mx.zeros((2, 1, 3, 4)))
    columns = Columns()
    columns.enter([3, 1])
    cache = GroupCache(columns, rows=2)
    cache.enter(prompt, [0, 1])
    columns.advance()
    cache.update_and_fetch(mx.zeros((2, 1, 1, 4)), mx.zeros((2, 1, 1, 4)))
    columns.advance()
    assert cache.offset.tolist() == [4, 2]
    whole, window = cache.make_mask(1), cache.make_mask(1, window_size=3)
    assert whole is not None
    assert window is not None
    assert whole[:, 0, 0].astype(mx.int32).tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]
    assert window[:, 0, 0].astype(mx.int32).tolist() == [[0, 0, 1, 1, 1], [1, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="one token at a time, not 2"):
        cache.make_mask(2)


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
#: What tests/conftest.py does not have: recurrent beside full attention, one key head for all, two key heads.
FURTHER: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "num_hidden_layers": 4,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
    "gpt_bigcode": {
        "n_embd": 32,
        "n_layer": 2,
        "n_inner": 64,
        "n_head": 2,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
    },
    "gemma2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16.0,
    },
}


def far_from_uniform(name: str) -> nn.Module:
    """Weights of N(0, 0.3²), so that attention and its masks matter."""
    config = {**SHAPE, **FURTHER[name], "model_type": name}
    model_class, args_class = _get_classes(config)
    mx.random.seed(3)
    model = model_class(args_class.from_dict(config))
    parameters = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(1), len(parameters))
    drawn = [
        (path, x if x.ndim < 2 else mx.random.normal(x.shape, scale=0.3, key=key))
        for (path, x), key in zip(parameters, keys, strict=True)
    ]
    model.update(tree_unflatten(drawn))
    model.eval()
    mx.eval(model.parameters())
    return model


# As many rows as gemma2 has key heads (2), and more: a mask that lands on the wrong axis fits by chance.
@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 1]], ids=["two-rows", "four-rows"])
@pytest.mark.parametrize("name", FURTHER)
def test_ragged_prompts_are_decoded_as_the_full_forward(name: str, rows: list[int]) -> None:
    """Prompts of 7, 2 and 2 tokens: the likeliest tokens, and logprobs at T = 0.7."""
    model = far_from_uniform(name)
    prompts, names = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11]], list(range(len(rows)))
    greedy = sample(model, prompts, rows, names, temperature=0)
    sampled = sample(model, prompts, rows, names, temperature=0.7)
    for row, likeliest, drawn in zip(rows, greedy, sampled, strict=True):
        assert full_forward(model, prompts[row], likeliest.ids)[1].tolist() == likeliest.ids
        expected, _ = full_forward(model, prompts[row], drawn.ids, 0.7)
        np.testing.assert_allclose(drawn.logprobs, expected, atol=1e-4)
