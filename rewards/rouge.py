"""ROUGE: how much of a reference summary comes back, by Google's ``rouge-score``."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, ClassVar, Literal

from config.declaration import PositiveInt, declared, option
from config.errors import InvalidConfigurationError
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference
from rewards.tags import PRESETS, Tags
from rewards.text_utils import words

NOT_INSTALLED = "rouge: the library rouge-score is not installed; pip install rouge-score brings it"


@register("rouge", "rouge_score", "rougeL")
@declared
class Rouge(RowReward):
    """ROUGE of the answer against the reference, in [0, 1] (Lin 2004, https://aclanthology.org/W04-1013).

    The library drops every character that is no ASCII letter or digit, so that Greek or Chinese always scores 0;
    where either text has others, words of any script are compared instead, unstemmed. Texts are read up to
    ``max_words`` words, because the longest common subsequence takes time by the product of the two lengths.

    Needs ``pip install rouge-score``.
    """

    reward_name: ClassVar[str] = "rouge"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    variant: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = option(
        default="rougeL", meaning="Words, pairs of words, longest common subsequence, that by line."
    )
    measure: Literal["f", "precision", "recall"] = option(default="f", meaning="What is reported of it.")
    stemmer: bool = option(default=False, meaning="Compare English word stems (Porter).")
    max_words: PositiveInt = option(default=1000, meaning="Words of each text that are read.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def prepare(self) -> None:
        """Refuse where the library is not there."""
        if importlib.util.find_spec("rouge_score") is None:
            raise InvalidConfigurationError(NOT_INSTALLED)

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        answer = first_words(row.answer(self.tags), self.max_words)
        reference = first_words(reference, self.max_words)
        ascii_only = answer.isascii() and reference.isascii()
        scores = _scorer(self.variant, self.stemmer, ascii_only).score(reference, answer)[self.variant]
        why = {"precision": scores.precision, "recall": scores.recall, "f": scores.fmeasure}
        return Judgement(float(why[self.measure]), why)


def first_words(text: str, count: int) -> str:
    """The text up to its ``count``-th word; lines stay lines."""
    kept, left = [], count
    for line in text.splitlines():
        spoken = words(line)
        if len(spoken) > left:
            kept.append(" ".join(spoken[:left]))
            break
        kept.append(line)
        left -= len(spoken)
    return "\n".join(kept)


class _AnyScript:
    def tokenize(self, text: str) -> list[str]:
        return words(text.lower())


@functools.cache
def _scorer(variant: str, stemmer: bool, ascii_only: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InvalidConfigurationError(NOT_INSTALLED) from error
    return RougeScorer([variant], use_stemmer=stemmer, tokenizer=None if ascii_only else _AnyScript())
