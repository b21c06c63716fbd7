"""One block of thinking, closed, of a reasonable length, and an answer after it."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from config.declaration import NonNegativeFloat, NonNegativeInt, PositiveInt, declared, option
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, limited
from rewards.tags import PRESETS, Tags


@register("format_structure", "tag_structure")
@declared
class FormatStructure(RowReward):
    """Steps from 0 to 1 for the structure, the last one by the length L of the thinking; lengths in characters.

    A completion shorter than 10 characters scores 0. One opening and one closing tag, in order: ``length score`` if
    thinking and answer are long enough, 0.6 if one of them is, 0.3 if neither. Opened and never closed 0.3; a tag
    more than once 0.2; no tags 0.1 above 30 characters, else 0; anything else 0.2.

        length score = 1                                                    tmin ≤ L ≤ tmax
                       0.5 + 0.5 (L − min) / (tmin − min)                   L < tmin
                       max(0, 1 − (L − tmax) / tmax · strength · factor)    L > tmax
    """

    reward_name: ClassVar[str] = "format_structure"
    tags: Tags = option(default=PRESETS["think-only"], meaning="Tags: a preset's name, or the four tags.")
    min_think_length: NonNegativeInt = option(default=20, meaning="Shortest thinking that counts (min).")
    min_answer_length: NonNegativeInt = option(default=15, meaning="Shortest answer that counts.")
    think_length_target_min: PositiveInt = option(default=100, meaning="Lower end of the target (tmin).")
    think_length_target_max: PositiveInt = option(default=250, meaning="Upper end of the target (tmax).")
    length_penalty_strength: NonNegativeFloat = option(
        default=0.5, meaning="How steeply too long a thinking loses."
    )
    verbosity_penalty_factor: NonNegativeFloat = option(default=2.0, meaning="Multiplies the strength.")

    @model_validator(mode="after")
    def _targets_are_ordered(self) -> Self:
        if not self.min_think_length <= self.think_length_target_min <= self.think_length_target_max:
            raise ValueError(
                "min_think_length, think_length_target_min, think_length_target_max: expected in rising order, found "
                f"{self.min_think_length}, {self.think_length_target_min}, {self.think_length_target_max}"
            )
        return self

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        text = row.tagged(self.tags)
        if len(row.completion.strip()) < 10:
            return Judgement(0.0, {"too short": len(row.completion.strip())})
        starts, ends = self.tags.count(text)
        why: dict[str, object] = {"opening tags": starts, "closing tags": ends}
        thinking = self.tags.closed_thinking(text)
        if starts > 1 or ends > 1:
            return Judgement(0.2, why)
        if starts == 1 and ends == 0:
            return Judgement(0.3, why)
        if starts == 0 and ends == 0:
            return Judgement(0.1 if len(text.strip()) > 30 else 0.0, why)
        if thinking is None:  # closed but not opened, or the wrong way round
            return Judgement(0.2, why)
        answer = self.tags.after_thinking(text)
        why |= {"thinking, characters": len(thinking), "answer, characters": len(answer)}
        enough = (len(thinking) >= self.min_think_length) + (len(answer) >= self.min_answer_length)
        return Judgement((0.3, 0.6, self.length_score(len(thinking)))[enough], why)

    def length_score(self, length: int) -> float:
        """The score of thinking of ``length`` characters, at least ``min_think_length``."""
        low, high = self.think_length_target_min, self.think_length_target_max
        if length < self.min_think_length:
            return 0.0
        if length < low:
            return 0.5 + 0.5 * (length - self.min_think_length) / (low - self.min_think_length)
        excess = max(length - high, 0) / high
        return limited(1.0 - excess * self.length_penalty_strength * self.verbosity_penalty_factor)
