"""How a setting of an older system becomes one of ours: the forms in which the tables of this package say it.

A setting of theirs is one of four things. It is one of ours under another name (``Renamed``, perhaps with its value
converted); it is one of several that become ours together (``Together``: theirs counts prompts per pass and passes
per step, ours prompts per step); it is not needed (``Ignored``, with the reason, where the trained model is the same
without it); or it is not there (``Missing``, where it is not the same: said loudly, and an error if strict).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from config.declaration import shown
from config.errors import InvalidConfigurationError
from config.settings import Given

OFF: tuple[Any, ...] = (None, False, 0, "", "none", [])


class Ours(NamedTuple):
    """One of our fields with its value, and the names of theirs that it comes from (the first for its place)."""

    field: str
    value: Any
    names: tuple[str, ...]


class Said(NamedTuple):
    """What a user has to know about settings of theirs; ``loud`` where another model is trained without them."""

    names: tuple[str, ...]
    text: str
    loud: bool = False


class Renamed(NamedTuple):
    """Ours under another name."""

    ours: str
    convert: Callable[[Values, str], Any] | None = None
    say: str = ""  # where the two differ


class Ignored(NamedTuple):
    """Of no consequence for what is trained; said unless it is switched off."""

    why: str

    @property
    def summary(self) -> str:
        """For a table of names."""
        return f"– {self.why}"


class Missing(NamedTuple):
    """Of consequence, and not there; nothing is said where it is switched off."""

    why: str

    @property
    def summary(self) -> str:
        """For a table of names."""
        return f"**not there**: {self.why}"


class Together(NamedTuple):
    """One of the names that ``make`` reads; it is called once."""

    make: Callable[[Values], Iterator[Ours | Said]]
    summary: str  # what they become, for a table of names


Meaning = Renamed | Ignored | Missing | Together


class Flag(NamedTuple):
    """A flag of their command line, for a parser of ours."""

    name: str  # as they write it, without the dashes
    is_switch: bool
    meaning: str


class Translation(NamedTuple):
    """Theirs as ours, and what is to be said."""

    settings: list[Given]
    notes: list[str]
    loud: list[str]


class Values:
    """Their settings by name, read with their types. ``has_groups``: the stage samples several answers to a prompt."""

    def __init__(self, given: Mapping[str, Given], *, has_groups: bool = True) -> None:
        self.given = given
        self.has_groups = has_groups

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of ``names`` that were given, the one of the highest rank first."""
        found = [name for name in names if name in self.given]
        return tuple(sorted(found, key=lambda name: -self.given[name].rank))

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it was given; a flag's text as the number, list or word that it is."""
        one = self.given.get(name)
        if one is None:
            return default
        return _literal(one.value) if one.is_text else one.value

    def refuse(self, name: str, expected: str) -> NoReturn:
        one = self.given[name]
        raise InvalidConfigurationError(
            f"{one.place}: {name}: {expected} is expected, found {shown(one.value)}"
        )

    def number(self, name: str, default: float | None = None) -> Any:
        """A finite number."""
        value = self.raw(name, default)
        if isinstance(value, str):
            value = _literal(value)
        whole = isinstance(value, int) and abs(value) < 1 << 63
        if isinstance(value, bool) or not (whole or (isinstance(value, float) and math.isfinite(value))):
            self.refuse(name, "a number")
        return value

    def whole(self, name: str, default: int | None = None) -> Any:
        """A whole number from 0 up."""
        value = self.number(name, default)
        if value != int(value) or value < 0:
            self.refuse(name, "a whole number")
        return int(value)

    def switch(self, name: str, default: bool = False) -> bool:
        """On or off."""
        value = self.raw(name, default)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        """Text that is not empty."""
        one = self.given.get(name)
        value = default if one is None else one.value
        if not isinstance(value, str) or not value.strip():
            self.refuse(name, "text")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """Names and values."""
        value = self.raw(name)
        if not isinstance(value, dict):
            self.refuse(name, "a table (names and values)")
        return value


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        try:
            return float(value)
        except ValueError:
            return value


@dataclass(frozen=True)
class System:
    """An older system: what its settings mean here."""

    name: str  # as a user names it
    title: str
    settings: Mapping[str, Meaning]
    preset: str | None = None  # its own defaults, which a file of its leaves unsaid
    headings: frozenset[str] = frozenset()  # of its files
    tables: frozenset[str] = frozenset()  # settings whose value is a table, so no heading
    flags: tuple[Flag, ...] = field(default=())
    file_variable: str | None = None  # of the environment: names the file where no other is named
    stage: str | None = None  # the one config class that its names are for, if they are
    other_stages: Mapping[str, str] = field(
        default_factory=dict
    )  # config class → the system that has its names there

    def knows(self, name: str) -> bool:
        """Whether the name means something else here, or nothing."""
        return name in self.settings

    def translate(self, given: Mapping[str, Given], *, has_groups: bool = True) -> Translation:
        """All of ``given`` (by name), none dropped without a word."""
        values, result = Values(given, has_groups=has_groups), Translation([], [], [])
        made: list[Any] = []
        said: dict[tuple[str, bool], list[str]] = {}
        for name in given:
            meaning = self.settings[name]
            if isinstance(meaning, Together) and meaning.make in made:
                continue
            for one in _means(values, name, meaning):
                if isinstance(one, Said):
                    said.setdefault((one.text, one.loud), []).extend(one.names)
                else:
                    result.settings.append(_as_ours(one, given, self.name))
            made += [meaning.make] if isinstance(meaning, Together) else []
        for (text, loud), names in said.items():
            names = list(dict.fromkeys(names))
            sentence = f"{given[names[0]].place}: {', '.join(names)}: {text}"
            (result.loud if loud else result.notes).append(sentence)
        return result


def _means(values: Values, name: str, meaning: Meaning) -> Iterator[Ours | Said]:
    if isinstance(meaning, Together):
        yield from meaning.make(values)
    elif isinstance(meaning, Renamed):
        value = values.given[name].value if meaning.convert is None else meaning.convert(values, name)
        yield Ours(meaning.ours, value, (name,))
        if meaning.say:
            yield Said((name,), meaning.say)
    elif values.raw(name) not in OFF:
        yield Said((name,), meaning.why, loud=isinstance(meaning, Missing))


def _as_ours(one: Ours, given: Mapping[str, Given], system: str) -> Given:
    first = given[one.names[0]]
    place = first.place if one.names == (one.field,) else f"{first.place} ({', '.join(one.names)})"
    origin = type(first.origin)(first.origin.kind, place)
    # A value that was not converted is still the text of a flag.
    is_text = first.is_text and one.value is first.value
    return Given(one.field, one.value, origin, first.rank, place, is_text=is_text, system=system)
