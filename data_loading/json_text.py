"""Strict JSON: what is not in the standard, or means two things, is refused with its column."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from config.errors import DataLoadError
from data_loading.records import BadRowError

DEEPEST = 100
TOO_DEEP = f"lists or objects more than {DEEPEST} deep within each other; flatten them"
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}


def kind_of(value: Any) -> str:
    """What a person calls this kind of JSON value."""
    return KINDS.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _refuse_constant(name: str) -> NoReturn:
    raise BadRowError(f"{name} is not JSON; write a number, a text or null")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadRowError(f"the number {text:.40} is too large for a float64; write it as text")
    return number


def _whole(text: str) -> int:
    if len(text) > 1000:  # Python refuses more than 4300 digits, with a sentence about sys
        raise BadRowError(f"a whole number of {len(text)} digits; write it as text")
    return int(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise BadRowError(f'the field "{twice}" is there twice; leave one of them out')
    return fields


DECODER = json.JSONDecoder(
    object_pairs_hook=_distinct, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
)


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The value that begins at ``start`` and the position after it.

    Raises:
        BadRowError: with the column in its line and what stands there.
    """
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        found = text[error.pos : error.pos + 20].splitlines() or [""]
        near = f"found {found[0]!r}" if found[0] else "the line ends there"
        hint = "; strings take double quotes" if found[0].startswith("'") else ""
        reason = error.msg[0].lower() + error.msg[1:]
        raise BadRowError(f"not JSON at column {error.colno} ({reason}; {near}){hint}") from None
    except RecursionError:
        raise BadRowError(TOO_DEEP) from None
    if text.count("[", start, end) + text.count("{", start, end) > DEEPEST and _depth(value) > DEEPEST:
        raise BadRowError(TOO_DEEP)
    return value, end


def _depth(value: Any) -> int:
    """Lists and objects within each other; counted without recursion, which is what deep ones break."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (list, dict))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def parse_object(text: str) -> dict[str, Any]:
    """One line as an object.

    >>> parse_object('{"prompt": "2 4"}')
    {'prompt': '2 4'}
    """
    return as_object(parse_value(text))


def parse_value(text: str) -> Any:
    """A text that is one value and nothing else.

    >>> parse_value('["2", "4"]')
    ['2', '4']
    """
    begin = len(text) - len(text.lstrip(" \t\r\n"))
    value, end = decode(text, begin)
    rest = text[end:].strip(" \t\r\n")
    if rest:
        raise BadRowError(f"more text after the row at column {end + 1} ({rest[:20]!r}); one row per line")
    return value


def as_object(value: Any) -> dict[str, Any]:
    """``value``, if it is an object."""
    if not isinstance(value, dict):
        raise BadRowError(f'an object such as {{"prompt": "…"}} is expected, found {kind_of(value)}')
    return value


def to_json(fields: Mapping[str, Any], place: str) -> str:
    """One line that :func:`parse_object` reads back; dates and the like as text.

    Raises:
        DataLoadError: for what JSON cannot hold, such as NaN or bytes.
    """
    try:
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False, default=_as_text)
        line.encode("utf-8")
        return line
    except UnicodeEncodeError:  # half a character in a column that nobody tokenises
        return json.dumps(fields, allow_nan=False, default=_as_text)
    except (ValueError, TypeError, RecursionError) as error:
        raise DataLoadError(f"{place}: cannot be written as JSON ({error}); leave that column out") from None


def _as_text(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")
