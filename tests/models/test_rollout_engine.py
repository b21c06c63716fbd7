"""Rows that come and go: refill, columns written again, NumPy's draw and MLX's, what is told while others decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from config.model_config import ModelConfig
from models import prefix_cache, rollout_engine
from models.completions import Completion, Completions
from models.decoding import complete
from models.host_sampling import HostSampler, draw_blocks, weigh
from models.prefix_cache import Columns, GroupCache
from models.sampling import DeviceSampler, Sampling, draw, sampling_weights, uniforms_for
from models.sft_model import build_embedded
from token_attribution import host_math
from token_attribution.trunk import find_trunk

SMALL = ModelConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_layers=2,
    intermediate_size=64,
    init_std=0.3,
)
LENGTH, PLAIN = 14, Sampling()
PROMPTS = [[1, 2, 3], [4, 5, 4, 6, 7, 5, 9, 8, 1, 1, 2], [10], [11, 12, 13, 14]]
ROWS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 1, 2, 3]
ENDS = frozenset(range(0, 259, 13))
HOSTS = [True, False]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What decodes with the model does so both ways."""
    if "model" in metafunc.fixturenames:
        ways = ["prompts shared", "prompts repeated"]
        metafunc.parametrize("shares", [True, False], ids=ways, indirect=True)


@pytest.fixture(autouse=True)
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Rows read what they have in common once, on the CPU, or each for itself: no test may tell which."""
    shared: bool = getattr(request, "param", True)
    monkeypatch.setattr(prefix_cache, "_WORTH_SHARING", 0 if shared else 1 << 60)
    return shared and host_math.usable()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_embedded(SMALL, seed=1).model


def sample(
    model: nn.Module,
    prompts: list[list[int]] = PROMPTS,
    rows: list[int] = ROWS,
    *,
    names: list[int] | None = None,
    length: int = LENGTH,
    ends: frozenset[int] = ENDS,
    sampling: Sampling = PLAIN,
    **options: Any,
) -> list[Completion]:
    """One completion per row; ``names`` choose each row's random numbers."""
    uniforms = np.stack([uniforms_for(0, 0, name, 0, length) for name in names or range(len(rows))])
    return complete(
        model, prompts, rows, uniforms, end_ids=ends, max_new_tokens=length, sampling=sampling, **options
    )


def assert_equal(found: list[Completion], expected: list[Completion]) -> None:
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert [c.terminated for c in found] == [c.terminated for c in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def each_alone(model: nn.Module, sampling: Sampling = PLAIN, ends: frozenset[int] = ENDS) -> list[Completion]:
    """No cache, no batch, MLX's draw: a forward pass of the whole row for every token of it."""
    found = []
    for row, prompt in enumerate(ROWS):
        uniforms = mx.array(uniforms_for(0, 0, row, 0, LENGTH))
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < LENGTH and not (ids and ids[-1] in ends):
            logits = model(mx.array([[*PROMPTS[prompt], *ids]]))[:, -1]
            token, logprob = draw(sampling_weights(logits, sampling), uniforms[len(ids)][None])
            ids.append(int(token[0]))
            logprobs.append(float(logprob[0]))
        found.append(Completion(ids, logprobs, ids[-1] in ends))
    return found


# Refill ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_host", HOSTS)
@pytest.mark.parametrize("places", [1, 2, 3, 5, 8, 15, 16, 100])
def test_rows_that_wait_for_a_place_become_what_they_are_alone(
    model: nn.Module, places: int, on_host: bool
) -> None:
    """Sixteen rows of ragged prompts that end after 1 to 14 tokens; the longest prompt comes when others decode."""
    expected = each_alone(model)
    assert len({len(c.ids) for c in expected}) > 5
    assert {c.terminated for c in expected} == {False, True}
    assert_equal(sample(model, max_rows=places, on_host=on_host), expected)


@pytest.mark.parametrize("on_host", HOSTS)
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma", "gemma2", "gpt2", "mixtral", "gemma3_text", "mamba2", "lfm2"]
)
def test_waiting_rows_whatever_the_architecture(
    architecture: Callable[[str], nn.Module], name: str, on_host: bool
) -> None:
    """Where rows cannot enter while others decode, batches of one prompt length follow one another."""
    model, ends = architecture(name), frozenset(range(0, 61, 7))
    expected = each_alone(model, Sampling(0.7), ends)
    assert len({len(c.ids) for c in expected}) > 3
    found = sample(model, ends=ends, sampling=Sampling(0.7), max_rows=4, on_host=on_host)
    assert_equal(found, expected)


