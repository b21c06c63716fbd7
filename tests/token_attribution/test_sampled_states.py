"""Each distinct prompt computed once, and everything as if each row had been computed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes

from base_setup.lora_setup import prepare_trainable
from models.sft_model import share_weights
from tests.conftest import ARCHITECTURES, SHAPE
from token_attribution import sampled_states as module
from token_attribution.logprob_computer import token_statistics
from token_attribution.sampled_states import in_buckets, picked_states, prompt_numbers, sampled_states
from token_attribution.shared_prompts import Ability, ContinuedKeys, PromptKeys
from token_attribution.trunk import Trunk, find_trunk

TEMPERATURE = 0.7
VOCABULARY = 61
#: What each can share; None: its trunk does not show at all.
ABILITIES = {
    "llama": Ability(even=True, ragged=True),
    "qwen2": Ability(even=True, ragged=True),
    "gemma": Ability(even=True, ragged=True),
    "gemma2": None,
    "gpt2": Ability(even=True, ragged=True),
    "mixtral": Ability(even=True, ragged=True),
    "gemma3_text": Ability(even=True, ragged=True),  # a window of 4: the test drive looks beyond it
    "mamba2": None,
    "lfm2": Ability(),
}


class Batch(NamedTuple):
    """Rows of several groups; ``prompts[row]`` says which prompt a row has, -1 that it sampled nothing."""

    tokens: np.ndarray
    mask: np.ndarray
    prompts: list[int]


def batch_of(
    groups: list[tuple[int, list[int]]], *, holes: bool = False, dead_rows: int = 0, seed: int = 0
) -> Batch:
    """``groups``: the length of a prompt, and the lengths of its completions. The padding is garbage."""
    random = np.random.default_rng(seed)
    width = max(prompt + max(completions) for prompt, completions in groups)
    rows, masks, prompts = [], [], []
    for number, (length, completions) in enumerate(groups):
        prompt = random.integers(1, VOCABULARY, size=length)
        prompt[-1] = number  # no prompt is another one's beginning by accident
        for size in completions:
            row = random.integers(0, VOCABULARY, size=width)
            row[:length] = prompt
            mask = np.zeros(width - 1, dtype=bool)
            mask[length - 1 : length - 1 + size] = True
            if holes and size > 3:
                mask[length + 1] = False  # what a tool said, and not the policy
            rows.append(row)
            masks.append(mask)
            prompts.append(number)
    for _ in range(dead_rows):
        rows.append(random.integers(0, VOCABULARY, size=width))
        masks.append(np.zeros(width - 1, dtype=bool))
        prompts.append(-1)
    order = random.permutation(len(rows))  # members of a group are not neighbours
    return Batch(
        np.array(rows)[order].astype(np.int32), np.array(masks)[order], [prompts[i] for i in order.tolist()]
    )


BATCHES = {
    "ragged": batch_of([(9, [1, 4, 6]), (6, [3, 1, 5]), (1, [2])], dead_rows=1),
    "even": batch_of([(7, [1, 5, 2, 2]), (7, [3, 3])]),
    "holes": batch_of([(5, [6, 6, 4]), (8, [5, 1, 4])], holes=True, dead_rows=2),
    "first tokens alone": batch_of([(6, [1, 1, 1]), (8, [1, 1])]),
}


class Counting:
    """A trunk's hidden states, with a record of what went through."""

    def __init__(self, trunk: Trunk) -> None:
        self.prompt_passes: list[np.ndarray] = []
        self.completion_passes: list[np.ndarray] = []
        self.plain_passes: list[np.ndarray] = []

        def hidden(tokens: mx.array, cache: Any = None) -> mx.array:
            if cache is None:
                kind = self.plain_passes
            elif isinstance(cache[0], PromptKeys):
                kind = self.prompt_passes
            else:
                assert isinstance(cache[0], ContinuedKeys)
                kind = self.completion_passes
            kind.append(np.array(tokens))
            return trunk.hidden(tokens, cache=cache)

        self.trunk = trunk._replace(hidden=hidden)

    @property
    def n_tokens(self) -> int:
        return sum(x.size for x in [*self.prompt_passes, *self.completion_passes, *self.plain_passes])


