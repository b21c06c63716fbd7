"""A setting on its way to a field: what was given, where, and what it outranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["default", "algorithm", "preset", "file", "environment", "command line"]


@dataclass(frozen=True)
class Origin:
    """Where a value came from; as text ``run.yaml:12``, ``preset small``, ``command line --learning-rate``."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return self.text


def default() -> Origin:
    """Nobody set it."""
    return Origin("default", "default")


@dataclass(frozen=True)
class Given:
    """One setting as it was given."""

    name: str
    value: Any
    origin: Origin
    rank: int  # of its source; the highest wins
    place: str  # for sentences: the file and line, the variable or the flag
    is_text: bool = False  # from a flag or a variable: its type is the option's
    system: str | None = None  # the older system whose names the source has, if not ours
