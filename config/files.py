"""Reading a configuration file: TOML, YAML or JSON to settings, each with its line.

Headings (tables) order a file and mean nothing: a setting is known by its own name, which is unique. ``read_settings``
therefore gives a flat list; the headings above each one are kept for the files of other systems.

YAML is read as its version 1.2 has it: ``1e-5`` is a number, ``yes``, ``12:30`` and ``2026-01-01`` are text, a key
given twice is refused. The loader is a class of our own: mlx-lm changes PyYAML's for the whole process.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from config.declaration import shown
from config.errors import InvalidConfigurationError

LARGEST = 1_000_000  # bytes; a hundred options take four thousand
DEEPEST = 20  # headings above a setting

Path_ = tuple[str, ...]


class Setting(NamedTuple):
    """One line of a file: ``[headings]``, ``name = value``."""

    headings: tuple[str, ...]
    name: str
    value: Any
    line: int | None


class Parsed(NamedTuple):
    """A file's contents, and the line of each key by its path."""

    content: Any
    lines: Mapping[Path_, int]


def read_settings(path: str | Path, is_nested: Callable[[str], bool]) -> list[Setting]:
    """Every setting of a file, in order. ``is_nested(name)``: whether a table of this name is a value itself.

    Raises:
        InvalidConfigurationError: one sentence with the file, and the line where there is one.
    """
    file = Path(path).expanduser()
    text = _text(file)
    parsers = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}
    parser = parsers.get(file.suffix.lower())
    if parser is None:
        _fail(file, f"the name ends in {file.suffix or 'nothing'!r}; .toml, .yaml, .yml or .json is expected")
    try:
        parsed = parser(file, text)
    except RecursionError:
        _fail(file, "it is nested too deeply to be read; settings stand under one heading, or none")
    if not isinstance(parsed.content, dict):
        _fail(file, f"settings (name and value) are expected, found {shown(parsed.content)}")
    return list(_flattened(file, parsed, is_nested))


def _flattened(file: Path, parsed: Parsed, is_nested: Callable[[str], bool]) -> Iterator[Setting]:
    def walk(table: dict[Any, Any], path: Path_) -> Iterator[Setting]:
        for key, value in table.items():
            here = (*path, str(key))
            if isinstance(value, dict) and not is_nested(str(key)):
                if len(here) > DEEPEST:
                    _fail(file, f"headings are nested more than {DEEPEST} deep", parsed.lines.get(here))
                yield from walk(value, here)
            else:
                yield Setting(path, str(key), value, parsed.lines.get(here))

    return walk(parsed.content, ())


def _fail(file: Path, what: str, line: int | None = None) -> NoReturn:
    raise InvalidConfigurationError(f"{file}{'' if line is None else f':{line}'}: {what}")


def _text(file: Path) -> str:
    try:
        size = file.stat().st_size
        if file.is_dir():
            _fail(file, "this is a folder; a configuration file is expected")
        if size > LARGEST:
            _fail(
                file,
                f"it has {size / 1e6:.1f} MB, and a configuration file has some kB; is it a data file? Those go under "
                "train_path",
            )
        raw = file.read_bytes()
    except FileNotFoundError:
        _fail(file, "there is no such file; check the path")
    except InvalidConfigurationError:  # a ValueError, too
        raise
    except (OSError, ValueError) as error:  # ValueError: a nul byte in the name
        _fail(file, f"it cannot be read ({getattr(error, 'strerror', None) or error})")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        _fail(file, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8", line)
    if "\0" in text:
        _fail(file, "there is a nul byte; is it a text file?", text[: text.index("\0")].count("\n") + 1)
    return text.replace("\r\n", "\n").replace("\r", "\n")


# TOML ----------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_PLACE = re.compile(r"\s*\(at line (\d+), column \d+\)")


def _toml(file: Path, text: str) -> Parsed:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _PLACE.search(str(error))
        reason = _PLACE.sub("", str(error)).replace(" (at end of document)", "")
        _fail(file, f"this is not TOML: {_sentence(reason)}", int(place[1]) if place else None)
    except ValueError as error:  # a whole number of thousands of digits
        _fail(file, f"this is not TOML that can be read: {_sentence(str(error))}")
    return Parsed(content, _toml_lines(text))


def _toml_lines(text: str) -> dict[Path_, int]:
    """The line of each key of a valid file; what stands inside multi-line strings is passed over."""
    lines: dict[Path_, int] = {}
    header: Path_ = ()
    closing = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if closing:
            closing = "" if closing in line else closing
            continue
        if match := _HEADER.match(line):
            header = _toml_path(match[1])
            lines.setdefault(header, number)
        elif match := _KEY.match(line):
            lines.setdefault((*header, *_toml_path(match[1])), number)
        for quotes in ('"""', "'''"):
            if line.count(quotes) % 2:
                closing = quotes
    return lines


def _toml_path(text: str) -> Path_:
    return tuple(part.strip("\"'") for part in re.findall(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""", text))


# JSON ----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[{}\[\]]')


def _json(file: Path, text: str) -> Parsed:
    if not text.strip():
        return Parsed({}, {})
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        _fail(file, f"this is not JSON: {_sentence(error.msg)}", error.lineno)
    except ValueError as error:
        _fail(file, f"this is not JSON that can be read: {_sentence(str(error))}")
    return Parsed(content, _json_lines(file, text))


def _json_lines(file: Path, text: str) -> dict[Path_, int]:
    """The line of each key of a valid file; a key given twice is refused (Python would keep the last)."""
    lines: dict[Path_, int] = {}
    path: list[str] = [""]  # of the open brackets, the last entry being the key under way
    line, seen = 1, 0
    for token in _TOKEN.finditer(text):
        line, seen = line + text.count("\n", seen, token.start()), token.start()
        if token[0] in "{[":
            # A list's entries are told apart by where they begin, so that two of them may have the same keys.
            path.append("" if token[0] == "{" else f"[{token.start()}")
        elif token[0] in "}]":
            path.pop()
            if path[-1:] and path[-1].startswith("["):
                path[-1] = f"[{token.start()}"
        elif token[1]:
            path[-1] = json.loads(token[0][: -len(token[1])])
            here = tuple(path[1:])
            if here in lines:
                _fail(file, f'"{path[-1]}" is given twice (first in line {lines[here]}); keep one', line)
            lines[here] = line
    return lines


# YAML ----------------------------------------------------------------------------------------------------


def _yaml(file: Path, text: str) -> Parsed:
    import yaml

    from config.yaml_nodes import NotPlain, compose, plain_value

    lines: dict[Path_, int] = {}
    try:
        node = compose(text)
        content = {} if node is None else plain_value(node, lines)
    except NotPlain as error:
        _fail(file, str(error), error.line)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "it cannot be read"
        _fail(file, f"this is not YAML: {_sentence(reason)}", mark.line + 1 if mark else None)
    except yaml.YAMLError as error:  # a control character
        _fail(file, f"this is not YAML: {_sentence(str(error).splitlines()[0])}")
    return Parsed({} if content is None else content, lines)


def _sentence(reason: str) -> str:
    reason = reason.strip().rstrip(".")
    reason = reason if len(reason) <= 160 else f"{reason[:157]}…"
    return reason[:1].lower() + reason[1:]
