"""Rewards for how long a completion is, in words of any script, characters or tokens."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from config.declaration import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, declared, option
from config.errors import RewardError
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, limited, not_applicable
from rewards.text_utils import count_words

Unit = Literal["chars", "words", "tokens"]
NO_TOKENS = "completion_ids are not given, so there are no tokens to count"


def length_of(text: str, unit: str, row: Row) -> float:
    """How long a part of ``row``'s completion is.

    In tokens it is the part's share of the completion's characters times the completion's tokens, which is exact for
    the whole and an estimate for a part.

    Raises:
        RewardError: for tokens, where the reward is not given ``completion_ids``.
    """
    if unit == "chars":
        return float(len(text))
    if unit == "words":
        return float(count_words(text))
    ids = row.columns.get("completion_ids")
    if ids is None:
        raise RewardError(
            f'a length in tokens is asked for, but {NO_TOKENS}; the trainer gives them, elsewhere use unit = "words"'
        )
    return len(ids) * min(len(text) / len(row.completion), 1.0) if row.completion else float(len(ids))


@register("response_length_penalty")
@declared
class ResponseLengthPenalty(RowReward):
    """1 up to ``max_words`` words, then ``penalty_per_word`` less for each further one, not below 0."""

    reward_name: ClassVar[str] = "response_length_penalty"
    max_words: NonNegativeInt = option(default=150, meaning="Words that cost nothing.")
    penalty_per_word: NonNegativeFloat = option(default=0.005, meaning="Taken off per word beyond them.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        n = count_words(row.completion)
        excess = max(n - self.max_words, 0)
        return Judgement(limited(1.0 - excess * self.penalty_per_word), {"words": n, "too many": excess})


@register("length_target")
@declared
class LengthTarget(RowReward):
    """1 within ``tolerance`` of ``target``, falling linearly to 0 at no length and at twice the target.

    score = max(0, 1 − max(|n − target| − tolerance, 0) / max(target − tolerance, 1))
    """

    reward_name: ClassVar[str] = "length_target"
    target: PositiveInt = option(default=100, meaning="The length wanted.")
    tolerance: NonNegativeInt = option(default=0, meaning="Distance from it that costs nothing.")
    unit: Unit = option(default="words", meaning="What lengths are counted in.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        n = length_of(row.completion, self.unit, row)
        off = max(abs(n - self.target) - self.tolerance, 0.0)
        score = limited(1.0 - off / max(self.target - self.tolerance, 1))
        return Judgement(score, {f"length in {self.unit}": n, "off by": off})


@register("word_count")
@declared
class WordCount(RowReward):
    """1 for a number of words within [min_words, max_words], else 0; words of any script."""

    reward_name: ClassVar[str] = "word_count"
    min_words: NonNegativeInt = option(default=1, meaning="Fewest words.")
    max_words: PositiveInt = option(default=200, meaning="Most words.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words: {self.min_words} must not be above max_words ({self.max_words})")
        return self

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        n = count_words(row.completion)
        return Judgement(float(self.min_words <= n <= self.max_words), {"words": n})


@register("overlong", "soft_overlong", "soft_overlong_punishment")
@declared
class Overlong(RowReward):
    """DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, eq. 13), for n tokens.

        0                                     n ≤ max_length − buffer
        (max_length − buffer − n) / buffer    up to max_length
        −1                                    beyond

    ``overlong_buffer`` in the config takes the same off the score without a reward of its own.
    """

    reward_name: ClassVar[str] = "overlong"
    range: ClassVar[tuple[float, float]] = (-1.0, 0.0)
    max_length: PositiveFloat = option(default=512, meaning="Length beyond which the punishment is full.")
    buffer: PositiveFloat = option(default=128, meaning="Length over which it rises to that, at the end.")
    unit: Unit = option(default="tokens", meaning="What lengths are counted in.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.buffer > self.max_length:
            raise ValueError(f"buffer: {self.buffer:g} must not be above max_length ({self.max_length:g})")
        return self

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        if self.unit == "tokens" and row.columns.get("completion_ids") is None:
            return not_applicable(NO_TOKENS)
        n = length_of(row.completion, self.unit, row)
        score = limited((self.max_length - self.buffer - n) / self.buffer, -1.0, 0.0)
        return Judgement(score, {f"length in {self.unit}": n})
