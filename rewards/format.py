"""Does the completion have the form that was asked for: thinking in its tags, then an answer in its own?

Four ways to pay for it. ``format`` is all or nothing, ``soft_format`` and ``strict_format`` pay half a point (or
nothing) each, ``xmlcount`` pays for every pair of tags and takes something off for what follows the answer. None of
them reads what stands inside the tags.
"""

from __future__ import annotations

from typing import ClassVar

from config.declaration import NonNegativeFloat, declared, option
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, quoted
from rewards.tags import PRESETS, Tags, places


@register("format", "format_reward")
@declared
class Format(RowReward):
    """+0.5 for thinking and answer in their tags, both with something inside; 0 if one is empty; else −0.5.

    Tags may be in upper or lower case, anything may stand before and after. An empty completion is −0.5.
    """

    reward_name: ClassVar[str] = "format"
    range: ClassVar[tuple[float, float]] = (-0.5, 0.5)
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        found = self.tags.structure(row.tagged(self.tags))
        if found is None:
            return Judgement(-0.5, {"structure": "not found"})
        why = {"thinking": quoted(found.thinking), "answer": quoted(found.answer)}
        return Judgement(0.5 if found.thinking and found.answer else 0.0, why)


@register("soft_format", "soft_format_reward_func")
@declared
class SoftFormat(RowReward):
    """``score`` if the tagged thinking is followed by the tagged answer somewhere in the text, else 0."""

    reward_name: ClassVar[str] = "soft_format"
    range: ClassVar[tuple[float, float]] = (0.0, 0.5)
    tags: Tags = option(default=PRESETS["reasoning"], meaning="Tags: a preset's name, or the four tags.")
    score: NonNegativeFloat = option(default=0.5, meaning="What the form is worth.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        found = self.tags.structure(row.tagged(self.tags), ignore_case=False)
        return Judgement(0.0 if found is None else self.score, {"structure": _word(found)})


@register("strict_format", "strict_format_reward_func")
@declared
class StrictFormat(RowReward):
    """As ``soft_format``, but nothing but white space may stand before or after."""

    reward_name: ClassVar[str] = "strict_format"
    range: ClassVar[tuple[float, float]] = (0.0, 0.5)
    tags: Tags = option(default=PRESETS["reasoning"], meaning="Tags: a preset's name, or the four tags.")
    score: NonNegativeFloat = option(default=0.5, meaning="What the form is worth.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        found = self.tags.structure(row.tagged(self.tags), ignore_case=False, whole=True)
        return Judgement(0.0 if found is None else self.score, {"structure": _word(found)})


@register("xmlcount", "xml_count", "xmlcount_reward_func")
@declared
class XmlCount(RowReward):
    """0.25 for a pair of thinking tags + 0.25 for a pair of answer tags − 0.001 per character after the answer.

    A pair is an opening tag with a closing one after it. The characters are those after the last closing tag.
    """

    reward_name: ClassVar[str] = "xmlcount"
    range: ClassVar[tuple[float, float]] = (float("-inf"), 0.5)
    tags: Tags = option(default=PRESETS["reasoning"], meaning="Tags: a preset's name, or the four tags.")
    pair_score: NonNegativeFloat = option(default=0.25, meaning="What each pair of tags is worth.")
    penalty_per_character: NonNegativeFloat = option(
        default=0.001, meaning="Taken off for each character after the last closing tag of the answer."
    )

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        text, tags = row.tagged(self.tags), self.tags
        pairs = int(_has_pair(text, tags.think_start, tags.think_end))
        trailing = 0
        if tags.answer_start and tags.answer_end and _has_pair(text, tags.answer_start, tags.answer_end):
            pairs += 1
            trailing = len(text) - places(text, tags.answer_end, ignore_case=False)[-1] - len(tags.answer_end)
        score = self.pair_score * pairs - self.penalty_per_character * trailing
        return Judgement(score, {"pairs of tags": pairs, "characters after the answer": trailing})


def _has_pair(text: str, start: str, end: str) -> bool:
    opened = text.find(start)
    return opened >= 0 and text.find(end, opened + len(start)) >= 0


def _word(found: object) -> str:
    return "not found" if found is None else "found"