def found(model: nn.Module) -> Trunk:
    trunk = find_trunk(model)
    assert trunk is not None
    return trunk


def a_pass_costs(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(module, "_PASS_TOKENS", dict.fromkeys(("cpu", "metal", "cuda"), tokens))


def one_row_at_a_time(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
    """Logprobs and entropies (B, T): each row alone through the whole model, every position through its head."""
    logprobs, entropies = [], []
    for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
        if not mask.any():
            logprobs.append(mx.zeros(mask.shape))
            entropies.append(mx.zeros(mask.shape))
            continue
        length = int(np.flatnonzero(mask).max()) + 1
        z = model(mx.array(tokens[None, :length]))[0].astype(mx.float32) / TEMPERATURE
        z = z - mx.stop_gradient(mx.max(z, axis=-1, keepdims=True))
        logp = z - mx.log(mx.sum(mx.exp(z), axis=-1, keepdims=True))  # (length, V)
        seen = mx.array(mask[:length])
        chosen = mx.take_along_axis(logp, mx.array(tokens[1 : length + 1])[:, None], axis=-1)[:, 0]
        after = [(0, len(mask) - length)]
        logprobs.append(mx.pad(mx.where(seen, chosen, 0.0), after))
        entropies.append(mx.pad(mx.where(seen, -mx.sum(mx.exp(logp) * logp, axis=-1), 0.0), after))
    return mx.stack(logprobs), mx.stack(entropies)


def value_and_gradient(
    model: nn.Module, batch: Batch, statistics: Callable[[], tuple[mx.array, mx.array]]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Both of them, and the gradient of a sum of all with a weight of its own each, for every parameter."""
    random = np.random.default_rng(7)
    weights = [mx.array(random.normal(size=batch.mask.shape).astype(np.float32)) for _ in range(2)]

    def loss() -> tuple[mx.array, tuple[mx.array, mx.array]]:
        both = statistics()
        return sum((mx.sum(w * x) for w, x in zip(weights, both, strict=True)), mx.zeros(())), both

    (_, both), gradient = nn.value_and_grad(model, loss)()
    slopes = {name: np.array(g) for name, g in list(tree_flatten(gradient))}
    return np.array(both[0]), np.array(both[1]), slopes


def assert_same_gradient(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert np.isfinite(expected).all()
        atol = 2e-4 * max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(ours[name], expected, atol=atol, err_msg=name)


class _Always:
    """What can share anything, and needs no keys to do so."""

    def __init__(self, *, ragged: bool) -> None:
        self.ability = Ability(even=True, ragged=ragged)
        self.takes_groups = False

    def new_keys(self) -> list[Any]:
        return []


@pytest.mark.parametrize("overhead", [0, 10, 10**6])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("kind", BATCHES)
def test_each_state_is_that_of_the_token_before_the_sampled_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, ragged: bool, overhead: int
) -> None:
    """In a trunk whose states are its tokens, of which no two rows have one in common but in their prompts."""
    a_pass_costs(monkeypatch, overhead)
    batch = BATCHES[kind]
    tokens = np.arange(batch.tokens.size).reshape(batch.tokens.shape)
    for row, number in enumerate(batch.prompts):
        if number >= 0:
            first = int(batch.mask[row].argmax())
            tokens[row, : first + 1] = -100 * (number + 1) - np.arange(first + 1)
    trunk = Trunk(
        lambda ids, cache=None: ids[..., None].astype(mx.float32),
        lambda states: states,
        sharing=_Always(ragged=ragged),  # type: ignore[arg-type]
    )
    states = sampled_states(trunk, mx.array(tokens), mx.array(batch.mask))
    assert np.array_equal(np.array(states.rows)[:, 0], tokens[:, :-1][batch.mask])


@pytest.mark.parametrize("overhead", [0, 10], ids=["many small passes", "few large passes"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_every_gradient_are_those_of_each_row_alone(
    architecture: Callable[[str], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    overhead: int,
) -> None:
    a_pass_costs(monkeypatch, overhead)
    model, batch = share_weights(architecture(name)).unfreeze(), BATCHES[kind]
    trunk = find_trunk(model)
    counting = Counting(trunk) if trunk is not None else None

    def shared() -> tuple[mx.array, mx.array]:
        halves = counting.trunk if counting is not None else None
        tokens, mask = mx.array(batch.tokens), mx.array(batch.mask)
        return token_statistics(model, tokens, mask, TEMPERATURE, trunk=halves, entropy_gradient=True)

    logprobs, entropies, gradient = value_and_gradient(model, batch, shared)
    ability = ABILITIES[name]
    if counting is not None and ability is not None:
        assert bool(counting.prompt_passes) == ability.even
        assert bool(counting.plain_passes) != ability.even
    expected, entropy, slopes = value_and_gradient(model, batch, lambda: one_row_at_a_time(model, batch))
    assert np.abs(expected[batch.mask]).min() > 1e-4  # nothing here is 0 by accident
    np.testing.assert_allclose(logprobs, expected, atol=2e-4)
    np.testing.assert_allclose(entropies, entropy, atol=2e-4)
    assert not logprobs[~batch.mask].any()
    assert not entropies[~batch.mask].any()
    assert_same_gradient(gradient, slopes)


# What an architecture can do ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_test_drive_finds_out_what_an_architecture_can_share(
    architecture: Callable[[str], nn.Module], name: str
) -> None:
    trunk = find_trunk(architecture(name))
    assert (trunk is None) == (ABILITIES[name] is None)
    if trunk is not None:
        assert trunk.sharing is not None
        assert trunk.sharing.ability == ABILITIES[name]


def windowed(window: int) -> nn.Module:
    """gemma3 with a window that two tiny prompts cannot look beyond."""
    own = {"sliding_window": window, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
    config = {**SHAPE, **own, "model_type": "gemma3_text"}
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config)).eval()
    mx.eval(model.parameters())
    return model


def test_a_wide_sliding_window_is_shared_as_far_as_it_reaches_and_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_pass_costs(monkeypatch, 0)
    model = windowed(70)
    trunk = found(model)
    assert trunk.sharing is not None
    assert trunk.sharing.ability == Ability(even=True, ragged=True, up_to=70)
    for completion, shares in ((11, True), (12, False)):  # what is read: 60 of the prompt, all but the last
        batch, counting = batch_of([(60, [completion, 2, 3])]), Counting(trunk)
        states = sampled_states(counting.trunk, mx.array(batch.tokens), mx.array(batch.mask))
        assert bool(counting.prompt_passes) is shares
        assert bool(counting.plain_passes) is not shares
        whole = trunk.hidden(mx.array(batch.tokens[:, :-1]))
        plain = picked_states(whole, mx.array(batch.mask))
        assert np.array_equal(np.array(states.positions), np.array(plain.positions))
        np.testing.assert_allclose(np.array(states.rows), np.array(plain.rows), atol=1e-4)


def test_a_trunk_that_does_otherwise_with_a_cache_is_not_trusted(
    architecture: Callable[[str], nn.Module],
) -> None:
    """Its completions do not see their prompts: nothing fails, the states are only wrong."""
    trunk = found(architecture("llama"))
    assert trunk.sharing is not None
    forgetful = type(trunk.sharing)(
        lambda tokens, cache=None: trunk.hidden(tokens, cache=None), trunk.sharing._make_cache
    )
    with_cache_alone = type(trunk.sharing)(lambda tokens: trunk.hidden(tokens), trunk.sharing._make_cache)
    assert forgetful.ability == Ability()
    assert with_cache_alone.ability == Ability()  # a cache is no argument of it: a TypeError


def test_dropout_does_not_keep_the_test_drive_from_finding_out(
    architecture: Callable[[str], nn.Module], make_config: Callable[..., Any]
) -> None:
    """Supervised training asks while it drops, and what was found holds from then on."""
    model = share_weights(architecture("llama"))
    prepare_trainable(model, make_config(lora_dropout=0.5))
    model.update(tree_map(lambda x: x + 0.1, model.trainable_parameters()))
    model.eval()
    trunk = found(model)
    model.train()
    model.lm_head.eval()  # a module with a mind of its own
    modes = [m.training for m in model.modules()]
    assert trunk.sharing is not None
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    assert trunk.sharing.ability == Ability(even=True, ragged=True)
    assert [m.training for m in model.modules()] == modes
    assert mx.random.uniform().item() == expected  # what is dropped does not depend on it


def test_an_ability_covers_what_is_no_longer_than_it_reaches() -> None:
    assert not Ability().covers(1)
    assert Ability(even=True).covers(10**6)
    assert Ability(even=True, up_to=8).covers(8)
    assert not Ability(even=True, up_to=8).covers(9)


# How much is computed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overhead", [0, 10])
def test_each_prompt_goes_through_the_trunk_once_and_each_completion_once(
    architecture: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch, overhead: int
) -> None:
    a_pass_costs(monkeypatch, overhead)
    batch, counting = BATCHES["ragged"], Counting(found(architecture("llama")))
    sampled_states(counting.trunk, mx.array(batch.tokens), mx.array(batch.mask))
    assert not counting.plain_passes
    lengths = {0: 9, 1: 6, 2: 1}
    expected = {
        tuple(batch.tokens[row, : lengths[number]].tolist())
        for row, number in enumerate(batch.prompts)
        if number >= 0
    }
    seen = [tuple(row.tolist()) for part in counting.prompt_passes for row in part]
    assert len(seen) == len(expected) == 3
    assert all(sum(row[: len(p)] == p for row in seen) == 1 for p in expected)
    # Completions of length 1 are read at their prompts alone; of the others, all but their last token is read.
    assert sum(len(part) for part in counting.completion_passes) == 5
    following = [3, 5, 2, 4, 1]
    if overhead == 0:  # nothing is padding
        assert counting.n_tokens == 9 + 6 + 1 + sum(following)
    else:
        assert len(counting.prompt_passes) == len(counting.completion_passes) == 1
        assert counting.n_tokens == 3 * 9 + 5 * 5


def test_where_each_row_has_a_prompt_of_its_own_nothing_is_shared(
    architecture: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_pass_costs(monkeypatch, 0)
    batch, counting = batch_of([(9, [4]), (9, [4]), (5, [6])]), Counting(found(architecture("llama")))
    sampled_states(counting.trunk, mx.array(batch.tokens), mx.array(batch.mask))
    assert counting.prompt_passes == []
    # 9 and 4 tokens, of which the last is not read; 5 and 6 likewise
    assert sorted(part.shape for part in counting.plain_passes) == [(1, 10), (2, 12)]


@pytest.mark.parametrize(("overhead", "shares"), [(17, True), (18, False)])
def test_prompts_are_shared_where_that_saves_more_than_a_pass_costs(
    architecture: Callable[[str], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    overhead: int,
    shares: bool,
) -> None:
    """A prompt of 9 tokens that three rows have: the second and third would compute 18 more."""
    a_pass_costs(monkeypatch, overhead)
    batch, counting = batch_of([(9, [4, 4, 4])]), Counting(found(architecture("llama")))
    sampled_states(counting.trunk, mx.array(batch.tokens), mx.array(batch.mask))
    assert bool(counting.prompt_passes) is shares
    assert counting.n_tokens == (9 + 3 * 3 if shares else 3 * 12)


def test_a_row_that_sampled_nothing_is_not_computed(architecture: Callable[[str], nn.Module]) -> None:
    counting = Counting(found(architecture("llama")))
    tokens, mask = mx.array([[1, 2, 3], [4, 5, 6]]), mx.array([[False, False], [True, False]])
    states = sampled_states(counting.trunk, tokens, mask)
    assert [part.tolist() for part in counting.plain_passes] == [[[4]]]
    assert states.positions.tolist() == [2]
    nothing = sampled_states(counting.trunk, tokens, mx.zeros((2, 2), dtype=mx.bool_))
    assert len(counting.plain_passes) == 1
    assert nothing.positions.size == 0
    assert nothing.back_in_place(mx.zeros((0,))).tolist() == [[0, 0], [0, 0]]


def test_the_states_come_in_the_order_of_the_mask_and_go_back_to_their_places(
    architecture: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_pass_costs(monkeypatch, 0)
    batch, trunk = BATCHES["holes"], found(architecture("llama"))
    states = sampled_states(trunk, mx.array(batch.tokens), mx.array(batch.mask))
    assert states.positions.tolist() == np.flatnonzero(batch.mask).tolist()
    numbers = mx.arange(1, states.positions.size + 1)
    expected = np.zeros(batch.mask.shape)
    expected[batch.mask] = np.arange(1, states.positions.size + 1)
    assert np.array_equal(np.array(states.back_in_place(numbers)), expected)


def test_a_prompt_learns_from_every_one_of_its_completions(
    architecture: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_pass_costs(monkeypatch, 0)
    model = share_weights(architecture("llama")).unfreeze()
    counting = Counting(found(model))
    rare = 60  # stands in the prompt and nowhere else
    tokens = mx.array([[rare, 5, 1, 2, 3], [rare, 5, 4, 3, 2], [rare, 5, 7, 7, 0]])
    mask = mx.array([[False, True, True, True]] * 2 + [[False, True, True, False]])

    def of_rows(*rows: int) -> np.ndarray:
        weights = mx.array([[float(i in rows)] for i in range(3)])
        _, gradient = nn.value_and_grad(
            model,
            lambda: mx.sum(weights * token_statistics(model, tokens, mask, trunk=counting.trunk).logprobs),
        )()
        return np.array(gradient["model"]["embed_tokens"]["weight"])[rare]

    each = [of_rows(i) for i in range(3)]
    assert counting.prompt_passes
    assert not counting.plain_passes
    assert all(np.abs(g).max() > 1e-3 for g in each)
    np.testing.assert_allclose(of_rows(0, 1, 2), sum(each), atol=1e-5)


# Buckets and numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "overhead", "expected"),
    [
        ([10, 1, 1, 1], 27, [[0, 1, 2, 3]]),  # a cut behind the three short rows saves 3 * 9
        ([10, 1, 1, 1], 26, [[0], [1, 2, 3]]),
        ([5, 5, 5], 0, [[0, 1, 2]]),  # a cut saves nothing, which is not more than nothing
        ([5, 6], 1, [[0, 1]]),
        ([5, 6], 0, [[0], [1]]),
        ([1, 5, 9], 7, [[0], [1, 2]]),  # behind the 1 or behind the 5, either saves 8; what is left, 4
        ([], 0, []),
        ([3], 0, [[0]]),
    ],
)
def test_a_bucket_is_split_where_that_saves_more_padding_than_a_pass_costs(
    lengths: list[int], overhead: int, expected: list[list[int]]
) -> None:
    found_buckets = sorted(part.tolist() for part in in_buckets(np.array(lengths), overhead))
    assert found_buckets == expected


@pytest.mark.parametrize("overhead", [0, 5, 50])
def test_buckets_are_all_rows_once_and_none_is_worth_splitting(overhead: int) -> None:
    lengths = np.random.default_rng(overhead).integers(1, 40, size=60)
    parts = list(in_buckets(lengths, overhead))
    assert sorted(i for part in parts for i in part.tolist()) == list(range(60))
    for part in parts:
        assert part.tolist() == sorted(part.tolist())
        own = np.sort(lengths[part]).tolist()
        whole = len(own) * own[-1]
        for cut in range(1, len(own)):
            assert whole - (cut * own[cut - 1] + (len(own) - cut) * own[-1]) <= overhead
    together = 60 * int(lengths.max())
    assert together - sum(len(p) * int(lengths[p].max()) for p in parts) > overhead * (len(parts) - 1)


def test_rows_are_numbered_by_what_stands_before_their_first_sampled_token() -> None:
    tokens = np.array([[1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 4], [1, 5, 3, 4], [1, 2, 3, 4]])
    mask = np.array([[0, 1, 1], [0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=bool)
    # Row 2 has the tokens of row 0, but three of them are its prompt; row 4 sampled nothing.
    assert prompt_numbers(tokens, mask).tolist() == [0, 0, 1, 2, -1]
