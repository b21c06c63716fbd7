"""Comma- or tab-separated files, indexed by offset. Every cell is text: nothing guesses that 007 is a 7."""

from __future__ import annotations

import csv
import io
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from config.errors import DataLoadError
from data_loading.json_files import BOM
from data_loading.messages import has_half_characters
from data_loading.records import LONGEST_LINE, BadRowError, Record, check_start, open_for_reading, too_long


class CsvFile:
    """The first line names the columns; a quoted cell may run over several lines."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._file: BinaryIO = open_for_reading(path)
        self._offsets, self._lengths, self._lines = array("q"), array("q"), array("q")
        self._columns: list[str] = []

    def scan(self) -> Iterator[Record]:
        """Every row after the header."""
        self._offsets, self._lengths, self._lines = array("q"), array("q"), array("q")
        self._file.seek(0)
        check_start(Path(self.name), self._file.read(4))
        self._file.seek(0)
        lines = _Lines(self._file, self.name)
        header: list[str] | None = None
        while lines.more():
            start, line_number = lines.position, lines.number + 1
            cells, problem = self._next_row(lines)
            if not cells and problem is None:  # a blank line
                continue
            if header is None:
                header = self._columns = self._header(cells, problem)
                continue
            self._offsets.append(start)
            self._lengths.append(lines.position - start)
            self._lines.append(line_number)
            yield self._record(len(self._offsets) - 1, cells, problem)

    def _next_row(self, lines: Iterator[str]) -> tuple[list[str], str | None]:
        limit = csv.field_size_limit(LONGEST_LINE)  # of the whole process, hence put back below
        try:
            return next(csv.reader(lines, delimiter=self._delimiter, strict=True), []), None
        except csv.Error as error:
            return [], f"not CSV ({error}); quote cells that hold quotes, and double the quotes in them"
        except BadRowError as error:
            return [], str(error)
        finally:
            csv.field_size_limit(limit)

    def _header(self, cells: list[str], problem: str | None) -> list[str]:
        if problem is not None:
            raise DataLoadError(f"{self.name}:1: {problem}")
        try:
            names = [_text(cell).strip() for cell in cells]
        except BadRowError as error:
            raise DataLoadError(f"{self.name}:1: {error}") from None
        if "" in names or len(set(names)) < len(names):
            raise DataLoadError(
                f"{self.name}:1: the first line must name the columns, each differently, found {names!r:.120}"
            )
        if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
            raise DataLoadError(
                f"{self.name}:1: commas between the columns are expected, found {names[0]!r:.80}; "
                "export with commas, or with tabs as .tsv"
            )
        return names

    def _record(self, number: int, cells: list[str], problem: str | None) -> Record:
        if problem is None:
            try:
                return Record(number, self._fields(cells))
            except BadRowError as error:
                problem = str(error)
        return Record(number, None, problem)

    def _fields(self, cells: list[str]) -> dict[str, Any]:
        if len(cells) != len(self._columns):
            raise BadRowError(
                f"{len(self._columns)} cells are expected ({', '.join(self._columns):.80}), found {len(cells)}; "
                "quote cells with commas or line ends in them"
            )
        return dict(zip(self._columns, map(_text, cells), strict=True))

    def read(self, number: int) -> Mapping[str, Any]:
        """One row, read and parsed again."""
        data = os.pread(self._file.fileno(), self._lengths[number], self._offsets[number])
        text = data.decode("utf-8", errors="surrogateescape")
        cells, problem = self._next_row(io.StringIO(text, newline="\n"))
        try:
            if problem is None:
                return self._fields(cells)
        except BadRowError:
            pass
        raise DataLoadError(f"{self.place(number)}: the file has changed since it was checked")

    def place(self, number: int) -> str:
        """``file:line``, the first line of the row."""
        return f"{self.name}:{self._lines[number]}"

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _text(cell: str) -> str:
    """Bytes that are no UTF-8 came through as surrogates; a row with one is refused, not repaired."""
    if "\0" in cell or has_half_characters(cell):
        raise BadRowError("nul bytes, or not UTF-8; save the file as UTF-8")
    return cell


class _Lines(Iterator[str]):
    """The lines of a file, with the position after the last one given."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.number = file, 0
        self.position = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(self.position)

    def more(self) -> bool:
        return bool(self.file.peek(1))  # type: ignore[attr-defined]  # open() gives a BufferedReader

    def __next__(self) -> str:
        line = self.file.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self.position += len(line)
        self.number += 1
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = self.file.readline(1 << 20)
                self.position += len(line)
            raise BadRowError(too_long())
        return line.decode("utf-8", errors="surrogateescape")
