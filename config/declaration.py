"""How an option is declared: once, with its type, range and one line of meaning.

``declared`` turns a class into a frozen pydantic dataclass whose mistakes come back as one sentence
(``InvalidConfigurationError``) naming the field, what was found and what was expected, and which
remembers what its author set on purpose, so that an algorithm's own defaults can fill in the rest.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self, TypeVar, dataclass_transform, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from config.errors import InvalidConfigurationError

T = TypeVar("T")


def option(*, default: Any, meaning: str, section: str | None = None) -> Any:
    """A field with its default and its one line of documentation (meaning, unit, range, paper symbol).

    ``section`` is the heading under which help, files and documents show this field and those declared after it.
    """
    return Field(default=default, description=meaning, json_schema_extra={"section": section})


def _not_bool(value: Any) -> Any:
    # bool is a subclass of int, so `batch_size = true` in a file would otherwise mean 1.
    if isinstance(value, bool):
        raise ValueError("true/false where a number is expected")
    return value


def _all_or_some(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("-1 (all) or at least 1 is expected")
    return value


_number = BeforeValidator(_not_bool)
INT32 = 1 << 31  # counts and lengths become sizes of arrays
PositiveInt = Annotated[int, _number, Field(gt=0, lt=INT32)]
AtLeastTwo = Annotated[int, _number, Field(ge=2, lt=INT32)]
NonNegativeInt = Annotated[int, _number, Field(ge=0, lt=INT32)]
LayerCount = Annotated[int, _number, Field(lt=INT32), AfterValidator(_all_or_some)]
Seed = Annotated[int, _number, Field(ge=0, lt=1 << 64)]
FiniteFloat = Annotated[float, _number, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, _number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, _number, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, _number, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, _number, Field(ge=0, lt=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, _number, Field(gt=0, le=1, allow_inf_nan=False)]


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean "x"?' for the valid name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def shown(value: Any) -> str:
    """What was found, short enough for a sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        text = f"a whole number of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}…"


def _problems(error: ValidationError, cls: type) -> list[tuple[str, str]]:
    """For each mistake the field, or "" where several are at odds, and a sentence."""
    names = [f.name for f in dataclasses.fields(cls)]
    problems = []
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"]]
        field = path[0] if path else ""
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            inner = get_type_hints(cls).get(field) if len(path) > 1 else None  # of a config within the config
            valid = [f.name for f in dataclasses.fields(inner)] if dataclasses.is_dataclass(inner) else names
            where = cls.__name__ if inner is None else field
            problems.append((field, f'{where} has no field "{path[-1]}"{nearest(path[-1], valid)}'))
            continue
        if problem["type"] == "value_error":  # a sentence of our own
            reason = str(problem["ctx"]["error"])
        else:
            reason = problem["msg"][0].lower() + problem["msg"][1:]
        problems.append(
            (field, f"{'.'.join(path)}: {reason} (found {shown(problem['input'])})" if path else reason)
        )
    return problems


class Declaration:
    """What every config class can do besides holding values."""

    _explicit = frozenset[str]()  # names that were given to the constructor

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, which count as set on purpose, like what was set so before."""
        return self._copy(changes, self._explicit | changes.keys())

    def was_set(self, name: str) -> bool:
        """Whether somebody set this field on purpose."""
        return name in self._explicit

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """A copy in which the fields that nobody set on purpose take these values."""
        return self._copy({k: v for k, v in defaults.items() if k not in self._explicit}, self._explicit)

    def _copy(self, changes: Mapping[str, Any], explicit: Iterable[str]) -> Self:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        copy = type(self)(**{**values, **changes})
        object.__setattr__(copy, "_explicit", frozenset(explicit))  # the dataclass is frozen
        return copy

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def declared(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, validated dataclass whose errors are sentences (see the module)."""
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def __init__(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            problems = _problems(error, made)
            message = "; ".join(sentence for _, sentence in problems)
            raise InvalidConfigurationError(message, problems) from None
        # The dataclass is frozen, hence object.__setattr__.
        object.__setattr__(self, "_explicit", frozenset(values))

    made.__init__ = __init__
    return made
