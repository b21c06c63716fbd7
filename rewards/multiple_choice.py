"""Which options did the answer choose? Letters with word boundaries, so that "CAT" is not C, A and T."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from config.declaration import declared, option
from rewards.jaccard import jaccard
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference, not_applicable, quoted
from rewards.tags import PRESETS, Tags

_NOISE = re.compile(r"\b(?:options?|answer|correct|is|are|the|choices?|and|or)\b", re.IGNORECASE)
_ALONE = re.compile(r"(?<![^\W_])[A-Za-z](?![^\W_])")
_MYSELF = re.compile(r"\bI(?:['’]|[ \t]+(?!(?:is|are|and|or|because|since|as)\b)[a-z]{2})")
_IN_OPTION = re.compile(r"(?<![^\W_])([A-Z])(?:[).:\-]|\s|$)")
_CHOICES = re.compile(r"^[ \t]*(?:choices|options)[ \t]*:[ \t]*$", re.IGNORECASE | re.MULTILINE)
_CHOICE = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*)$", re.MULTILINE)


def letters_in(text: str) -> set[str]:
    """The option letters in a text: capitals that stand alone; small ones too where nothing but letters is there.

    An I before a verb ("I think B", "I'm sure: B") is the speaker.

    >>> sorted(letters_in("The correct options are B and C."))
    ['B', 'C']
    >>> sorted(letters_in("a, c")), sorted(letters_in("B is a good one"))
    (['A', 'C'], ['B'])
    """
    rest = _NOISE.sub(" ", _MYSELF.sub(" ", text))
    alone = _ALONE.findall(rest)
    only_letters = len(alone) == sum(character.isalnum() for character in rest)
    return {letter.upper() for letter in alone if only_letters or letter.isupper()}


@register("choice_correctness", "choice_correct")
@declared
class ChoiceCorrectness(RowReward):
    """Jaccard index of the set of option letters in the answer and the set in the reference ("B", "A,C").

    The answer is the tagged one, or what follows the thinking. The words option, answer, correct, is, are, the,
    choice are passed over.
    """

    reward_name: ClassVar[str] = "choice_correctness"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    reference: str | None = option(
        default=None, meaning="Column of the right letters; none = the usual ones."
    )

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        wanted = letters_in(reference)
        if not wanted:
            return not_applicable(f"the reference {quoted(reference)} has no option letter")
        chosen = letters_in(row.answer(self.tags))
        score = jaccard(chosen, wanted) if chosen else 0.0
        return Judgement(score, {"chosen": _listed(chosen), "correct": _listed(wanted)})


@register("mcq_accuracy")
@declared
class McqAccuracy(RowReward):
    """1 if exactly the correct options are chosen, else 0; not strict: the Jaccard index of the two sets.

    Chosen are the letters that stand in the answer (what follows the thinking) as ``B)``, ``B.``, ``B:``, ``B-`` or
    before white space or the end; without one, the options whose text occurs in it. What is correct comes from the
    row, or the fields of its ``meta``: ``correct_letters``, ``correct_letter``, ``correct_indices``,
    ``correct_index`` (from 0), or a reference that is a letter or the text of an option. Options come from
    ``options`` or from a block after a line ``choices:`` in the prompt. A row that is no such question (or has
    ``is_mcq`` false) is left out.
    """

    reward_name: ClassVar[str] = "mcq_accuracy"
    tags: Tags = option(default=PRESETS["think-only"], meaning="Tags: a preset's name, or the four tags.")
    strict_matching: bool = option(default=True, meaning="All or nothing, or partial credit.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        if row.field("is_mcq") is False:
            return not_applicable("is_mcq is false")
        options = options_of(row)
        correct = self._correct(row, options)
        if not correct:
            return not_applicable("no correct option is known")
        answer = row.answer(self.tags)
        chosen = self._chosen(answer, options)
        why = {"chosen": _listed(chosen), "correct": _listed(correct), "answer": quoted(answer)}
        score = float(chosen == correct) if self.strict_matching else jaccard(chosen, correct)
        return Judgement(score, why)

    def _chosen(self, answer: str, options: Mapping[str, str]) -> set[str]:
        allowed = set(options) or set(string.ascii_uppercase)
        # Capitals first; an answer in small letters ("b)") only where it has no capital that is an option.
        found = {letter for letter in _IN_OPTION.findall(answer) if letter in allowed} & letters_in(answer)
        if not found:
            found = letters_in(answer) & allowed
        if not found:
            spoken = answer.casefold()
            found = {letter for letter, text in options.items() if text and text.casefold() in spoken}
        return found

    def _correct(self, row: Row, options: Mapping[str, str]) -> set[str]:
        for name in ("correct_letters", "correct_letter"):
            if row.field(name) is not None:
                return letters_in(", ".join(map(str, _as_list(row.field(name)))))
        for name in ("correct_indices", "correct_index"):
            if row.field(name) is not None:
                places = [int(i) for i in _as_list(row.field(name)) if str(i).isdecimal()]
                return {string.ascii_uppercase[i] for i in places if i < len(string.ascii_uppercase)}
        reference = row.reference(self.reference)
        if reference is None:
            return set()
        wanted = reference.strip().casefold()
        same = {letter for letter, text in options.items() if text.strip().casefold() == wanted}
        return same or (letters_in(reference) if options or row.field("is_mcq") else set())


def options_of(row: Row) -> dict[str, str]:
    """The options of a question by letter: from ``options``, or from the prompt; none for another question."""
    given = row.field("options") or row.field("choices")
    if isinstance(given, Mapping):
        if isinstance(given.get("text"), Sequence) and isinstance(
            given.get("label"), Sequence
        ):  # as ARC has them
            return {str(k).upper(): str(v) for k, v in zip(given["label"], given["text"], strict=False)}
        return {str(key).strip().upper(): str(value) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return dict(zip(string.ascii_uppercase, (_bare(str(text)) for text in given), strict=False))
    block = _CHOICES.search(row.prompt)
    return dict(_CHOICE.findall(row.prompt, block.end())) if block else {}


def _bare(text: str) -> str:
    labelled = _CHOICE.match(text)
    return labelled[2] if labelled else text


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set)) else [value]


def _listed(letters: set[str]) -> str:
    return ", ".join(sorted(letters)) or "none"