@pytest.mark.parametrize("on_host", HOSTS)
def test_the_chain_of_changes_and_cuts_follows_a_row_from_place_to_place(
    model: nn.Module, on_host: bool
) -> None:
    sampling = Sampling(1.2, 30, 0.9, 0.02, ((0, 2.0), (100, 4.0)), 1.4, 3)
    expected = [
        sample(model, [PROMPTS[prompt]], [0], names=[row], sampling=sampling, on_host=False)[0]
        for row, prompt in enumerate(ROWS)
    ]
    assert_equal(sample(model, sampling=sampling, max_rows=4, on_host=on_host), expected)


def test_rows_that_have_ended_may_be_carried_along(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where they are dropped in larger numbers: never, until all have ended."""
    expected = each_alone(model)
    monkeypatch.setattr(rollout_engine, "_DROP_SHARE", 1.0)
    for places in (3, 16):
        assert_equal(sample(model, max_rows=places, on_host=False), expected)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_when_waiting_rows_come_in_changes_nothing(
    model: nn.Module, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_engine, "_REFILL_SHARE", share)
    assert_equal(sample(model, max_rows=6, on_host=False), each_alone(model))


def test_a_prompt_is_computed_once_though_its_group_enters_in_parts(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of five, three places: the forwards longer than a token have one row each."""
    shapes: list[tuple[int, ...]] = []
    trunk = find_trunk(model)
    inner = type(model.model)
    forward = inner.__call__

    def spied(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shapes.append(inputs.shape)
        return forward(self, inputs, *args, **kwargs)

    monkeypatch.setattr(inner, "__call__", spied)
    sample(model, [[1, 2, 3], [4, 5, 6]], [0] * 5 + [1] * 5, trunk=trunk, max_rows=3)
    assert [shape for shape in shapes if shape[1] == 3] == [(1, 3), (1, 3)]
    assert max(rows for rows, width in shapes if width == 1) == 3


def test_every_row_that_is_decoded_is_one_that_counts(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    """On the host no step computes a row that has ended: tokens after the first are forwards of one row each."""
    rows = 0
    trunk = find_trunk(model)
    inner = type(model.model)
    forward = inner.__call__

    def spied(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        nonlocal rows
        rows += inputs.shape[0] if inputs.shape[1] == 1 else 0
        return forward(self, inputs, *args, **kwargs)

    monkeypatch.setattr(inner, "__call__", spied)
    found = sample(model, trunk=trunk, on_host=True)
    probe = 3 + 3 * shares  # of shares_ragged_prompts and cache_for
    assert rows - probe == sum(len(c.ids) - 1 for c in found)


def test_no_rows_and_no_places(model: nn.Module) -> None:
    options: dict[str, Any] = {"end_ids": ENDS, "max_new_tokens": 3, "sampling": Sampling()}
    assert complete(model, [], [], np.zeros((0, 3)), **options) == []
    with pytest.raises(ValueError, match="max_rows must be at least 1, but it is 0"):
        complete(model, [[1]], [0], np.zeros((1, 3)), max_rows=0, **options)


# Columns ---------------------------------------------------------------------------------------------------


def test_a_column_that_no_row_needs_any_more_is_written_again() -> None:
    """A row of three steps beside one that enters at the third: columns 0, 1, 2; without the first, 0 is free."""
    columns = Columns()
    columns.enter([5])
    written = []

    def advance() -> None:
        columns.advance()
        written.append(columns.column)

    advance()
    advance()
    columns.enter([3])
    advance()
    assert (written, columns.width, columns.prompt_width) == ([0, 1, 2], 3, 5)
    assert columns.offset.tolist() == [7, 3]
    mask = columns.mask()
    assert mask is not None
    assert mask[:, 0, 0].astype(mx.int32).tolist() == [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 1]]
    columns.keep(np.array([1]))
    advance()
    advance()
    assert (written, columns.offset) == ([0, 1, 2, 0, 1], 5)
    advance()  # column 2 is the row's own first one
    assert (written[-1], columns.width) == (3, 4)
    mask = columns.mask()
    assert mask is not None
    assert mask[:, 0, 0].astype(mx.int32).tolist() == [[1, 1, 1, 0, 0, 1, 1, 1, 1]]


def test_columns_are_never_more_than_the_longest_row_present_needs() -> None:
    """200 rows of 1 to 30 tokens through four places: 30 columns, not the 900 steps that there were."""
    generator = np.random.default_rng(0)
    columns, left, widest = Columns(), np.zeros(0, dtype=int), 0
    for _ in range(900):
        alive = np.flatnonzero(left > 0)
        if len(alive) < len(left):
            columns.keep(alive)
        new = generator.integers(1, 31, 4 - len(alive))
        if len(new):
            columns.enter([5] * len(new))
        left = np.append(left[alive], new)
        columns.advance()
        left = left - 1
        widest = max(widest, columns.width)
    assert widest == 30


def test_the_columns_of_a_long_prompt_are_given_back_when_it_has_left() -> None:
    def prompt(width: int) -> KVCache:
        cache = KVCache()
        cache.update_and_fetch(mx.full((1, 1, width, 4), width), mx.full((1, 1, width, 4), width))
        return cache

    columns = Columns()
    cache = GroupCache(columns, rows=2)

    def step(value: float) -> list[list[float]]:
        columns.advance()
        new = mx.full((len(columns), 1, 1, 4), value)
        keys, values = cache.update_and_fetch(new, new)
        assert mx.array_equal(keys, values)
        return np.array(keys[:, 0, :, 0]).tolist()

    for length in (2, 8):
        columns.enter([length])
        cache.enter(prompt(length), [0])
        step(1.0) if length == 2 else None
    assert step(3.0) == [[2, 2, 0, 0, 0, 0, 0, 0, 1, 3], [8] * 8 + [0, 3]]
    columns.keep(np.array([0]))
    cache.keep(np.array([0]))
    columns.enter([3])
    cache.enter(prompt(3), [0])
    assert columns.prompt_width == 3
    assert step(4.0) == [[2, 2, 0, 1, 3, 4], [3, 3, 3, 0, 3, 4]]


def test_caches_grow_in_steps_and_are_written_in_place(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    widths: list[int] = []
    fetch = GroupCache.update_and_fetch

    def spied(self: GroupCache, keys: mx.array, values: mx.array) -> Any:
        found = fetch(self, keys, values)
        widths.append(self.keys.shape[2])
        return found

    monkeypatch.setattr(GroupCache, "update_and_fetch", spied)
    free = sample(model, [[1, 2, 3]], [0, 0], length=150, ends=frozenset())
    prompt = 0 if shares else 3  # its columns are somewhere else
    assert sorted(set(widths)) == [prompt + 64, prompt + 128, prompt + 192]
    monkeypatch.setattr(prefix_cache, "_GROWTH", 1)
    assert_equal(sample(model, [[1, 2, 3]], [0, 0], length=150, ends=frozenset()), free)


# Two samplers ----------------------------------------------------------------------------------------------

CHAINS = {
    "plain": Sampling(),
    "cold": Sampling(0.3),
    "greedy": Sampling(0.0),
    "top-k": Sampling(0.7, top_k=7),
    "top-p": Sampling(1.3, top_p=0.8),
    "min-p": Sampling(0.9, min_p=0.05),
    "changed": Sampling(0.9, logit_bias=((3, 4.0), (5, float("-inf"))), repetition_penalty=1.5),
    "all": Sampling(1.2, 50, 0.9, 0.02, ((0, 2.0), (100, 4.0)), 1.4, 3),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [259, 1024, 5000])
@pytest.mark.parametrize("chain", CHAINS)
def test_both_samplers_draw_the_same_tokens(chain: str, vocabulary: int, dtype: mx.Dtype) -> None:
    """Five steps of 64 rows. MLX sums in float32: a border lies elsewhere by 1e-6 of the total, now and then between

    two tokens and a random number, or at the last token that top-p keeps, which moves every logprob by its mass.
    """
    generator = np.random.default_rng(vocabulary)
    tails = generator.integers(0, vocabulary, (64, 6)).tolist()
    uniforms = generator.integers(0, 1 << 23, (64, 5)).astype(np.float32) / np.float32(1 << 23)
    host, device = (kind(CHAINS[chain], tails, vocabulary, uniforms) for kind in (HostSampler, DeviceSampler))
    agreeing = np.ones(64, dtype=bool)  # rows with the same past
    far = 0
    for column in range(5):
        rows = generator.permutation(64)[: 64 - 7 * column]
        logits = mx.array(2 * generator.normal(size=(len(rows), vocabulary))).astype(dtype)
        tokens, logprobs = host.draw(logits, rows, np.full(len(rows), column))
        others, other_logprobs = map(np.array, device.draw(logits, rows, np.full(len(rows), column)))
        agreeing[rows] &= tokens == others
        difference = abs(logprobs - other_logprobs)[agreeing[rows]]
        assert difference.max() < (5e-3 if host.sampling.top_p < 1 else 1e-5)
        far += (difference > 1e-5).sum()
    assert (~agreeing).sum() <= 1
    assert far <= 10


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"top_p": 0.7}, {"top_p": 0.71}, {"min_p": 0.3}, {"top_k": 5}]
)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_weights_are_those_of_mlx(options: dict[str, Any], temperature: float) -> None:
    """Ties at a threshold among them: all are kept."""
    logits = np.log(np.array([[0.4, 0.3, 0.15, 0.1, 0.05], [0.4, 0.2, 0.2, 0.2, 0.0001]], dtype=np.float32))
    sampling, found = Sampling(temperature, **options), np.empty((2, 5), dtype=np.float32)
    weigh(logits, sampling, out=found)
    np.testing.assert_allclose(found, np.array(sampling_weights(mx.array(logits), sampling)), atol=1e-6)


def test_a_draw_in_blocks_is_the_inverse_of_the_cumulative_distribution() -> None:
    """In rationals: the first token at which the sum of integer weights passes u times the total."""
    generator = np.random.default_rng(0)
    weights = generator.integers(0, 50, (300, 1024)) * (generator.random((300, 1024)) > 0.9)
    weights[:100, :600] = 0  # whole blocks of nothing
    uniforms = generator.integers(0, 1 << 23, 300)
    cumulative = np.cumsum(weights, axis=1)
    expected = (cumulative * (1 << 23) <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=1)
    tokens, logprobs = draw_blocks(weights.astype(np.float32), (uniforms / (1 << 23)).astype(np.float32))
    assert tokens.tolist() == expected.tolist()
    chosen = weights[np.arange(300), tokens] / cumulative[:, -1]
    np.testing.assert_allclose(logprobs, np.log(chosen), atol=1e-6)


def test_a_draw_in_blocks_never_takes_a_token_of_weight_zero() -> None:
    """50 176 weights over twenty orders of magnitude, a third of them 0, and both ends of the vocabulary."""
    generator = np.random.default_rng(0)
    weights = (10.0 ** generator.uniform(-20, 0, (16, 50_176))).astype(np.float32)
    weights[:, ::3] = 0
    weights[:, :300] = weights[:, -300:] = 0
    for u in (0.0, 2.0**-23, 0.5, 1 - 2.0**-23):
        tokens, logprobs = draw_blocks(weights, np.full(16, u, dtype=np.float32))
        assert (weights[np.arange(16), tokens] > 0).all()
        assert np.isfinite(logprobs).all()
    lowest, _ = draw_blocks(weights, np.zeros(16, dtype=np.float32))
    assert lowest.tolist() == (weights > 0).argmax(axis=1).tolist()


def test_a_draw_in_blocks_comes_as_often_as_the_distribution_says() -> None:
    n, p = 40_000, np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    at = [0, 255, 256, 700, 1023]
    weights = np.zeros((1, 1024), dtype=np.float32)
    weights[0, at] = p
    tokens, _ = draw_blocks(np.broadcast_to(weights, (n, 1024)), uniforms_for(0, 0, 0, 0, n))
    shares = np.bincount(tokens, minlength=1024)[at] / n
    assert (abs(shares - p) < 4 * np.sqrt(p * (1 - p) / n)).all()


def test_logits_that_are_no_numbers_show_in_the_logprob() -> None:
    """As with MLX's draw: the update refuses them, and sampling does not stop over them."""
    logits = mx.array([[float("nan")] * 300, [0.0] * 300])
    for kind in (HostSampler, DeviceSampler):
        _, logprobs = kind(Sampling(), [[1], [1]], 300, np.full((2, 1), 0.5, dtype=np.float32)).draw(
            logits, np.arange(2), np.zeros(2, dtype=int)
        )
        assert np.isnan(np.array(logprobs)).tolist() == [True, False]


# Records and reports -----------------------------------------------------------------------------------------


def test_what_follows_the_end_of_a_row_is_passed_over() -> None:
    found = Completions(3, 2, frozenset({9}))

    def record(rows: list[int], columns: list[int], tokens: list[int]) -> list[int]:
        arrays = [np.array(x) for x in (rows, columns, tokens)]
        return found.record(*arrays, np.array(tokens, dtype=np.float32)).tolist()

    assert record([2, 0], [0, 0], [9, 4]) == [2]
    assert record([2, 0, 1], [1, 1, 0], [5, 6, 7]) == [0]
    assert record([1], [1], [9]) == [1]
    assert [found[row] for row in range(3)] == [
        Completion([4, 6], [4.0, 6.0], False),
        Completion([7, 9], [7.0, 9.0], True),
        Completion([9], [9.0], True),
    ]


@pytest.mark.parametrize("on_host", HOSTS)
def test_each_row_is_told_of_once_and_while_others_are_decoded(model: nn.Module, on_host: bool) -> None:
    told: dict[int, Completion] = {}
    steps = 0
    first_step: list[int] = []
    trunk = find_trunk(model)
    assert trunk is not None

    def counted(tokens: mx.array, cache: Any = None) -> mx.array:
        nonlocal steps
        steps += 1
        return trunk.hidden(tokens, cache=cache)

    def on_done(row: int, completion: Completion) -> None:
        assert row not in told
        told[row] = completion
        first_step.append(steps)

    found = sample(model, trunk=trunk._replace(hidden=counted), max_rows=5, on_done=on_done, on_host=on_host)
    assert [told[row] for row in range(len(ROWS))] == found
    assert first_step == sorted(first_step)
    assert len(set(first_step)) > 5  # not all at the end


def test_an_error_in_what_is_told_comes_through(model: nn.Module) -> None:
    def on_done(row: int, completion: Completion) -> None:
        raise RuntimeError("the reward failed")

    with pytest.raises(RuntimeError, match="the reward failed"):
        sample(model, on_done=on_done)
