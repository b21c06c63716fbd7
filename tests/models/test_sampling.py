"""Bias, repetition penalty, temperature and cuts: by hand, and against numpy token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt
from models.decoding import Completion, complete
from models.policy_model import PolicyModel
from models.sampling import LogitChanges, Sampling, adjusted_logits, check_sampling, uniforms_for
from models.sft_model import build_embedded
from ppo_trainer.generator import Generator
from tests.tabular import NEVER, table_model, token_id

NAN, INF = float("nan"), float("inf")
SMALL = ModelConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_layers=2,
    intermediate_size=64,
    init_std=0.3,
)
LENGTH = 12
PROMPTS = [[1, 2, 3], [4, 5, 4, 6, 7, 5, 9, 8], [10]]
ROWS = [0, 0, 1, 2, 1, 0, 2, 2, 1, 0]
ENDS = frozenset(range(0, 259, 9))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_embedded(SMALL, seed=1).model


def sample(
    model: nn.Module,
    prompts: list[list[int]],
    rows: Sequence[int],
    sampling: Sampling,
    *,
    names: Sequence[int] | None = None,
    ends: frozenset[int] = ENDS,
    length: int = LENGTH,
) -> list[Completion]:
    """One completion per row; ``names`` choose each row's random numbers."""
    names = range(len(rows)) if names is None else names
    uniforms = np.stack([uniforms_for(0, 0, name, 0, length) for name in names])
    return complete(model, prompts, rows, uniforms, end_ids=ends, max_new_tokens=length, sampling=sampling)


def log_distribution(logits: np.ndarray, recent: Sequence[int], s: Sampling) -> np.ndarray:
    """Float64 logprobs of every next token, -inf where it cannot be drawn: the definition, one step at a time."""
    z = logits.astype(np.float64)
    for token, amount in s.logit_bias:
        z[token] += amount
    for token in set(recent[-s.repetition_context :]):
        z[token] = z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
    p = np.exp((z - z.max()) / s.temperature)
    p /= p.sum()
    if s.top_k:
        p[p < np.sort(p)[-s.top_k]] = 0
        p /= p.sum()
    if s.top_p < 1:
        order = np.argsort(-p)
        kept = int(np.searchsorted(np.cumsum(p[order]), s.top_p)) + 1
        p[order[kept:]] = 0
        p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())


# By hand ---------------------------------------------------------------------------------------------------


def test_the_bias_is_added_and_the_penalty_pushes_towards_less_likely() -> None:
    """Penalty 2: the positive 4 is halved, the negative -1 doubled, 0 stays; token 3 is not recent."""
    logits = mx.array([[4.0, -1.0, 0.0, 3.0]])
    recent = mx.array([[0, 1, 2]])
    assert adjusted_logits(logits, None, recent, 2.0).tolist() == [[2.0, -2.0, 0.0, 3.0]]
    assert adjusted_logits(logits, None, recent, 0.5).tolist() == [[8.0, -0.5, 0.0, 3.0]]
    bias = mx.array([1.0, 0.0, -INF, 0.5])
    assert adjusted_logits(logits, bias, recent).tolist() == [[5.0, -1.0, -INF, 3.5]]


def test_the_bias_comes_before_the_penalty() -> None:
    """-1 + 3 = 2 is positive by then and halved to 1; 1 - 3 = -2 is negative by then and doubled to -4."""
    logits, bias = mx.array([[-1.0, 1.0]]), mx.array([3.0, -3.0])
    assert adjusted_logits(logits, bias, mx.array([[0, 1]]), 2.0).tolist() == [[1.0, -4.0]]


def test_a_forbidden_token_stays_forbidden_whatever_the_penalty() -> None:
    for penalty in (0.5, 2.0):
        found = adjusted_logits(mx.array([[1.0, 2.0]]), mx.array([-INF, 0.0]), mx.array([[0]]), penalty)
        assert found.tolist() == [[-INF, 2.0]]


