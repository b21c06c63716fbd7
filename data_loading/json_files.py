"""JSON Lines, indexed by offset, and JSON arrays."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from config.errors import DataLoadError
from data_loading.json_text import as_object, decode, parse_object
from data_loading.records import (
    LONGEST_LINE,
    BadRowError,
    Record,
    check_start,
    decode_line,
    open_for_reading,
    too_long,
)

BOM = b"\xef\xbb\xbf"


class JsonLines:
    """One object per line. Held in memory: where each line is (20 bytes a row), never the text.

    Blank lines, a byte order mark and Windows line ends are no mistakes.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file: BinaryIO = open_for_reading(path)
        self._offsets, self._lengths, self._lines = array("q"), array("q"), array("q")

    def scan(self) -> Iterator[Record]:
        """Every line that is not blank."""
        self._offsets, self._lengths, self._lines = array("q"), array("q"), array("q")
        self._file.seek(0)
        check_start(Path(self.name), self._file.read(4))
        offset = self._skip_bom()
        line_number = 0
        while line := self._file.readline(LONGEST_LINE + 1):
            line_number += 1
            start, offset = offset, offset + len(line)
            problem = None
            if len(line) > LONGEST_LINE:
                offset += self._skip_line(line)
                problem = too_long()
            elif not line.strip():
                continue
            self._offsets.append(start)
            self._lengths.append(len(line))
            self._lines.append(line_number)
            yield self._record(len(self._offsets) - 1, line, problem)

    def _skip_bom(self) -> int:
        self._file.seek(0)
        if self._file.read(len(BOM)) == BOM:
            return len(BOM)
        self._file.seek(0)
        return 0

    def _skip_line(self, line: bytes) -> int:
        """Read to the end of a line that is too long; how many bytes that was."""
        skipped = 0
        while line and not line.endswith(b"\n"):
            line = self._file.readline(1 << 20)
            skipped += len(line)
        return skipped

    @staticmethod
    def _record(number: int, line: bytes, problem: str | None) -> Record:
        if problem is None:
            try:
                return Record(number, parse_object(decode_line(line).rstrip("\r\n")))
            except BadRowError as error:
                problem = str(error)
        return Record(number, None, problem)

    def read(self, number: int) -> Mapping[str, Any]:
        """One line, read and parsed again; a position of its own, so threads do not disturb each other."""
        line = os.pread(self._file.fileno(), self._lengths[number], self._offsets[number])
        try:
            return parse_object(decode_line(line).rstrip("\r\n"))
        except BadRowError:
            raise DataLoadError(f"{self.place(number)}: the file has changed since it was checked") from None

    def place(self, number: int) -> str:
        """``file:line``."""
        return f"{self.name}:{self._lines[number]}"

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class JsonArray:
    """A list of objects, with the line on which each begins. It is held in memory whole; JSON Lines are not."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        with open_for_reading(path) as file:
            data = file.read()
        check_start(path, data[:4])
        try:
            self._text = decode_line(data.removeprefix(BOM))
        except BadRowError as error:
            raise DataLoadError(f"{path}: {error}") from None
        self._rows: list[Any] = []
        self._lines = array("q")

    def scan(self) -> Iterator[Record]:
        """Every element. After a mistake in the JSON itself nothing can be told apart, so it ends the file."""
        self._rows, self._lines = [], array("q")
        text, self._text = self._text, ""
        position, line = self._to_element(text, 0, 1)
        position, line = self._to_element(text, position + 1, line)  # after the bracket
        while text[position : position + 1] != "]":
            try:
                value, end = decode(text, position)
            except BadRowError as error:
                raise DataLoadError(f"{self.name}:{line}: in the row that begins here, {error}") from None
            self._rows.append(value)
            self._lines.append(line)
            yield self._record(len(self._rows) - 1, value)
            position, line = self._to_element(text, end, line + text.count("\n", position, end))
            if text[position : position + 1] == ",":
                position, line = self._to_element(text, position + 1, line)
            elif text[position : position + 1] != "]":
                found = (
                    repr(text[position : position + 20]) if position < len(text) else "the end of the file"
                )
                raise DataLoadError(
                    f"{self.name}:{line}: a comma or ] is expected after a row, found {found}"
                )
        if text[position + 1 :].strip():
            raise DataLoadError(
                f"{self.name}:{line}: more text after the list; one list per file is expected"
            )

    @staticmethod
    def _to_element(text: str, position: int, line: int) -> tuple[int, int]:
        """The next character that is not white space, and its line."""
        end = position
        while end < len(text) and text[end] in " \t\r\n":
            end += 1
        return end, line + text.count("\n", position, end)

    @staticmethod
    def _record(number: int, value: Any) -> Record:
        try:
            return Record(number, as_object(value))
        except BadRowError as error:
            return Record(number, None, str(error))

    def read(self, number: int) -> Mapping[str, Any]:
        """An element of the list."""
        return as_object(self._rows[number])

    def place(self, number: int) -> str:
        """``file:line``."""
        return f"{self.name}:{self._lines[number]}"


def open_json(path: Path) -> JsonLines | JsonArray:
    """A list, or one object per line: by the first character, whatever the name ends in."""
    with open_for_reading(path) as file:
        start = file.read(1 << 16).removeprefix(BOM).lstrip()
    return JsonArray(path) if start.startswith(b"[") else JsonLines(path)
