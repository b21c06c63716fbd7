"""Calling, checking and adding up rewards. Every wrong return value has its sentence."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import math
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import InvalidConfigurationError, RewardError, ToolkitError
from rewards.composition import RewardSet

PROMPTS = ["p0", "p1", "p2"]
COMPLETIONS = ["a", "bb", "ccc"]


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def one_each(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(prompts)


def returning(value: Any) -> RewardSet:
    def fixed(completions: list[str]) -> Any:
        return value

    return RewardSet([fixed])


def score(rewards: RewardSet, **columns: Any) -> Any:
    return rewards.score(PROMPTS, COMPLETIONS, **columns)


# Adding up -------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_the_components() -> None:
    batch = score(RewardSet([length, one_each], [2.0, -0.5]))
    np.testing.assert_array_equal(batch.total, [1.5, 3.5, 5.5])  # 2·1 − 0.5, 2·2 − 0.5, 2·3 − 0.5
    np.testing.assert_array_equal(batch.components["length"], [1, 2, 3])  # unweighted
    np.testing.assert_array_equal(batch.components["one_each"], [1, 1, 1])
    assert batch.total.dtype == np.float32
    assert all(component.dtype == np.float32 for component in batch.components.values())


def test_none_leaves_a_component_out_of_its_row_and_a_row_without_any_is_nan() -> None:
    def first(completions: list[str]) -> list[float | None]:
        return [1.0, None, None]

    def second(completions: list[str]) -> list[float | None]:
        return [10.0, 20.0, None]

    batch = score(RewardSet([first, second], [3.0, 0.1]))
    np.testing.assert_allclose(batch.total, [3 * 1 + 0.1 * 10, 0.1 * 20, math.nan])
    np.testing.assert_array_equal(batch.components["first"], [1, math.nan, math.nan])


def test_weights_of_zero_log_a_component_without_adding_it() -> None:
    batch = score(RewardSet([length, one_each], [0.0, 1.0]))
    np.testing.assert_array_equal(batch.total, [1, 1, 1])
    np.testing.assert_array_equal(batch.components["length"], [1, 2, 3])


def test_an_empty_batch_has_no_scores() -> None:
    batch = RewardSet([length]).score([], [])
    assert batch.total.shape == batch.components["length"].shape == (0,)


# Calling ---------------------------------------------------------------------------------------------


def test_a_trl_reward_runs_unmodified() -> None:
    # The two shapes in which rewards for TRL are written: columns by name, and everything as kwargs.
    def accuracy_reward(completions, solution, **kwargs):  # type: ignore[no-untyped-def]
        return [1.0 if text == gold else 0.0 for text, gold in zip(completions, solution, strict=True)]

    def reward_num_unique_chars(completions, **kwargs):  # type: ignore[no-untyped-def]
        assert kwargs["prompts"] == PROMPTS
        assert kwargs["completion_ids"] == [[1], [2, 2], [3, 3, 3]]
        return [len(set(text)) for text in completions]

    rewards = RewardSet.build([accuracy_reward, reward_num_unique_chars], weights=[1.0, 0.5])
    batch = score(
        rewards,
        solution=["a", "x", "ccc"],
        prompt_ids=[[0]] * 3,
        completion_ids=[[1], [2, 2], [3, 3, 3]],
        terminated=[True] * 3,
    )
    assert rewards.names == ["accuracy_reward", "reward_num_unique_chars"]
    np.testing.assert_array_equal(batch.total, [1.5, 0.5, 1.5])


def test_a_function_receives_only_what_its_signature_names() -> None:
    seen: dict[str, Any] = {}

    def picky(completions: list[str], *, terminated: list[bool], extra: int = 7) -> list[float]:
        seen.update(terminated=terminated, extra=extra)
        return [0.0] * len(completions)

    score(RewardSet([picky]), terminated=[True, False, True], answer=["x"] * 3)
    assert seen == {"terminated": [True, False, True], "extra": 7}


def test_instances_partials_and_lambdas_can_be_rewards() -> None:
    class Longer:
        def __init__(self, than: int) -> None:
            self.than = than

        def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[bool]:
            return [len(text) > self.than for text in completions]

    def at_most(completions: list[str], limit: int) -> list[bool]:
        return [len(text) <= limit for text in completions]

    rewards = RewardSet(
        [Longer(1), functools.partial(at_most, limit=2), lambda completions: np.ones(len(completions))]
    )
    assert rewards.names == ["Longer", "at_most", "lambda"]
    np.testing.assert_array_equal(score(rewards).total, [2, 3, 2])


def test_a_reward_that_changes_its_lists_does_not_change_those_of_others() -> None:
    def destructive(completions: list[str]) -> list[float]:
        completions.sort(reverse=True)
        completions.pop()
        return [0.0] * 3

    completions = list(COMPLETIONS)
    batch = RewardSet([destructive, length]).score(PROMPTS, completions)
    assert completions == COMPLETIONS
    np.testing.assert_array_equal(batch.components["length"], [1, 2, 3])


def test_async_rewards_wait_together() -> None:
    # Each waits until the other has started: one after the other would never end.
    started = {"ping": asyncio.Event(), "pong": asyncio.Event()}

    async def ping(completions: list[str]) -> list[float]:
        started["ping"].set()
        await asyncio.wait_for(started["pong"].wait(), timeout=20)
        return [1.0] * len(completions)

    async def pong(completions: list[str]) -> list[float]:
        started["pong"].set()
        await asyncio.wait_for(started["ping"].wait(), timeout=20)
        return [2.0] * len(completions)

    np.testing.assert_array_equal(score(RewardSet([ping, length, pong])).total, [4, 5, 6])


def test_async_rewards_run_inside_a_loop_as_in_a_notebook() -> None:
    async def remote(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def cell() -> Any:
        return score(RewardSet([remote]))

    np.testing.assert_array_equal(asyncio.run(cell()).total, [1, 1, 1])


# What may come back ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "good",
    [
        [1, 0, 0.5],
        (1, 0, 0.5),
        [True, False, 0.5],
        np.array([1.0, 0.0, 0.5]),
        np.array([1.0, 0.0, 0.5], dtype=np.float16),
        np.array([1, 0, 0.5], dtype=object),
        [np.float32(1), np.int64(0), np.float64(0.5)],
        [np.array(1.0), np.array(0.0), np.array(0.5)],
        mx.array([1.0, 0.0, 0.5]),
        mx.array([1.0, 0.0, 0.5]).astype(mx.bfloat16),
        [mx.array(1.0), mx.array(0.0), mx.array(0.5)],
        array("d", [1.0, 0.0, 0.5]),
        [Fraction(1), Decimal(0), Fraction(1, 2)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_lists_tuples_and_arrays_of_numbers_are_taken(good: Any) -> None:
    np.testing.assert_array_equal(score(returning(good)).total, np.array([1.0, 0.0, 0.5], dtype=np.float32))


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (
            None,
            "'fixed' returned None for the whole batch; expected a list of 3 numbers: is a `return` missing",
        ),
        (0.5, r"returned float 0\.5; expected a list of 3 numbers"),
        (np.float64(0.5), r"returned float64 np\.float64\(0\.5\); expected a list of 3 numbers"),
        ("good", "returned str 'good'; expected a list of 3 numbers"),
        ({"a": 1.0}, "returned dict .*collect them in a list"),
        ((value for value in (1, 2, 3)), "returned generator .*collect them in a list"),
        ([1.0, 2.0], "returned 2 values for 3 completions; expected exactly one per completion"),
        ([], "returned 0 values for 3 completions"),
        ([1.0, math.nan, 2.0], "returned nan for row 1; expected a finite number: .*return None where"),
        (np.array([math.nan, 1, 1]), "returned nan for row 0"),
        ([1.0, 2.0, math.inf], "returned inf for row 2; .*clip the reward"),
        ([-math.inf, 2.0, 1.0], "returned -inf for row 0"),
        ([1e39, 0.0, 0.0], r"returned 1e\+39 for row 0; expected a number that float32 can hold"),
        ([10**400, 0.0, 0.0], "returned inf for row 0"),
        ([-(10**400), 0.0, 0.0], "returned -inf for row 0"),
        (
            [1.0, "0.5", 2.0],
            r"returned str '0\.5' for row 1; expected a finite number or None: .*float\(\.\.\.\)",
        ),
        ([1.0, [0.5], 2.0], r"returned list \[0\.5\] for row 1; .*add its parts up"),
        (np.ones((3, 2)), r"returned list \[1\.0, 1\.0\] for row 0; .*add its parts up"),
        ([np.ones(2), 1.0, 1.0], "returned ndarray .* for row 0; .*add its parts up"),
        ([1.0, 1j, 2.0], "returned complex 1j for row 1"),
        ([1.0, {"score": 1}, 2.0], "returned dict .* for row 1"),
    ],
)
def test_every_bad_return_has_its_sentence(bad: Any, sentence: str) -> None:
    with pytest.raises(RewardError, match=sentence) as caught:
        score(returning(bad))
    assert str(caught.value).startswith("Reward 'fixed' returned")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ToolkitError)


def test_a_sum_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(RewardError, match=r"weighted sum .*1e\+40 for row 0"):
        score(RewardSet([one_each], [1e40]))


# What may go wrong inside ----------------------------------------------------------------------------


def parses(completions: list[str]) -> list[float]:
    return [json.loads(text) for text in completions]


def leaves(completions: list[str]) -> list[float]:
    raise SystemExit(0)


async def fails_later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [1.0 / (len(text) - 1) for text in completions]


@pytest.mark.parametrize(
    ("reward", "kind", "error"),
    [
        (parses, "JSONDecodeError", json.JSONDecodeError),
        (leaves, "SystemExit", SystemExit),
        (fails_later, "ZeroDivisionError", ZeroDivisionError),
    ],
)
def test_an_exception_is_reported_with_its_place_and_kept(
    reward: Any, kind: str, error: type[BaseException]
) -> None:
    with pytest.raises(RewardError) as caught:
        score(RewardSet([length, reward]))
    line = reward.__code__.co_firstlineno + (2 if reward is fails_later else 1)
    message = str(caught.value)
    assert f"Reward {reward.__name__!r} raised {kind}: " in message
    assert (
        f"test_composition.py:{line} while scoring 3 completions" in message
    )  # not a line of json/decoder.py
    assert isinstance(caught.value.__cause__, error)


def test_an_interrupt_is_not_a_fault_of_the_reward() -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(RewardSet([interrupted]))


def test_a_failure_beside_an_async_reward_leaves_no_warning() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(RewardError, match="'parses' raised"):
            score(RewardSet([fails_later, parses]))
        gc.collect()  # "coroutine was never awaited" is said when the coroutine goes
    assert not [str(warning.message) for warning in heard]


def test_a_column_that_is_missing_is_named_with_those_that_are_there() -> None:
    def needs_answer(completions: list[str], answer: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"asks for the column 'answer'.* completions, prompts, terminated"):
        score(RewardSet([needs_answer]), terminated=[True] * 3)


def test_a_positional_only_signature_is_explained() -> None:
    def positional(completions: list[str], /) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="'completions' by position only"):
        score(RewardSet([positional]))


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(RewardError, match="offered 2 answer for 3 completions"):
        score(RewardSet([length]), answer=["x", "y"])
    with pytest.raises(RewardError, match="offered 1 prompts for 3 completions"):
        RewardSet([length]).score(["p"], COMPLETIONS)


# Building --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "names", "weights"),
    [
        (length, ["length"], [1.0]),
        ("sequential_digits", ["sequential_digits"], [1.0]),
        (["default", length], ["well_formed", "length"], [1.0, 1.0]),
        ({"default": 0.5, "sequential_digits": 2}, ["well_formed", "sequential_digits"], [0.5, 2.0]),
        ({length: -1}, ["length"], [-1.0]),
        ("rewards.default_reward:well_formed", ["well_formed"], [1.0]),
    ],
)
def test_what_a_set_can_be_built_from(spec: Any, names: list[str], weights: list[float]) -> None:
    rewards = RewardSet.build(spec)
    assert (rewards.names, rewards.weights) == (names, weights)
    assert len(rewards) == len(names)
    assert RewardSet.build(rewards) is rewards


def test_names_are_unique_and_reward_name_wins() -> None:
    class Named:
        reward_name = "style/brevity"

        def __call__(self, completions: Sequence[str]) -> list[float]:
            return [0.0 for _ in completions]

    rewards = RewardSet.build([length, length, length, Named(), functools.partial(length)])
    assert rewards.names == ["length", "length_2", "length_3", "style_brevity", "length_4"]
    assert list(score(rewards).components) == rewards.names


def nothing() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize("spec", [[], {}, None, nothing()])
def test_no_reward_at_all_is_an_error(spec: Any) -> None:
    with pytest.raises(InvalidConfigurationError, match="No reward was given"):
        RewardSet.build(spec)


@pytest.mark.parametrize(
    ("spec", "weights", "sentence"),
    [
        ([length], [1.0, 2.0], r"2 reward weights were given for 1 rewards \(length\)"),
        ([length, one_each], [1.0], "1 reward weights were given for 2 rewards"),
        ([length], [math.nan], "weight of reward 'length' is nan"),
        ([length], ["1"], "weight of reward 'length' is '1'"),
        ({"default": True}, None, "weight of reward 'well_formed' is True"),
        ({"default": 1.0}, [1.0], "given twice"),
        (3, None, "is a int, which cannot be called"),
        ([length, 3], None, "is a int, which cannot be called"),
        (["no_such_reward"], None, "There is no reward named 'no_such_reward'"),
    ],
)
def test_a_wrong_specification_has_its_sentence(
    spec: Mapping[str, float] | list[Any], weights: Any, sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        RewardSet.build(spec, weights)