def test_a_token_counts_once_however_often_it_stands_there_and_in_its_own_row_alone() -> None:
    logits = mx.array([[8.0, 8.0, 8.0], [8.0, 8.0, 8.0]])
    found = adjusted_logits(logits, None, mx.array([[1, 1, 1], [0, 2, 0]]), 2.0)
    assert found.tolist() == [[8.0, 4.0, 8.0], [4.0, 8.0, 4.0]]


def test_low_precision_is_left_before_anything_is_added() -> None:
    """In bfloat16 256 + 1 is 256, and a third has three digits."""
    found = adjusted_logits(mx.array([[256.0]], dtype=mx.bfloat16), mx.array([1.0]), mx.array([[0]]), 2.0)
    assert found.dtype == mx.float32
    assert found.tolist() == [[128.5]]
    third = adjusted_logits(mx.array([[1.0]], dtype=mx.bfloat16), None, mx.array([[0]]), 3.0)
    assert third.item() == pytest.approx(1 / 3, rel=1e-6)  # bfloat16: 0.334


def test_the_recent_tokens_are_the_last_of_prompt_and_completion() -> None:
    """A window of 3 over prompts of 1, 2 and 4 tokens; two tokens are drawn, the middle row leaves between."""
    changes = LogitChanges(
        Sampling(repetition_penalty=2.0, repetition_context=3), [[5], [1, 2], [1, 2, 3, 4]], vocabulary=9
    )

    def penalised(*rows: int) -> list[set[int]]:
        found = np.array(changes.apply(mx.ones((len(rows), 9)), np.array(rows)))
        assert set(found.ravel().tolist()) == {0.5, 1.0}
        return [set(np.flatnonzero(row == 0.5).tolist()) for row in found]

    def append(tokens: list[int], rows: list[int], columns: list[int]) -> None:
        changes.append(mx.array(tokens), np.array(rows), np.array(columns))

    assert penalised(0, 1, 2) == [{5}, {1, 2}, {2, 3, 4}]
    append([6, 7, 8], [0, 1, 2], [0, 0, 0])
    assert penalised(0, 1, 2) == [{5, 6}, {1, 2, 7}, {3, 4, 8}]
    append([3, 6], [2, 0], [1, 1])
    assert penalised(0, 2) == [{5, 6}, {3, 4, 8}]
    append([0, 0], [0, 2], [2, 2])
    assert penalised(2, 0) == [{0, 3, 8}, {0, 6}]
    assert penalised(1) == [{1, 2, 7}]


def test_bias_and_penalty_are_those_of_mlx_lm() -> None:
    generator = np.random.default_rng(0)
    logits, prompt = mx.array(generator.normal(size=(1, 40)).astype(np.float32)), [3, 4, 5, 3, 11, 12, 30]
    bias = {4: 2.0, 11: -2.0, 20: 1.0}
    sampling = Sampling(logit_bias=tuple(bias.items()), repetition_penalty=1.3, repetition_context=5)
    theirs = logits
    for processor in make_logits_processors(bias, 1.3, 5):
        theirs = processor(mx.array(prompt), theirs)
    ours = LogitChanges(sampling, [prompt], 40).apply(logits, np.array([0]))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-6)


# Through decoding ------------------------------------------------------------------------------------------

BIAS = ((0, 2.0), (9, 1.5), (30, -3.0), (31, -INF), (100, 4.0))
CHAINS = {
    "bias": Sampling(0.8, logit_bias=BIAS),
    "penalty": Sampling(repetition_penalty=1.7, repetition_context=20),
    "short-memory": Sampling(repetition_penalty=3.0, repetition_context=2),
    "reward-for-repeating": Sampling(repetition_penalty=0.6, repetition_context=5),
    "top-k": Sampling(0.7, top_k=7, logit_bias=BIAS, repetition_penalty=1.5, repetition_context=4),
    "top-p": Sampling(1.3, top_p=0.8, logit_bias=BIAS, repetition_penalty=1.5, repetition_context=4),
    "min-p": Sampling(0.9, min_p=0.05, logit_bias=BIAS, repetition_penalty=1.5, repetition_context=6),
    "all": Sampling(1.2, 30, 0.9, 0.02, BIAS, 1.4, 3),
}


