"""How many words answer and reference share."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from config.declaration import declared, option
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference, quoted
from rewards.tags import PRESETS, Tags, places
from rewards.text_utils import plain_tokens


def jaccard(a: Collection[str], b: Collection[str]) -> float:
    """|A ∩ B| / |A ∪ B| of two sets; 1 if both are empty, 0 if one is.

    >>> jaccard({"the", "cat"}, {"the", "dog"})
    0.3333333333333333
    """
    first, second = set(a), set(b)
    union = first | second
    return len(first & second) / len(union) if union else 1.0


@register("jaccard")
@declared
class Jaccard(RowReward):
    """Jaccard index of the lower-cased word sets of answer and reference, punctuation taken as a space.

    The answer is what follows the last closing tag of the thinking *and a line break after it*, tags for the answer
    taken off; a completion without that has an empty answer and scores 0. ``after_line_break=False`` takes what
    follows the closing tag, or the whole completion where there is none.
    """

    reward_name: ClassVar[str] = "jaccard"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    after_line_break: bool = option(
        default=True,
        meaning="The answer begins on the line after the closing tag of the thinking, or is empty.",
    )
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        answer = self._answer(row)
        given, wanted = set(plain_tokens(answer)), set(plain_tokens(reference))
        shared = sorted(given & wanted)
        why = {
            "answer": quoted(answer),
            "reference": quoted(reference),
            "shared": f"{len(shared)} of {len(given | wanted)} words",
        }
        return Judgement(jaccard(given, wanted), why)

    def _answer(self, row: Row) -> str:
        if not self.after_line_break:
            return row.answer(self.tags)
        text, mark = row.completion, self.tags.think_end + "\n"
        ends = places(text, mark, ignore_case=False)
        return self.tags.without_answer_tags(text[ends[-1] + len(mark) :]) if ends else ""
