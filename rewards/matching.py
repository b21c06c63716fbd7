"""Exact, normalised and pattern matching of the answer."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from config.declaration import PositiveFloat, declared, option
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference, quoted
from rewards.tags import PRESETS, Tags
from rewards.text_utils import plain_tokens

_ARTICLES = frozenset(("a", "an", "the"))


@register("exact_match")
@declared
class ExactMatch(RowReward):
    """1 if the answer (what follows the thinking) is the reference, white space around them aside, else 0."""

    reward_name: ClassVar[str] = "exact_match"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        answer = row.answer(self.tags)
        why = {"answer": quoted(answer), "reference": quoted(reference.strip())}
        return Judgement(float(answer == reference.strip()), why)


@register("normalised_match", "normalized_match")
@declared
class NormalisedMatch(RowReward):
    """1 if answer and reference are the same words, else 0.

    Compared are lower-cased letters and digits in Unicode's compatibility form (NFKC), without punctuation, extra
    white space and the articles a, an, the, as SQuAD's exact match does. ``contains`` asks only that the reference's
    words occur in the answer, one after the other.
    """

    reward_name: ClassVar[str] = "normalised_match"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    contains: bool = option(default=False, meaning="The reference may stand anywhere in the answer.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        given = normalised(row.answer(self.tags))
        wanted = normalised(reference)
        equal = f" {wanted} " in f" {given} " if self.contains else given == wanted
        return Judgement(
            float(equal and bool(wanted)), {"answer": quoted(given), "reference": quoted(wanted)}
        )


def normalised(text: str) -> str:
    """Words in lower case, without articles and punctuation, one space between them.

    >>> normalised("The  Eiffel-Tower!")
    'eiffel tower'
    """
    tokens = plain_tokens(unicodedata.normalize("NFKC", text))
    return " ".join(token for token in tokens if token not in _ARTICLES)


@register("regex_match", "regex", "regular_expression")
@declared
class RegexMatch(RowReward):
    """``score`` if the pattern is found in the completion (or fits all of it), else 0.

    Patterns are those of the ``regex`` module, which knows Python's own and more. A text on which a pattern takes
    longer than ``timeout`` does not match: patterns such as ``(a+)+b`` take for ever on some.
    """

    reward_name: ClassVar[str] = "regex_match"
    pattern: str = option(default=r"\S", meaning="The regular expression.")
    mode: Literal["search", "fullmatch"] = option(default="search", meaning="Found anywhere, or fits it all.")
    ignore_case: bool = option(default=False, meaning="Upper and lower case are the same.")
    dot_matches_newline: bool = option(default=True, meaning="A dot matches line breaks too.")
    score: float = option(default=1.0, meaning="What a match is worth; negative to punish it.")
    timeout: PositiveFloat = option(default=1.0, meaning="Seconds that one text may take.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import regex

        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        compiled = _compiled(self.pattern, self.ignore_case, self.dot_matches_newline)
        find = compiled.search if self.mode == "search" else compiled.fullmatch
        try:
            found = find(row.completion, timeout=self.timeout)
        except TimeoutError:
            return Judgement(0.0, {"match": f"given up after {self.timeout:g} s"})
        return Judgement(self.score if found else 0.0, {"match": quoted(found[0]) if found else "none"})


@functools.cache
def _compiled(pattern: str, ignore_case: bool, dot_all: bool) -> Any:
    import regex

    return regex.compile(pattern, regex.IGNORECASE * ignore_case | regex.DOTALL * dot_all)