@pytest.mark.parametrize("name", CHAINS)
def test_each_stored_logprob_is_that_of_the_whole_chain(model: nn.Module, name: str) -> None:
    """Ragged prompts of 1 to 8 tokens, rows that leave one after another; numpy on a forward without a cache."""
    sampling = CHAINS[name]
    completions = sample(model, PROMPTS, ROWS, sampling)
    assert len({len(c.ids) for c in completions}) >= 3
    for row, completion in zip(ROWS, completions, strict=True):
        seen = list(PROMPTS[row])
        for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
            logits = np.array(model(mx.array([seen]))[0, -1])
            assert logprob == pytest.approx(log_distribution(logits, seen, sampling)[token], abs=1e-4)
            seen.append(token)


def test_the_order_of_rows_and_the_rows_beside_them_change_nothing(model: nn.Module) -> None:
    sampling = CHAINS["all"]
    together = sample(model, PROMPTS, ROWS, sampling)
    order = [3, 7, 0, 9, 4, 1, 8, 2, 6, 5]
    shuffled = sample(model, PROMPTS[::-1], [2 - ROWS[i] for i in order], sampling, names=order)
    for place, name in enumerate(order):
        alone = sample(model, [PROMPTS[ROWS[name]]], [0], sampling, names=[name])[0]
        for other in (alone, shuffled[place]):
            assert other.ids == together[name].ids
            np.testing.assert_allclose(other.logprobs, together[name].logprobs, atol=1e-4)


def test_the_batch_size_of_rollouts_changes_nothing(tiny: Any, make_config: Any) -> None:
    """Nine rows of ragged prompts, alone, by fours (a group is split) and all at once."""
    prompts = [Prompt(i, "", tuple(ids), {}) for i, ids in enumerate(PROMPTS)]
    found = []
    for size in (1, 4, 100):
        config = make_config(
            PPOConfig,
            rollout_batch_size=size,
            group_size=3,
            max_new_tokens=LENGTH,
            logit_bias={token: amount for token, amount in BIAS if amount > -INF},
            repetition_penalty=1.5,
            repetition_context=6,
            importance_correction="token_truncate",
        )
        policy = PolicyModel(tiny, config)
        policy.end_ids = ENDS
        found.append(Generator(policy, config).generate(prompts, 1))
    for one, other in pairwise(found):
        assert [r.completion_ids for r in one] == [r.completion_ids for r in other]
        for r, s in zip(one, other, strict=True):
            np.testing.assert_allclose(r.logprobs, s.logprobs, atol=1e-5)
    assert len({len(r.completion_ids) for r in found[0]}) > 1


def test_forbidden_tokens_are_never_drawn(model: nn.Module) -> None:
    """All but three tokens, recent ones among them."""
    allowed = {7, 8, 200}
    forbidden = tuple((token, -INF) for token in range(259) if token not in allowed)
    for options in ({}, {"repetition_penalty": 2.0}, {"top_k": 100}, {"top_p": 0.9}, {"temperature": 0.0}):
        sampling = Sampling(logit_bias=forbidden, **options)  # type: ignore[arg-type]
        completions = sample(model, PROMPTS, ROWS, sampling, ends=frozenset())
        assert {token for c in completions for token in c.ids} <= allowed
        assert all(np.isfinite(c.logprobs).all() for c in completions)


def test_greedy_is_greedy_after_bias_and_penalty() -> None:
    """After "?" u is best, with a bias v; a penalty of 4 on what was just said makes u and v take turns."""
    chain = {character: [3.0, 2.0, 1.0] for character in "?uvw"}
    table = table_model(chain, "uvw").model
    u, v, w = map(token_id, "uvw")

    def greedy(**options: Any) -> list[int]:
        sampling = Sampling(temperature=0.0, **options)
        return sample(table, [[token_id("?")]], [0], sampling, ends=frozenset(), length=4)[0].ids

    assert greedy() == [u, u, u, u]
    assert greedy(logit_bias=((v, 1.5),)) == [v, v, v, v]
    assert greedy(logit_bias=((u, -INF),)) == [v, v, v, v]
    assert greedy(repetition_penalty=4.0, repetition_context=1) == [u, v, u, v]
    assert greedy(repetition_penalty=4.0, repetition_context=2) == [u, v, w, u]
    # Biased to 3, 3.5, 1, v loses its lead only once it is recent: 3.5 / 4 < 1 < 3.
    assert greedy(logit_bias=((v, 1.5),), repetition_penalty=4.0, repetition_context=2) == [v, u, w, v]


