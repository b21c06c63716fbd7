"""Which answers are compared with which, and how the comparisons of a batch become micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    """A question with one answer, in tokens, closed by the end token; and how good it is."""

    ids: list[int]
    reward: float


class Ranking(NamedTuple):
    """Answers that are compared with each other. One alone is a scored answer, to be compared with others."""

    answers: list[Answer]

    def comparisons(self, offset: int) -> list[tuple[int, int]]:
        """(better, worse) positions among all answers of a batch, of which this list starts at ``offset``."""
        rewards = [answer.reward for answer in self.answers]
        return [(offset + i, offset + j) for i, j in better_and_worse(rewards)]


def better_and_worse(rewards: Sequence[float]) -> list[tuple[int, int]]:
    """The positions of every two of which the first is better.

    >>> better_and_worse([1.0, 0.0, 1.0])
    [(0, 1), (2, 1)]
    """
    return [(i, j) for i, one in enumerate(rewards) for j, other in enumerate(rewards) if one > other]


class Comparisons(NamedTuple):
    """A micro-batch: answers, and which of them are compared."""

    answers: list[Answer]
    pairs: list[tuple[int, int]]  # (better, worse), positions in ``answers``

    @property
    def margins(self) -> list[float]:
        """By how much the rewards of each pair differ, > 0."""
        return [self.answers[i].reward - self.answers[j].reward for i, j in self.pairs]


def lists_of(answers: Sequence[Answer], size: int) -> list[Ranking]:
    """Scored answers in lists of at most ``size``, each answer beside one of another reward.

    They are dealt out in the order of their rewards, so that a list has high and low ones. Where a list would have
    one reward only, it joins another, which may then be longer than ``size``. All of one reward: no list.
    """
    if len({answer.reward for answer in answers}) < 2:
        return []
    ordered = sorted(answers, key=lambda answer: answer.reward)
    count = -(-len(ordered) // size)
    dealt = [ordered[i::count] for i in range(count)]
    mixed = [part for part in dealt if part[0].reward < part[-1].reward]
    alike = [answer for part in dealt if part[0].reward == part[-1].reward for answer in part]
    if not mixed:
        return [Ranking(alike)]
    mixed[-1] = mixed[-1] + alike
    return [Ranking(part) for part in mixed]


class Partners:
    """For each reward, the answers that it may be compared with one to one."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        """Grouped by reward once: each draw is then from places in one list."""
        self._by_reward: dict[float, list[Answer]] = {}
        for answer in answers:
            self._by_reward.setdefault(answer.reward, []).append(answer)
        self._rewards = np.array(sorted(self._by_reward))
        self._answers = [answer for group in self._by_reward.values() for answer in group]
        sizes = [len(group) for group in self._by_reward.values()]
        self._first = dict(zip(self._by_reward, np.cumsum([0, *sizes]).tolist(), strict=False))

    def other(self, answer: Answer, generator: np.random.Generator) -> Answer:
        """One drawn from all of another reward."""
        same, first = len(self._by_reward[answer.reward]), self._first[answer.reward]
        number = int(generator.integers(len(self._answers) - same))
        return self._answers[number if number < first else number + same]  # past those of its own

    def nearest(self, answer: Answer, generator: np.random.Generator) -> Answer:
        """One of those whose reward is nearest, but not the same; drawn where there are several."""
        place = int(np.searchsorted(self._rewards, answer.reward))
        around = [self._rewards[i] for i in (place - 1, place + 1) if 0 <= i < len(self._rewards)]
        least = min(abs(reward - answer.reward) for reward in around)
        group = [one for r in around if abs(r - answer.reward) == least for one in self._by_reward[float(r)]]
        return group[int(generator.integers(len(group)))]


def micro_batches(rankings: Sequence[Ranking], size: int | None) -> list[Comparisons]:
    """The comparisons of a batch, each once, in micro-batches of at most ``size`` answers (2 where it is 1).

    Lists stay whole as long as they fit, so that an answer is computed once. One that does not is gone through by
    blocks: some of its answers against some others.
    """
    if size is None:
        return [_joined([Comparisons(ranking.answers, ranking.comparisons(0)) for ranking in rankings])]
    found: list[Comparisons] = []
    waiting: list[Comparisons] = []
    for ranking in rankings:
        for block in _blocks(ranking, size):
            if waiting and sum(len(one.answers) for one in waiting) + len(block.answers) > size:
                found.append(_joined(waiting))
                waiting = []
            waiting.append(block)
    return [*found, _joined(waiting)] if waiting else found


def _blocks(ranking: Ranking, size: int) -> Iterator[Comparisons]:
    answers = ranking.answers
    if len(answers) <= size:
        yield Comparisons(answers, ranking.comparisons(0))
        return
    half = max(1, size // 2)
    parts = [answers[i : i + half] for i in range(0, len(answers), half)]
    for i, first in enumerate(parts):
        if inside := Ranking(first).comparisons(0):
            yield Comparisons(first, inside)
        for second in parts[i + 1 :]:
            both = Ranking([*first, *second])
            across = [(a, b) for a, b in both.comparisons(0) if (a < len(first)) != (b < len(first))]
            if across:
                yield Comparisons(both.answers, across)


def _joined(parts: Sequence[Comparisons]) -> Comparisons:
    answers: list[Answer] = []
    pairs: list[tuple[int, int]] = []
    for part in parts:
        pairs += [(i + len(answers), j + len(answers)) for i, j in part.pairs]
        answers += part.answers
    return Comparisons(answers, pairs)
