"""The digit task: continue a sequence of numbers so that it keeps rising (or falling) in multiples.

    prompt 8    completion  10 12 18 20 30 44         score 1.0
    prompt 8    completion  10 12 18 19 30 44         score 3/6: it stops at the odd number

It is the smallest task on which RLHF can be seen to work: a model of a few hundred thousand weights
learns it, the true reward is known exactly, and a learned reward model can be measured against it.
The data that goes with it is made by ``examples/digits_data.py``.
"""

from __future__ import annotations

from typing import ClassVar

from config.declaration import PositiveInt, declared, option
from config.errors import InvalidConfigurationError
from rewards.registry import Reward, named, register
from rewards.row_reward import Judgement, Row, RowReward


def digit_score(
    query: str,
    response: str,
    *,
    increasing: bool = True,
    multiple: int = 2,
    negated: bool = False,
    min_length: int = 5,
) -> float:
    """The share of the response that is a correct continuation of the query, in [0, 1].

        score = matched / max(number of words, min_length)            − 1 if negated

    Words are separated by white space. A word is an *integer* if ``int(word)`` accepts it: an optional
    sign and digits, as in ``12``, ``-9``, ``+4``, ``007`` (and ``1_000``); ``8,`` and ``2.0`` are not.

    The *walk* goes through the words of the response from left to right and remembers the previous
    value, which at the start is the last integer of the query. A word that is no integer is stepped
    over: it never matches, yet it counts as a word and so dilutes the score. An integer *matches* if it
    is a multiple of ``multiple`` and greater (less, if not ``increasing``) than the previous value, which
    it then becomes. If the query has no integer there is nothing to compare with: the first integer
    need only be a multiple.

    The first integer that does not match means *STOP*: the walk ends there and nothing after it can
    earn anything, so a late return to the pattern does not help.

    ``min_length`` keeps a single correct number from scoring 1. ``negated`` moves the range to
    [-1, 0], a punishment for what is missing. An empty response scores the least: 0.0, negated -1.0.

    >>> digit_score("", "8 18 24 -9 26 28 30 32 34 36 38 40")    # three of twelve, then STOP
    0.25
    >>> digit_score("8", " 10 12 14")                             # three of five
    0.6
    """
    if multiple < 1 or min_length < 1:
        raise InvalidConfigurationError(
            f"The digit reward needs multiple and min_length of at least 1, not {multiple} and {min_length}."
        )
    words = response.split()
    previous = next(
        (number for word in reversed(query.split()) if (number := _integer(word)) is not None), None
    )
    matched = 0
    for word in words:
        number = _integer(word)
        if number is None:
            continue
        onwards = previous is None or (number > previous if increasing else number < previous)
        if number % multiple or not onwards:
            break
        matched += 1
        previous = number
    score = matched / max(len(words), min_length)
    return score - 1.0 if negated else score


@register("sequential_digits")
@declared
class SequentialDigits(RowReward):
    """``digit_score`` of each row: the share of the completion that goes on with the prompt's sequence."""

    reward_name: ClassVar[str] = "sequential_digits"
    increasing: bool = option(default=True, meaning="Numbers rise; false = they fall.")
    multiple: PositiveInt = option(default=2, meaning="Each number is a multiple of this.")
    negated: bool = option(default=False, meaning="Scores are moved to [-1, 0].")
    min_length: PositiveInt = option(
        default=5, meaning="Shorter completions are divided by this all the same."
    )

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        score = digit_score(
            row.prompt,
            row.completion,
            increasing=self.increasing,
            multiple=self.multiple,
            negated=self.negated,
            min_length=self.min_length,
        )
        return Judgement(score, {"words": len(row.completion.split()), "at least": self.min_length})


def digit_reward(
    *, increasing: bool = True, multiple: int = 2, negated: bool = False, min_length: int = 5
) -> Reward:
    """Make the reward for one setting of the task, named after it in the logs."""
    reward = SequentialDigits(
        increasing=increasing, multiple=multiple, negated=negated, min_length=min_length
    )
    direction = "increasing" if increasing else "decreasing"
    return named(reward, f"{direction}_mult_{multiple}" + ("_negated" if negated else ""))


def _integer(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None
