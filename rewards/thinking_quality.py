"""Thinking of a reasonable length, in one pair of tags, without leaked control text and rote phrases."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from config.declaration import NonNegativeFloat, PositiveInt, declared, option
from rewards.answer_quality import phrases_in
from rewards.lengths import NO_TOKENS, Unit, length_of
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, limited, not_applicable, quoted
from rewards.tags import PRESETS, Tags

#: Control text of chat templates, each a fault of its own.
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
)
#: Phrases that fill thinking without being any.
BAD_PHRASES = (
    "i should output",
    "i should format",
    "the user wants me to",
    "as an ai",
    "i think i should",
    "let me just guess",
    "i have no idea",
)
_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d+\.[ \t])", re.MULTILINE)


@register("thinking_quality")
@declared
class ThinkingQuality(RowReward):
    """(1 − misuse − special) · length score + 0.1 for a list − 0.15 per bad phrase, within [0, 1].

        length score = L / min                                 L < min
                       1, + bonus within [omin, omax]          min ≤ L ≤ max
                       max(0, 1 − 0.5 (L − max) / max)         L > max
                       less penalty · L / threshold            L > threshold

    L is the length of the thinking in ``unit``. misuse: a tag twice, counts that differ by more than one, or thinking
    opened within thinking. special: ``special_token_penalty`` for each kind of control text in the completion. No
    thinking, or fewer than 10 characters of it, scores 0.
    """

    reward_name: ClassVar[str] = "thinking_quality"
    tags: Tags = option(default=PRESETS["think-only"], meaning="Tags: a preset's name, or the four tags.")
    unit: Unit = option(default="chars", meaning="What lengths are counted in; tokens: an estimate by share.")
    target_length_min: PositiveInt = option(default=30, meaning="Shortest thinking with full score (min).")
    target_length_max: PositiveInt = option(default=80, meaning="Longest thinking with full score (max).")
    optimal_length_min: PositiveInt = option(default=40, meaning="Lower end of the best length (omin).")
    optimal_length_max: PositiveInt = option(default=60, meaning="Upper end of the best length (omax).")
    conciseness_bonus: NonNegativeFloat = option(default=0.15, meaning="Added within the best length.")
    excessive_length_threshold: PositiveInt = option(
        default=90, meaning="Length beyond which the penalty comes on top (threshold)."
    )
    excessive_length_penalty: NonNegativeFloat = option(default=0.5, meaning="Its size (penalty).")
    special_token_penalty: NonNegativeFloat = option(default=0.4, meaning="Per kind of control text.")
    tag_misuse_penalty: NonNegativeFloat = option(default=0.3, meaning="For tags used wrongly.")
    bad_phrase_penalty: NonNegativeFloat = option(default=0.15, meaning="Per bad phrase.")
    list_bonus: NonNegativeFloat = option(default=0.1, meaning="For thinking with a list in it.")
    bad_phrases: tuple[str, ...] = option(default=BAD_PHRASES, meaning="Phrases that cost, as whole words.")
    special_tokens: tuple[str, ...] = option(default=SPECIAL, meaning="Control text that costs.")

    @model_validator(mode="after")
    def _lengths_are_ordered(self) -> Self:
        if self.target_length_min > self.target_length_max:
            raise ValueError(
                f"target_length_min: {self.target_length_min} must not be above target_length_max "
                f"({self.target_length_max})"
            )
        return self

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        text = row.tagged(self.tags)
        thinking = self.tags.thinking(text)
        if thinking is None or len(thinking) < 10:
            return Judgement(0.0, {"thinking": quoted(thinking)})
        starts, ends = self.tags.count(text)
        misused = max(starts, ends) > 1 or abs(starts - ends) > 1 or self.tags.nested(text)
        lowered = text.lower()
        special = [
            mark for mark in (*self.special_tokens, self.tags.think_start * 2) if mark.lower() in lowered
        ]
        length = length_of(thinking, self.unit, row)
        by_length = self.length_score(length)
        bad = phrases_in(thinking, self.bad_phrases)
        listed = _ITEM.search(thinking) is not None
        faults = self.tag_misuse_penalty * misused + self.special_token_penalty * len(special)
        score = max(1.0 - faults, 0.0) * by_length
        score += self.list_bonus * listed - self.bad_phrase_penalty * len(bad)
        why = {
            f"length in {self.unit}": length,
            "length score": by_length,
            "tags misused": misused,
            "control text": special or "none",
            "list": listed,
            "bad phrases": bad or "none",
        }
        return Judgement(limited(score), why)

    def length_score(self, length: float) -> float:
        """The part for the length alone; beyond 1 in the best band, below 0 far above the threshold."""
        low, high = self.target_length_min, self.target_length_max
        score = length / low if length < low else max(0.0, 1.0 - 0.5 * max(length - high, 0.0) / high)
        if self.optimal_length_min <= length <= self.optimal_length_max:
            score += self.conciseness_bonus
        if length > self.excessive_length_threshold:
            score -= self.excessive_length_penalty * length / self.excessive_length_threshold
        return score


@register("thinking_length")
@declared
class ThinkingLength(RowReward):
    """− rate per token of thinking above ``max_thinking_tokens``; + weight · (min(optimal / L, 2) − 1).

    L is at least 1. Either part can be switched off by a rate or a weight of 0. Thinking that is never opened has
    no length and scores 0.
    """

    reward_name: ClassVar[str] = "thinking_length"
    range: ClassVar[tuple[float, float]] = (float("-inf"), 0.1)
    tags: Tags = option(default=PRESETS["think-only"], meaning="Tags: a preset's name, or the four tags.")
    unit: Literal["words", "chars", "tokens"] = option(
        default="tokens", meaning="What lengths are counted in; tokens: an estimate by share."
    )
    max_thinking_tokens: PositiveInt = option(default=80, meaning="Length that costs nothing.")
    thinking_penalty_rate: NonNegativeFloat = option(default=0.05, meaning="Taken off per unit beyond it.")
    optimal_thinking_tokens: PositiveInt = option(default=50, meaning="Length at which the bonus is 0.")
    efficiency_bonus_weight: NonNegativeFloat = option(default=0.1, meaning="Size of the bonus (weight).")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        thinking = self.tags.thinking(row.tagged(self.tags))
        if thinking is None:
            return Judgement(0.0, {"thinking": "(none)"})
        if self.unit == "tokens" and row.columns.get("completion_ids") is None:
            return not_applicable(NO_TOKENS)
        length = length_of(thinking, self.unit, row)
        penalty = self.thinking_penalty_rate * max(length - self.max_thinking_tokens, 0.0)
        bonus = min(self.optimal_thinking_tokens / max(length, 1.0), 2.0) - 1.0
        bonus *= self.efficiency_bonus_weight
        return Judgement(
            bonus - penalty, {f"length in {self.unit}": length, "penalty": penalty, "bonus": bonus}
        )
