"""What is compared with what: no answer left out, each comparison once, micro-batches no larger than asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from training.comparisons import Answer, Partners, Ranking, lists_of, micro_batches


def answers(rewards: list[float]) -> list[Answer]:
    return [Answer([i], r) for i, r in enumerate(rewards)]


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("seed", range(8))
def test_no_answer_of_a_batch_is_left_uncompared(size: int, seed: int) -> None:
    """Few different rewards, so that ties are many and the last list may be short."""
    rng = np.random.default_rng(seed)
    rewards = [0.0, 1.0, *rng.integers(3, size=rng.integers(0, 12)).astype(float)]
    lists = lists_of(answers(rewards), size)
    assert sorted(a.ids[0] for one in lists for a in one.answers) == list(range(len(rewards)))
    for one in lists:
        compared = {i for pair in one.comparisons(0) for i in pair}
        assert compared == set(range(len(one.answers)))


def test_lists_are_no_longer_than_asked_where_rewards_differ() -> None:
    lists = lists_of(answers([float(i) for i in range(9)]), 4)
    assert sorted(len(one.answers) for one in lists) == [3, 3, 3]
    assert [a.reward for a in lists[0].answers] == [0, 3, 6]


def test_a_single_better_answer_is_compared_with_all_the_others() -> None:
    (one,) = lists_of(answers([0, 0, 0, 0, 0, 1]), 2)
    assert len(one.comparisons(0)) == 5
    assert lists_of(answers([2, 2]), 2) == []


def test_partners() -> None:
    given = answers([1, 1, 4, 6, 20])
    partners, generator = Partners(given), np.random.default_rng(0)
    nearest = {i: {partners.nearest(given[i], generator).ids[0] for _ in range(50)} for i in range(5)}
    assert nearest == {0: {2}, 1: {2}, 2: {3}, 3: {2}, 4: {3}}
    others = {i: {partners.other(given[i], generator).ids[0] for _ in range(200)} for i in range(5)}
    assert others == {0: {2, 3, 4}, 1: {2, 3, 4}, 2: {0, 1, 3, 4}, 3: {0, 1, 2, 4}, 4: {0, 1, 2, 3}}
    tied = Partners(answers([1, 3, 5]))
    assert {tied.nearest(Answer([1], 3), generator).ids[0] for _ in range(50)} == {0, 2}


@pytest.mark.parametrize("size", [None, 1, 2, 3, 4, 7, 50])
def test_micro_batches_hold_every_comparison_once_and_no_more_rows_than_asked(size: int | None) -> None:
    rankings = [
        Ranking([Answer([10 * k + i], float(r)) for i, r in enumerate(rewards)])
        for k, rewards in enumerate([[1, 0], [3, 1, 2], [0, 0, 1, 2, 2, 5], [1, 0], [7, 8]])
    ]
    expected = Counter(
        (r.answers[i].ids[0], r.answers[j].ids[0]) for r in rankings for i, j in r.comparisons(0)
    )
    parts = micro_batches(rankings, size)
    found = Counter((p.answers[i].ids[0], p.answers[j].ids[0]) for p in parts for i, j in p.pairs)
    assert found == expected
    assert max(found.values()) == 1
    if size is None:
        assert len(parts) == 1
    else:
        assert max(len(p.answers) for p in parts) <= max(size, 2)
    for part in parts:
        rewards = [a.reward for a in part.answers]
        assert part.margins == [rewards[i] - rewards[j] for i, j in part.pairs]
        assert min(part.margins) > 0


def test_a_partner_is_each_answer_of_another_reward_equally_often() -> None:
    """Places among six are drawn, less the two of its own reward: four answers, whichever group they are in."""
    answers = [Answer([i], reward) for i, reward in enumerate([1.0, 0.0, 1.0, 2.0, 0.0, 2.0])]
    partners, generator = Partners(answers), np.random.default_rng(0)
    for answer in answers:
        drawn = [partners.other(answer, generator).ids[0] for _ in range(400)]
        counts = np.bincount(drawn, minlength=6)
        others = [one.ids[0] for one in answers if one.reward != answer.reward]
        assert counts.sum() == counts[others].sum()
        assert counts[others].min() > 60
