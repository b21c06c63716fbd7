"""An answer free of phrases about itself, of leaked control text, and of emoji that nobody asked for."""

from __future__ import annotations

import functools
import re
from typing import Any, ClassVar

from config.declaration import NonNegativeFloat, declared, option
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, limited, quoted
from rewards.tags import PRESETS, Tags

#: Talk about the answer instead of the answer: refusals by rote, hedges, the model about itself.
PHRASES = (
    "as an ai",
    "as an ai language model",
    "as a language model",
    "i am just an ai",
    "i'm just an ai",
    "i cannot help with that",
    "i can't help with that",
    "i'm sorry, but",
    "i am sorry, but",
    "i apologize for the confusion",
    "i'm not sure, but",
    "it is important to note that",
    "i hope this helps",
    "let me know if you have any",
    "my knowledge cutoff",
    "my training data",
)
#: What belongs to a template or an instruction and never into an answer.
BANNED = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "[inst]",
    "[/inst]",
    "<<sys>>",
    "system prompt",
    "ignore all previous instructions",
    "you are a helpful assistant",
)


@register("answer_quality")
@declared
class AnswerQuality(RowReward):
    """1 − penalty for the answer, which is what follows the *first* closing tag of the thinking.

        penalty = min(max_penalty, p + e)
        p       = unwanted_content_penalty if banned content occurs, else (different phrases) · phrase_penalty
        e       = emoji_penalty if the answer has an emoji and the reference (if there is one) has none

    A completion shorter than 10 characters or an answer shorter than 5 scores 0. Phrases are found as whole words,
    whatever the case and the white space: "hell" is not in "hello".
    """

    reward_name: ClassVar[str] = "answer_quality"
    tags: Tags = option(default=PRESETS["think-only"], meaning="Tags: a preset's name, or the four tags.")
    max_penalty: NonNegativeFloat = option(default=1.0, meaning="Most that is taken off.")
    phrase_penalty: NonNegativeFloat = option(default=0.2, meaning="Taken off per different phrase.")
    unwanted_content_penalty: NonNegativeFloat = option(default=1.0, meaning="Taken off for banned content.")
    emoji_penalty: NonNegativeFloat = option(default=0.1, meaning="Taken off for emoji without need.")
    phrases: tuple[str, ...] = option(default=PHRASES, meaning="Phrases that cost phrase_penalty each.")
    banned: tuple[str, ...] = option(default=BANNED, meaning="Content that costs unwanted_content_penalty.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        answer = row.answer(self.tags, first=True)
        if len(row.completion.strip()) < 10 or len(answer) < 5:
            return Judgement(0.0, {"too short": quoted(answer)})
        banned, phrases = phrases_in(answer, self.banned), phrases_in(answer, self.phrases)
        penalty = self.unwanted_content_penalty if banned else len(phrases) * self.phrase_penalty
        emoji = has_emoji(answer) and not has_emoji(row.reference(self.reference) or "")
        penalty = min(self.max_penalty, penalty + self.emoji_penalty * emoji)
        why = {"banned": banned or "none", "phrases": phrases or "none", "emoji": emoji, "penalty": penalty}
        return Judgement(limited(1.0 - penalty), why)


def phrases_in(text: str, phrases: tuple[str, ...]) -> list[str]:
    """The different ones of ``phrases`` that occur in ``text`` as whole words."""
    spoken = " ".join(text.replace("’", "'").casefold().split())
    return [phrase for phrase in phrases if _phrase(phrase).search(spoken)]


@functools.cache
def _phrase(phrase: str) -> re.Pattern[str]:
    words = re.escape(" ".join(phrase.replace("’", "'").casefold().split()))
    # A boundary only where the phrase itself begins or ends with a letter: "[inst]" has its own.
    before = r"(?<!\w)" if phrase.strip()[:1].isalnum() else ""
    after = r"(?!\w)" if phrase.strip()[-1:].isalnum() else ""
    return re.compile(before + words + after)


def has_emoji(text: str) -> bool:
    """Whether a text has a character that is shown as an emoji."""
    return _emoji().search(text) is not None


@functools.cache
def _emoji() -> Any:
    import regex

    return regex.compile(r"\p{Emoji_Presentation}|\p{Emoji}\uFE0F")
