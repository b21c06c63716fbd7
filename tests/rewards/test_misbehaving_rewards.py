"""Rewards that raise, lie about their count, return no number or never return: stop with a sentence, or skip."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from config.errors import InvalidConfigurationError, RewardError
from rewards.composition import RewardSet
from rewards.scored_batch import ScoredBatch, joined
from rewards.time_limit import TimeIsUp, call_within

COMPLETIONS = ["1", "two", "3"]


def score(reward: Any, completions: list[str] = COMPLETIONS, **options: Any) -> ScoredBatch:
    return RewardSet([reward], **options).score([""] * len(completions), completions)


def parses(completions: list[str]) -> list[float]:
    return [float(text) for text in completions]


async def parses_later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(text) for text in completions]


@pytest.mark.parametrize("reward", [parses, parses_later])
def test_an_exception_names_the_row_that_is_to_blame(reward: Any) -> None:
    with pytest.raises(RewardError, match="It fails on row 1 alone, whose completion is 'two'") as caught:
        score(reward)
    assert caught.value.row == 1
    assert isinstance(caught.value.__cause__, ValueError)


def notes(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
    log_extra("characters", [len(text) for text in completions])
    log_metric("rows", len(completions))
    return [float(text) for text in completions]


def test_a_reward_that_logs_is_asked_row_by_row_like_any_other() -> None:
    with pytest.raises(RewardError, match="It fails on row 1 alone, whose completion is 'two'"):
        score(notes)
    scored = score(notes, on_error="skip")
    np.testing.assert_array_equal(scored.total, [1, np.nan, 3])
    assert scored.extra == {"characters": [1, 3, 1]}  # of the batch, not of the single rows
    assert scored.measured == {"rows": 3.0}


def test_an_exception_that_no_row_has_alone_names_none() -> None:
    def needs_two(completions: list[str]) -> list[float]:
        return [1.0] if len(completions) == 1 else [1 / 0]

    with pytest.raises(RewardError) as caught:
        score(needs_two)
    assert caught.value.row is None
    assert score(needs_two, on_error="skip").failed.tolist() == [True] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize("reward", [parses, parses_later])
def test_skipping_leaves_out_the_rows_that_fail(reward: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = RewardSet([reward, lambda completions: [1.0] * len(completions)], on_error="skip")
    for _ in range(2):
        scored = rewards.score([""] * 3, COMPLETIONS)
        np.testing.assert_array_equal(scored.total, [2, np.nan, 4])
        np.testing.assert_array_equal(scored.failed, [False, True, False])
        np.testing.assert_array_equal(scored.components["lambda"], [1, 1, 1])
    said = capsys.readouterr().err
    assert said.count("raised ValueError") == 1  # once per run, not per batch


@pytest.mark.parametrize(
    ("returned", "total", "failed"),
    [
        ([1.0, math.nan, 2.0], [1, np.nan, 2], [0, 1, 0]),
        ([1.0, "x", math.inf], [1, np.nan, np.nan], [0, 1, 1]),
        ([1.0, None, 2.0], [1, np.nan, 2], [0, 0, 0]),  # None is no failure
        ([1.0, 2.0], [np.nan] * 3, [1, 1, 1]),
        (None, [np.nan] * 3, [1, 1, 1]),
    ],
)
def test_skipping_values_that_are_none(returned: Any, total: Any, failed: Any) -> None:
    scored = score(lambda completions: returned, on_error="skip")
    np.testing.assert_array_equal(scored.total, total)
    np.testing.assert_array_equal(scored.failed, np.array(failed, dtype=bool))


def test_a_failed_row_has_no_total_even_if_others_judged_it() -> None:
    rewards = RewardSet([parses, lambda completions: [5.0] * len(completions)], on_error="skip")
    assert np.isnan(rewards.score([""], ["x"]).total).all()


def test_a_column_that_is_missing_is_never_skipped() -> None:
    def needs(completions: list[str], answer: list[str]) -> list[float]:
        return [0.0]

    with pytest.raises(RewardError, match="asks for the column 'answer'"):
        score(needs, on_error="skip")


# Time -------------------------------------------------------------------------------------------------


def sleeps(completions: list[str]) -> list[float]:
    time.sleep(60)
    return []


def loops(completions: list[str]) -> list[float]:
    while True:
        try:
            while True:
                pass
        except Exception:
            pass


def swallows(completions: list[str]) -> list[float]:
    for _ in range(3):
        with contextlib.suppress(BaseException):
            time.sleep(60)
    time.sleep(60)
    return []


async def waits(completions: list[str]) -> list[float]:
    await asyncio.sleep(60)
    return []


async def blocks(completions: list[str]) -> list[float]:
    time.sleep(60)
    return []


@pytest.mark.parametrize("reward", [sleeps, loops, swallows, waits, blocks])
def test_a_reward_that_hangs_is_ended(reward: Any) -> None:
    begin = time.monotonic()
    sentence = rf"'{reward.__name__}' took longer than reward_timeout = 0\.05 s for 3 completions"
    with pytest.raises(RewardError, match=sentence):
        score(reward, timeout=0.05)
    assert time.monotonic() - begin < 30


async def gives_up(completions: list[str]) -> list[float]:
    if "two" in completions:
        raise TimeoutError("no server")
    return [1.0] * len(completions)


def test_a_time_limit_of_the_rewards_own_is_not_ours() -> None:
    with pytest.raises(RewardError, match=r"raised TimeoutError: no server .* It fails on row 1 alone"):
        score(gives_up, timeout=60.0)
    np.testing.assert_array_equal(score(gives_up, timeout=60.0, on_error="skip").total, [1, np.nan, 1])


def test_skipping_a_hang_loses_the_batch_and_nothing_else() -> None:
    rewards = RewardSet([sleeps, parses], timeout=0.05, on_error="skip")
    scored = rewards.score([""] * 2, ["1", "2"])
    assert scored.failed.tolist() == [True, True]  # type: ignore[union-attr]
    np.testing.assert_array_equal(scored.components["parses"], [1, 2])


def test_in_a_second_thread_a_hang_is_left_behind() -> None:
    released = threading.Event()

    def waits_for_release(completions: list[str]) -> list[float]:
        released.wait(60)
        return [0.0] * len(completions)

    caught: list[BaseException] = []

    def run() -> None:
        try:
            score(waits_for_release, timeout=0.05)
        except RewardError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    released.set()
    assert "took longer than reward_timeout" in str(caught[0])


def test_an_alarm_of_somebody_else_still_rings() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeIsUp):
            call_within(0.02, lambda: time.sleep(10))
        assert call_within(5.0, lambda: 7) == 7
        end = time.monotonic() + 10
        while not rung and time.monotonic() < end:
            time.sleep(0.01)
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Composition ------------------------------------------------------------------------------------------


def two(completions: list[str]) -> list[float | None]:
    return [2.0, -1.0, None]


def half(completions: list[str]) -> list[float | None]:
    return [0.5, 0.25, None]


@pytest.mark.parametrize(
    ("composition", "weights", "expected"),
    [
        ("weighted_sum", [3.0, 2.0], [7.0, -2.5, np.nan]),
        ("sum", None, [2.5, -0.75, np.nan]),
        # (3·2 + 1·0.5)/4 = 1.6 → 1; (3·−1 + 0.25)/4 < 0 → 0
        ("weighted_mean_clip01", [3.0, 1.0], [1.0, 0.0, np.nan]),
        ("weighted_mean_clip01", [1.0, 9.0], [0.65, 0.125, np.nan]),
    ],
)
def test_compositions_by_hand(composition: Any, weights: Any, expected: Any) -> None:
    scored = RewardSet([two, half], weights, composition=composition).score([""] * 3, COMPLETIONS)
    np.testing.assert_allclose(scored.total, expected, rtol=1e-6)


def test_a_mean_is_over_the_rewards_that_apply() -> None:
    def sometimes(completions: list[str]) -> list[float | None]:
        return [None, 1.0, 1.0]

    rewards = RewardSet([half, sometimes], [1.0, 3.0], composition="weighted_mean_clip01")
    np.testing.assert_allclose(rewards.score([""] * 3, COMPLETIONS).total, [0.5, (0.25 + 3) / 4, 1.0])


@pytest.mark.parametrize(
    ("composition", "weights", "sentence"),
    [
        ("sum", [1.0, 2.0], "a sum has no weights"),
        ("weighted_mean_clip01", [1.0, -2.0], "at least 0 and not all 0"),
        ("weighted_mean_clip01", [0.0, 0.0], "at least 0 and not all 0"),
        ("mean", None, "'mean' is none of weighted_sum, weighted_mean_clip01, sum"),
    ],
)
def test_compositions_that_cannot_be(composition: Any, weights: Any, sentence: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        RewardSet([two, half], weights, composition=composition)


def test_a_reward_that_never_applies_is_remarked_on_once(capsys: pytest.CaptureFixture[str]) -> None:
    rewards = RewardSet.build("jaccard")
    for _ in range(2):
        assert np.isnan(rewards.score([""], ["a"], topic=["t"]).total).all()
    said = capsys.readouterr().err
    assert said.count("'jaccard' applied to none of 1 completions; there are the columns") == 1
    assert "completions, prompts, topic" in said


def test_parts_join_to_the_whole() -> None:
    def noted(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("n", [len(text) for text in completions])
        log_metric("rows", len(completions))
        return [float(text) for text in completions]

    rewards = RewardSet([noted], on_error="skip")
    whole = joined([rewards.score([""] * len(part), part) for part in (["1", "2"], ["x"])])
    np.testing.assert_array_equal(whole.total, [1, 2, np.nan])
    np.testing.assert_array_equal(whole.failed, [False, False, True])
    assert whole.extra == {"n": [1, 1, 1]}
    assert whole.measured == {"rows": 1.5}
