"""The declarations read back: every option of a config class with its section, type, range and default.

Help, ``docs/configuration.md``, generated files and the loader go by this list, so that none of them can say anything
else than what is checked.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from config.declaration import INT32, Declaration

NONE_WORDS = ("none", "null")
BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True)
class Option:
    """One field of a config class."""

    name: str
    section: str
    owner: str  # the class that declares it
    meaning: str
    default: Any
    base: Any  # its type without None and without limits: int, float, bool, str, list, dict or a config class
    element: Any  # the type of a list's elements
    choices: tuple[Any, ...]  # of a Literal
    limits: str  # such as "> 0, ≤ 1"
    optional: bool  # whether it may be None

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.base is bool

    @property
    def is_nested(self) -> bool:
        """Whether its value is a table of its own, so that a file's heading of this name is no mere heading."""
        return self.base is dict or (isinstance(self.base, type) and issubclass(self.base, Declaration))

    @property
    def values(self) -> str:
        """What may be written, in words: the type with its range, or the choices."""
        if self.choices:
            text = " | ".join(str(choice) for choice in self.choices)
        else:
            text = {bool: "true | false", int: "integer", float: "number", str: "text", list: "list"}.get(
                self.base, "table"
            )
        text = f"{text} {self.limits}" if self.limits else text
        return f"{text}, or none" if self.optional and "none" not in self.choices else text

    def shown(self, value: Any) -> str:
        """A value as a file would have it; None is ``none``, or ``unset`` where none is a choice of its own."""
        if value is None:
            return "unset" if "none" in self.choices else "none"
        if isinstance(value, Declaration):
            value = value.as_dict()
        if isinstance(value, bool):
            return str(value).lower()
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def from_text(self, text: str) -> Any:
        """The value that a flag or an environment variable means; text that means none is left to be refused."""
        word = text.strip()
        for choice in self.choices:
            if str(choice) == word:
                return choice
        if self.optional and word.lower() in NONE_WORDS:
            return None
        if self.base is bool:
            return BOOLEANS.get(word.lower(), text)
        if self.base is list and not word.startswith(("[", "{")):
            parts = [part.strip() for part in word.split(",") if part.strip()]
            return [_number_or_text(part) for part in parts] if self.element is float else parts
        if self.is_nested or self.base is list:
            try:
                return json.loads(word)
            except (ValueError, RecursionError):
                return text
        return text

    def from_file(self, value: Any) -> Any:
        """A file's value; TOML cannot write None, so there (and everywhere) the word ``none`` stands for it."""
        word = isinstance(value, str) and value.strip().lower() in NONE_WORDS
        return None if word and self.optional and value not in self.choices else value


def options_of(cls: type[Declaration]) -> dict[str, Option]:
    """Every option of ``cls`` by name, section by section, in the order in which they are declared."""
    read: Any = _options  # mypy takes a dataclass's class for as unhashable as its instances
    found: dict[str, Option] = read(cls)
    return found


@functools.cache
def _options(cls: Any) -> dict[str, Option]:
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    found = {}
    for owner in reversed(cls.__mro__):
        section = owner.__name__.removesuffix("Config").lower()
        for name in inspect.get_annotations(owner):
            if name not in fields:
                continue
            info: Any = fields[name].default
            section = (info.json_schema_extra or {}).get("section") or section
            found[name] = Option(
                name, section, owner.__name__, info.description, info.default, **_type_of(hints[name])
            )
    order = list(dict.fromkeys(option.section for option in found.values()))
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].section)))


def sections_of(cls: type[Declaration]) -> dict[str, list[Option]]:
    """The options of ``cls`` under their headings."""
    grouped: dict[str, list[Option]] = {}
    for option in options_of(cls).values():
        grouped.setdefault(option.section, []).append(option)
    return grouped


def _type_of(hint: Any) -> dict[str, Any]:
    kinds = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    optional, kind, limits = len(kinds) < len(get_args(hint)) and kinds != [hint], kinds[0], ""
    if get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
        limits = _limits(metadata)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    arguments = get_args(kind)
    element = arguments[0] if get_origin(kind) is list and arguments else None
    element = get_args(element)[0] if get_origin(element) is Annotated else element
    base = type(choices[0]) if choices else (get_origin(kind) or kind)
    return {"base": base, "element": element, "choices": choices, "limits": limits, "optional": optional}


SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _limits(metadata: list[Any]) -> str:
    parts = []
    for one in metadata:
        if getattr(getattr(one, "func", None), "__name__", "") == "_all_or_some":
            return "≥ 1, or -1"
        for limit in getattr(one, "metadata", ()):
            for key, sign in SIGNS.items():
                bound = getattr(limit, key, None)
                if bound is not None and bound not in (
                    INT32,
                    1 << 64,
                ):  # what a machine holds is no range to learn
                    parts.append(f"{sign} {bound:g}")
    return ", ".join(parts)


def _number_or_text(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def plain(value: Any) -> Any:
    """Tables, lists and numbers all the way down, as JSON and TOML have them."""
    if isinstance(value, Declaration):
        return value.as_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
