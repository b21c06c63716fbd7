"""The tags that separate what a model thinks from what it answers.

    <think> … </think> <answer> … </answer>         preset think
    <thinking> … </thinking> <answer> … </answer>   preset thinking
    <reasoning> … </reasoning> <answer> … </answer> preset reasoning
    <think> … </think> everything after it          preset think-only

Regions are found by looking for the tags themselves, from left to right, never with a pattern that can try the
same text twice; so a completion of a hundred thousand tags is read as fast as any other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, InstanceOf

_INK = re.compile(r"\S")


class Regions(NamedTuple):
    """Where a complete think … answer structure was found; contents without white space around them."""

    thinking: str
    answer: str


@dataclass(frozen=True)
class TagSet:
    """Two pairs of tags; without tags for the answer it is all that follows the thinking."""

    think_start: str
    think_end: str
    answer_start: str | None = None
    answer_end: str | None = None

    def __post_init__(self) -> None:
        if not self.think_start or not self.think_end or self.think_start == self.think_end:
            raise ValueError("think_start and think_end: two different tags, neither empty, are expected")
        if bool(self.answer_start) != bool(self.answer_end):
            raise ValueError("answer_start and answer_end: give both of them or neither")

    # -- Looking for tags -----------------------------------------------------------------------------

    def count(self, text: str) -> tuple[int, int]:
        """How often the thinking is opened and closed, upper and lower case alike."""
        return len(places(text, self.think_start)), len(places(text, self.think_end))

    def structure(self, text: str, *, ignore_case: bool = True, whole: bool = False) -> Regions | None:
        """Think start, anything, think end, white space, answer start, anything, answer end; None if not there.

        The first opening tag, the first closing tag that an answer follows, the first end of that answer.
        ``whole``: nothing but white space may stand before or after.
        """
        starts = places(text, self.think_start, ignore_case=ignore_case)
        if not starts or (whole and text[: starts[0]].strip()):
            return None
        begin = starts[0] + len(self.think_start)
        for end in places(text, self.think_end, ignore_case=ignore_case):
            if end < begin:
                continue
            after = end + len(self.think_end)
            if self.answer_start is None or self.answer_end is None:
                return Regions(text[begin:end].strip(), text[after:].strip())
            inked = _INK.search(text, after)
            if inked is None or not _at(text, self.answer_start, inked.start(), ignore_case):
                continue
            opened = inked.start() + len(self.answer_start)
            # Later closing tags have later answers, so where this one has no end the others have none either.
            closings = [p for p in places(text, self.answer_end, ignore_case=ignore_case) if p >= opened]
            if whole:
                closings = [p for p in closings[-1:] if not text[p + len(self.answer_end) :].strip()]
            if not closings:
                return None
            return Regions(text[begin:end].strip(), text[opened : closings[0]].strip())
        return None

    # -- Reading regions, whatever else the text may be --------------------------------------------------

    def thinking(self, text: str) -> str | None:
        """What stands between the first opening and the next closing tag; to the end if it is never closed.

        None where it is never opened.
        """
        starts = places(text, self.think_start)
        if not starts:
            return None
        begin = starts[0] + len(self.think_start)
        end = next((place for place in places(text, self.think_end) if place >= begin), len(text))
        return text[begin:end].strip()

    def closed_thinking(self, text: str) -> str | None:
        """As :meth:`thinking`, but None where the thinking is never closed."""
        starts, ends = places(text, self.think_start), places(text, self.think_end)
        if not starts or not ends or ends[-1] < starts[0] + len(self.think_start):
            return None
        return self.thinking(text)

    def after_thinking(self, text: str, *, first: bool = False) -> str:
        """What follows the last (or first) closing tag, without tags for the answer; everything if there is none.

        Thinking that is opened and never closed is no answer, unless an answer is tagged in it.
        """
        ends = places(text, self.think_end)
        if ends:
            text = text[(ends[0] if first else ends[-1]) + len(self.think_end) :]
        opened = places(text, self.think_start)
        if opened and self.tagged_answer(text) is None and not places(text, self.think_end):
            text = text[: opened[0]]
        return self.without_answer_tags(text)

    def without_answer_tags(self, text: str) -> str:
        """What stands between the last opening tag for the answer and its end; the text itself without such tags."""
        inside = self.tagged_answer(text)
        return text.strip() if inside is None else inside

    def tagged_answer(self, text: str) -> str | None:
        """What follows the last opening tag for the answer, up to its end tag if there is one; else None."""
        if self.answer_start is None or self.answer_end is None:
            return None
        starts = places(text, self.answer_start)
        if not starts:
            return None
        inside = text[starts[-1] + len(self.answer_start) :]
        ends = places(inside, self.answer_end)
        return (inside[: ends[0]] if ends else inside).strip()

    def nested(self, text: str) -> bool:
        """Whether the thinking is opened again before it is closed."""
        marks = sorted(
            [(place, 1) for place in places(text, self.think_start)]
            + [(place, -1) for place in places(text, self.think_end)]
        )
        return any(one == 1 and other == 1 for (_, one), (_, other) in itertools.pairwise(marks))

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends with the opening tag, so that the completion begins inside the thinking."""
        return prompt.rstrip().lower().endswith(self.think_start.lower())


PRESETS = {
    "think": TagSet("<think>", "</think>", "<answer>", "</answer>"),
    "thinking": TagSet("<thinking>", "</thinking>", "<answer>", "</answer>"),
    "reasoning": TagSet("<reasoning>", "</reasoning>", "<answer>", "</answer>"),
    "think-only": TagSet("<think>", "</think>"),
}


def as_tag_set(value: Any) -> TagSet:
    """A preset's name, or a mapping with the four tags, as a ``TagSet``.

    Raises:
        ValueError: in words, for anything else.
    """
    if isinstance(value, TagSet):
        return value
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    names = [field.name for field in fields(TagSet)]
    known = isinstance(value, Mapping) and {"think_start", "think_end"} <= set(value) <= set(names)
    if known and all(isinstance(tag, str) or tag is None for tag in value.values()):
        return TagSet(**{key: tag for key, tag in value.items() if tag or key.startswith("think")})
    raise ValueError(
        f"one of {', '.join(PRESETS)} is expected, or a mapping of {', '.join(names)} to the tags themselves"
    )


#: The type of a field that holds tags.
Tags = Annotated[InstanceOf[TagSet], BeforeValidator(as_tag_set)]


def places(text: str, tag: str, *, ignore_case: bool = True) -> list[int]:
    """Where ``tag`` stands in ``text``, in order, not overlapping."""
    return [found.start() for found in re.finditer(re.escape(tag), text, re.IGNORECASE if ignore_case else 0)]


def _at(text: str, tag: str, place: int, ignore_case: bool) -> bool:
    return re.compile(re.escape(tag), re.IGNORECASE if ignore_case else 0).match(text, place) is not None