def test_tokens_come_as_often_as_the_chain_says() -> None:
    """20000 pairs of draws from a table; the second has the first in its memory."""
    logits = {"?": [1.0, 0.5, -0.5, 0.2, 2.0, 0.0], "u": [1.0, -1.0, 0.3, 0.0, 0.5, 0.1]}
    actions = "uvwxyz"
    sampling = Sampling(
        0.9,
        top_k=5,
        min_p=0.1,
        logit_bias=((token_id("w"), 1.5), (token_id("y"), -INF)),
        repetition_penalty=2.0,
        repetition_context=2,
    )
    n, ids = 20_000, [token_id(action) for action in actions]
    uniforms = uniforms_for(0, 0, 0, 0, 2 * n).reshape(n, 2)
    table = table_model(logits, actions).model
    drawn = complete(
        table,
        [[token_id("?")]],
        [0] * n,
        uniforms,
        end_ids=frozenset(),
        max_new_tokens=2,
        sampling=sampling,
    )
    first, second = np.array([c.ids for c in drawn]).T

    def expect(found: np.ndarray, before: str, recent: list[int]) -> None:
        full = np.full(int(max(ids)) + 1, NEVER)
        full[ids] = logits[before]
        probabilities = np.exp(log_distribution(full, recent, sampling))[ids]
        assert probabilities[actions.index("y")] == 0
        assert (probabilities > 0).sum() >= 3
        for token, p in zip(ids, probabilities, strict=True):
            assert abs((found == token).mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(found))
        assert np.isin(found, ids).all()

    question, u = token_id("?"), token_id("u")
    expect(first, "?", [question])
    expect(second[first == u], "u", [question, u])


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": NAN}, "temperature must not be negative, but it is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0, but it is 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be greater than 0, but it is -1.0"),
        ({"repetition_penalty": NAN}, "repetition_penalty must be greater than 0, but it is nan"),
        ({"repetition_context": 0}, "repetition_context must be at least 1, but it is 0"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias: a token id and a finite number or -inf are .* -1: 1.0"),
        ({"logit_bias": ((3, NAN),)}, "logit_bias: .* found 3: nan"),
        ({"logit_bias": ((3, INF),)}, "logit_bias: .* found 3: inf"),
    ],
)
def test_what_cannot_be_sampled_from_is_refused_in_one_sentence(
    model: nn.Module, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        sample(model, [[1]], [0], Sampling(**options))
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=sentence):
        check_sampling(Sampling(**options))


def test_a_biased_token_must_be_in_the_vocabulary(model: nn.Module) -> None:
    size = int(model(mx.array([[1]])).shape[-1])
    with pytest.raises(ValueError, match=f"token {size} is not in the vocabulary of {size} tokens"):
        sample(model, [[1]], [0], Sampling(logit_bias=((size, 1.0),)))
    sample(model, [[1]], [0], Sampling(logit_bias=((size - 1, 1.0),)))


def test_a_bias_that_forbids_every_token_is_refused(model: nn.Module) -> None:
    """Each weight would be NaN, and token 0 drawn for ever."""
    size = int(model(mx.array([[1]])).shape[-1])
    everything = tuple((token, -INF) for token in range(size))
    with pytest.raises(ValueError, match=f"logit_bias: all {size} tokens are forbidden"):
        sample(model, [[1]], [0], Sampling(logit_bias=everything))
    sampling = Sampling(logit_bias=everything[:-1])
    assert sample(model, [[1]], [0], sampling, length=2)[0].ids == [size - 1] * 2
