"""Sampling: the distribution, the draw, and rows that do not know of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import _get_classes

from config.model_config import ModelConfig
from models import prefix_cache
from models.decoding import Completion, complete
from models.sampling import Sampling, draw, sampling_weights, uniforms_for
from models.sft_model import build_embedded
from token_attribution.extractor import pad_sequences
from token_attribution.logprob_computer import token_logprobs
from token_attribution.trunk import find_trunk

SMALL = ModelConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_layers=2,
    intermediate_size=64,
    init_std=0.3,
)
PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
TINY: dict[str, Any] = {
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
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "model_type": "llama"},
    "gemma3_text": {
        **TINY,
        "model_type": "gemma3_text",
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 10000.0,
    },
    "qwen3_moe": {
        **TINY,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mamba2": {
        **TINY,
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "expand": 2,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 10.0],
        "time_step_rank": "auto",
        "residual_in_fp32": False,
        "rms_norm": True,
        "chunk_size": 8,
    },
}


def tiny(config: dict[str, Any]) -> nn.Module:
    mx.random.seed(3)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    return model


def weights(**options: Any) -> list[float]:
    logits = mx.log(mx.array([PROBABILITIES]))
    return [round(x, 4) for x in sampling_weights(logits, Sampling(**options))[0].tolist()]


def test_the_cuts_by_hand() -> None:
    """Weights are relative to the likeliest token: 0.4, 0.3, 0.15, 0.1, 0.05 over 0.4."""
    assert weights() == [1.0, 0.75, 0.375, 0.25, 0.125]
    assert weights(top_k=2) == [1.0, 0.75, 0, 0, 0]
    assert weights(top_p=0.7) == [1.0, 0.75, 0, 0, 0]
    assert weights(top_p=0.71) == [1.0, 0.75, 0.375, 0, 0]  # the smallest set with at least this mass
    assert weights(min_p=0.3) == [1.0, 0.75, 0.375, 0, 0]
    assert weights(temperature=0.5) == [1.0, 0.5625, 0.1406, 0.0625, 0.0156]  # squared
    assert weights(temperature=0.5, min_p=0.1) == [1.0, 0.5625, 0.1406, 0, 0]  # cut after the temperature


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    """Weights 0, 1, 0, 3, 0: below a quarter it is token 1, from there on token 3, and never another."""
    last = 1 - 2.0**-23
    uniforms = mx.array([0.0, 0.2, 0.25, 0.6, last])
    tokens, logprobs = draw(mx.array([[0.0, 1, 0, 3, 0]] * 5), uniforms)
    assert tokens.tolist() == [1, 1, 3, 3, 3]
    np.testing.assert_allclose(np.array(logprobs), np.log([0.25, 0.25, 0.75, 0.75, 0.75]), atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    n = 20_000
    uniforms = mx.array(uniforms_for(0, 0, 0, 0, n))
    tokens, _ = draw(mx.broadcast_to(mx.array(PROBABILITIES), (n, 5)), uniforms)
    shares = np.bincount(np.array(tokens), minlength=5) / n
    for share, p in zip(shares, PROBABILITIES, strict=True):
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_random_numbers_are_named_by_all_four() -> None:
    first = uniforms_for(1, 2, 3, 4, 8)
    assert np.array_equal(first, uniforms_for(1, 2, 3, 4, 8))
    assert first.max() < 1
    for other in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
        assert not np.array_equal(first, uniforms_for(*other, 8))


def sample(
    model: nn.Module,
    prompts: list[list[int]],
    rows: list[int],
    names: list[int],
    ends: frozenset[int],
    **sampling: Any,
) -> list[Completion]:
    uniforms = np.stack([uniforms_for(0, 0, name, 0, 10) for name in names])
    return complete(
        model, prompts, rows, uniforms, end_ids=ends, max_new_tokens=10, sampling=Sampling(**sampling)
    )


def test_rows_know_nothing_of_each_other() -> None:
    """Ragged prompts, rows that end early and leave: each completion is the one it would be alone."""
    model = build_embedded(SMALL, seed=1).model
    prompts, rows = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]], [0, 0, 1, 2, 1, 0]
    ends = frozenset(range(0, 259, 9))  # an end about every ninth token
    together = sample(model, prompts, rows, list(range(6)), ends)
    assert len({len(c.ids) for c in together}) > 2
    for name, (row, expected) in enumerate(zip(rows, together, strict=True)):
        alone = sample(model, [prompts[row]], [0], [name], ends)[0]
        assert alone.ids == expected.ids
        np.testing.assert_allclose(alone.logprobs, expected.logprobs, atol=1e-5)
    backwards = sample(model, prompts[::-1], [2 - r for r in rows[::-1]], list(range(6))[::-1], ends)
    assert [c.ids for c in backwards[::-1]] == [c.ids for c in together]


def test_the_end_token_is_the_last_and_only_one_kept() -> None:
    model = build_embedded(SMALL, seed=1).model
    ends = frozenset(range(0, 259, 9))
    for completion in sample(model, [[1, 2, 3]], [0] * 12, list(range(12)), ends):
        assert [token in ends for token in completion.ids[:-1]] == [False] * (len(completion.ids) - 1)
        assert completion.terminated == (completion.ids[-1] in ends)
        assert len(completion.logprobs) == len(completion.ids) <= 10
        assert completion.terminated or len(completion.ids) == 10


@pytest.mark.parametrize("name", OTHERS)
def test_cached_decoding_is_the_full_forward_whatever_the_architecture(name: str) -> None:
    """Greedy tokens of ragged prompts step by step, and sampled logprobs at T = 0.7."""
    model = tiny(OTHERS[name])
    prompts, rows = [[1, 2, 3, 4, 5], [6, 7], [8, 9]], [0, 1, 2, 1]
    for row, completion in zip(
        rows, sample(model, prompts, rows, [0, 1, 2, 3], frozenset(), temperature=0), strict=True
    ):
        tokens = list(prompts[row])
        for chosen in completion.ids:
            logits = model(mx.array([tokens]))[0, -1]
            assert float(mx.max(logits) - logits[chosen]) < 1e-4
            tokens.append(chosen)
    sampled = sample(model, prompts, rows, [0, 1, 2, 3], frozenset(), temperature=0.7)
    for row, completion in zip(rows, sampled, strict=True):
        batch, mask = pad_sequences([prompts[row]], [completion.ids])
        logp = np.array(token_logprobs(model, batch, mask, 0.7))[0][np.array(mask)[0]]
        np.testing.assert_allclose(logp, completion.logprobs, atol=2e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_the_head_at_sampled_positions_is_the_head_everywhere(name: str) -> None:
    """With or without a visible trunk, logprobs are those of the model's own logits."""
    model = tiny(OTHERS[name])
    assert (find_trunk(model) is not None) == (name != "mamba2")
    tokens, mask = pad_sequences([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    logits = np.array(model(tokens[:, :-1])).astype(np.float64) / 0.7
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logp, np.array(tokens)[:, 1:, None], -1)[..., 0]
    ours = np.array(token_logprobs(model, tokens, mask, 0.7))
    np.testing.assert_allclose(ours, np.where(np.array(mask), expected, 0), atol=1e-5)


# What a cache may share ----------------------------------------------------------------------------------


def step_by_step(model: nn.Module, prompt: list[int], uniforms: np.ndarray, sampling: Sampling) -> Completion:
    """The same completion from a full forward pass per token, no cache at all."""
    ids: list[int] = []
    logprobs: list[float] = []
    for column in range(10):
        logits = model(mx.array([[*prompt, *ids]]))[:, -1]
        if sampling.temperature == 0:
            token, logprob = mx.argmax(logits, axis=-1), mx.zeros((1,))
        else:
            token, logprob = draw(sampling_weights(logits, sampling), mx.array(uniforms[column : column + 1]))
        ids.append(int(token[0]))
        logprobs.append(float(logprob[0]))
    return Completion(ids, logprobs, False)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little that saves."""
    monkeypatch.setattr(prefix_cache, "_WORTH_SHARING", 0)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "gemma3_text", "mamba2", "lfm2"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7}, {"top_p": 0.8, "top_k": 9}])
def test_a_batch_of_ragged_prompts_is_each_of_them_without_a_cache(
    architecture: Callable[[str], nn.Module], name: str, options: dict[str, Any]
) -> None:
    """Prompts of 1 to 7 tokens, longer than the window of 4 of gemma3_text; two groups of two."""
    model, sampling = architecture(name), Sampling(**options)
    prompts, rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [9, 8, 7]], [2, 0, 0, 1, 3, 1]
    together = sample(model, prompts, rows, list(range(6)), frozenset(), **options)
    for row, completion in enumerate(together):
        expected = step_by_step(model, prompts[rows[row]], uniforms_for(0, 0, row, 0, 10), sampling)
        assert completion.ids == expected.ids
        np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-4)
        assert not completion.terminated


@pytest.mark.parametrize(
    ("name", "shared"), [("llama", True), ("gpt2", True), ("gemma2", False), ("mamba2", False)]
)
def test_ragged_prompts_are_shared_only_where_attention_heeds_a_mask_per_row(
    architecture: Callable[[str], nn.Module],
    name: str,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = architecture(name)
    assert prefix_cache.shares_ragged_prompts(model) == shared
    monkeypatch.setattr(prefix_cache.GroupCache, "make_mask", lambda *args, **kwargs: None)
    assert not prefix_cache.shares_ragged_prompts(model)


def test_each_prompt_of_a_group_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts, nine completions: the only forward longer than one token has two rows."""
    model = build_embedded(SMALL, seed=1).model
    shapes: list[tuple[int, ...]] = []
    inner = type(model.model)
    forward = inner.__call__

    def spied(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shapes.append(inputs.shape)
        return forward(self, inputs, *args, **kwargs)

    trunk = find_trunk(model)
    monkeypatch.setattr(inner, "__call__", spied)
    uniforms = np.stack([uniforms_for(0, 0, name, 0, 4) for name in range(9)])
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    complete(
        model,
        prompts,
        [0] * 5 + [1] * 4,
        uniforms,
        end_ids=frozenset(),
        max_new_tokens=4,
        sampling=Sampling(),
        trunk=trunk,
    )
    assert shapes == [(2, 5), (9, 1), (9, 1), (9, 1)]


def test_logprobs_are_those_of_the_distribution_after_the_cuts() -> None:
    """0.4 and 0.3 are kept by top_k = 2: 4/7 and 3/7."""
    weights = sampling_weights(mx.log(mx.array([PROBABILITIES] * 2)), Sampling(top_k=2))
    tokens, logprobs = draw(weights, mx.array([0.57, 0.58]))  # 4/7 = 0.571…
    assert tokens.tolist() == [0, 1]
    np.testing.assert_allclose(np.array(logprobs), np.log([4 / 7, 3 / 7]), atol=1e-6)


def test_no_token_of_weight_zero_is_ever_drawn_at_the_edges() -> None:
    """Random weights, a third of them 0, the first and the last among those; u at both of its ends."""
    generator = np.random.default_rng(0)
    weights = generator.exponential(size=(500, 40)) * (generator.random((500, 40)) > 0.33)
    weights[:, [0, -1]] = 0
    for u in (0.0, 2.0**-23, 1 - 2.0**-23):
        tokens, logprobs = draw(mx.array(weights.astype(np.float32)), mx.full((500,), u))
        assert (weights[np.arange(500), np.array(tokens)] > 0).all()
        assert np.isfinite(np.array(logprobs)).all()


def test_ties_at_a_threshold_are_all_kept_and_the_likeliest_always_is() -> None:
    logits = mx.log(mx.array([[0.4, 0.2, 0.2, 0.2]]))
    assert (np.array(sampling_weights(logits, Sampling(top_k=2))) > 0).tolist() == [[True] * 4]
    for options in ({"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1e-3}):
        kept = np.array(sampling_weights(logits, Sampling(**options)))
        assert (kept > 0).tolist() == [[True, False, False, False]]
    # Far behind the likeliest, weights underflow to exactly 0, and nothing overflows.
    far = mx.array([[0.0, -500.0, 1000.0]])
    assert sampling_weights(far, Sampling()).tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must not be negative, but it is -1.0"),
        ({"temperature": float("nan")}, "temperature must not be negative, but it is nan"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"top_k": -1}, r"top_k must be 0 \(all tokens\) or more"),
        ({"min_p": 1.5}, r"min_p in \[0, 1\]"),
    ],
)
def test_a_distribution_that_does_not_exist_is_refused(options: dict[str, Any], sentence: str) -> None:
    model = build_embedded(SMALL, seed=1).model
    with pytest.raises(ValueError, match=sentence):
        sample(model, [[1, 2]], [0], [0], frozenset(), **options)


def test_random_numbers_too_few_are_refused() -> None:
    model = build_embedded(SMALL, seed=1).model

    def run(shape: tuple[int, int], max_new_tokens: int) -> None:
        options: dict[str, Any] = {"end_ids": frozenset(), "sampling": Sampling()}
        complete(model, [[1]], [0], np.zeros(shape), max_new_tokens=max_new_tokens, **options)

    with pytest.raises(ValueError, match=r"uniforms \(1, 3\) must be \(1, 4\)"):
        run((1, 3), 4)
    with pytest.raises(ValueError, match=r"uniforms \(2, 4\) must be \(1, 4\)"):
        run((2, 4), 4)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, but it is 0"):
        run((1, 4), 0)
