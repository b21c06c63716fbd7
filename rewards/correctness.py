"""Is the answer between the answer tags the right one? And is it at least a whole number?"""

from __future__ import annotations

import re
from typing import ClassVar

from config.declaration import NonNegativeFloat, declared, option
from rewards.arithmetic import number
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference, quoted
from rewards.tags import PRESETS, Tags, TagSet

_INTEGER = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")


@register("correctness", "correctness_reward_func")
@declared
class Correctness(RowReward):
    """``score`` if the answer equals the reference, as text or as a number (72 is 72.0), else 0.

    The answer is what follows the last opening tag for it, up to the closing one; of a reference with ``####`` only
    what follows that counts.
    """

    reward_name: ClassVar[str] = "correctness"
    range: ClassVar[tuple[float, float]] = (0.0, 2.0)
    tags: Tags = option(default=PRESETS["reasoning"], meaning="Tags: a preset's name, or the four tags.")
    score: NonNegativeFloat = option(default=2.0, meaning="What the right answer is worth.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        wanted, answer = reference.rpartition("####")[2].strip(), _extracted(row, self.tags)
        numbers = number(answer), number(wanted)
        equal = answer == wanted or (None not in numbers and numbers[0] == numbers[1])
        return Judgement(
            self.score if equal else 0.0, {"answer": quoted(answer), "reference": quoted(wanted)}
        )


@register("int", "integer", "int_reward_func")
@declared
class IntegerAnswer(RowReward):
    """``score`` if the answer is a whole number, right or wrong, else 0."""

    reward_name: ClassVar[str] = "int"
    range: ClassVar[tuple[float, float]] = (0.0, 0.5)
    tags: Tags = option(default=PRESETS["reasoning"], meaning="Tags: a preset's name, or the four tags.")
    score: NonNegativeFloat = option(default=0.5, meaning="What a whole number is worth.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        answer = _extracted(row, self.tags)
        return Judgement(self.score if _INTEGER.fullmatch(answer) else 0.0, {"answer": quoted(answer)})


def _extracted(row: Row, tags: TagSet) -> str:
    """The tagged answer; what follows the thinking where there are no tags for the answer in use; else nothing."""
    if tags.answer_start is None:
        return row.answer(tags)
    return tags.tagged_answer(row.completion) or ""
