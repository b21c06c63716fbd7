"""A checked file as a sequence that holds where its rows are, and reads each when it is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np

from config.data_config import DataConfig
from config.errors import DataLoadError
from data_loading.normalising import prompt_key
from data_loading.records import BadRowError, Source
from data_loading.schemas import Kind, Row, Schema, find_schema, missing

SENTENCES_KEPT = 20


@dataclass
class Report:
    """What became of the rows of a file.

    Attributes:
        rows: rows in the file, blank lines apart. used: rows for the trainer that came of them.
        filtered: left out by filter_keywords. skipped: left out because they cannot be used.
        bad_records: number of each skipped record; ``Source.place`` has its line. problems: sentences about the first.
        not_drawn: left out by max_samples. set_aside: for validation.
    """

    name: str
    schema: str = ""
    rows: int = 0
    used: int = 0
    filtered: int = 0
    skipped: int = 0
    not_drawn: int = 0
    set_aside: int = 0
    problems: list[str] = field(default_factory=list)
    bad_records: array[int] = field(default_factory=lambda: array("q"))

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.used} rows ({self.schema or 'no schema'})"]
        for count, what in (
            (self.filtered, "left out by filter_keywords"),
            (self.not_drawn, "left out by max_samples"),
            (self.set_aside, "set aside for validation"),
            (self.skipped, "bad and skipped"),
        ):
            if count:
                parts.append(f"{count} {what}")
        lines = [", ".join(parts), *(f"  {problem}" for problem in self.problems)]
        if self.skipped > len(self.problems):
            lines.append(f"  … and {self.skipped - len(self.problems)} more")
        return "\n".join(lines)


class Rows(Sequence[Row]):
    """The usable rows of a source, as mappings for a trainer.

    Attributes:
        report: what was found on the way.
    """

    def __init__(
        self,
        source: Source,
        convert: Callable[[Mapping[str, Any]], list[Row]],
        records: np.ndarray,
        parts: np.ndarray,
        report: Report,
    ) -> None:
        """
        Args:
            records: (N,) the source's record of each row. parts: (N,) which of the rows that the record becomes.
        """
        self._source, self._convert = source, convert
        self.records, self.parts = records, parts
        self.report = report

    @cached_property
    def keys(self) -> np.ndarray:
        """(N,) uint64, equal where prompts are, up to case and spaces; reads every row when first asked for."""
        return np.fromiter((prompt_key(row) for row in self), np.uint64, len(self))

    def bad_places(self) -> list[str]:
        """Where each of the rows is that were skipped."""
        return [self._source.place(number) for number in self.report.bad_records]

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        number = int(self.records[index])
        try:
            return self._convert(self._source.read(number))[int(self.parts[index])]
        except (BadRowError, IndexError):
            raise DataLoadError(
                f"{self._source.place(number)}: the file has changed since it was checked"
            ) from None

    def place(self, index: int) -> str:
        """Where a row stands: ``file:line``."""
        return self._source.place(int(self.records[index]))

    def select(self, indices: np.ndarray) -> Rows:
        """Some of the rows, in this order."""
        report = Report(self.report.name, self.report.schema, rows=len(indices), used=len(indices))
        chosen = Rows(self._source, self._convert, self.records[indices], self.parts[indices], report)
        if "keys" in self.__dict__:  # known already: not read for them again
            chosen.__dict__["keys"] = self.keys[indices]
        return chosen


class Scan:
    """One pass over a source: what is usable, by which schema, and what is wrong with the rest."""

    def __init__(
        self, source: Source, config: DataConfig, kind: Kind | None, *, keep_bad: bool = False
    ) -> None:
        self.source, self.config, self.kind = source, config, kind
        self.skips = keep_bad or config.on_bad_row == "skip"
        self.report = Report(source.name)
        self.schema: Schema | None = None
        self._words = [word.casefold() for word in config.filter_keywords or ()]
        self._records, self._parts = array("q"), array("q")

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any], list[Row]]]:
        """Each usable record, by number and fields, with the rows that it becomes."""
        for number, fields, problem in self.source.scan():
            self.report.rows += 1
            if fields is not None and self._words and _mentions(fields, self._words):
                self.report.filtered += 1
                continue
            try:
                if fields is None:
                    raise BadRowError(problem or "")
                rows = self.convert(fields)
            except BadRowError as error:
                self.bad(number, str(error))
                continue
            self._records.extend([number] * len(rows))
            self._parts.extend(range(len(rows)))
            self.report.used += len(rows)
            yield number, fields, rows

    def convert(self, fields: Mapping[str, Any]) -> list[Row]:
        """A record's rows. The first usable record fixes the schema for all."""
        schema = self.schema or find_schema(fields, self.config, self.kind)
        if not schema.matches(fields, self.config):
            raise BadRowError(
                f"{missing(fields, self.config, [schema])} (columns: {', '.join(map(str, fields)) or 'none':.200}); "
                f"the rows before it are: {schema.name}"
            )
        use = self.kind if self.kind is not None else next(iter(schema.uses))
        rows = schema.uses[use](fields, self.config)
        self.schema, self.report.schema = schema, schema.name
        return rows

    def bad(self, number: int, reason: str) -> None:
        """Count a record that cannot be used, or refuse the file for it."""
        sentence = f"{self.source.place(number)}: {reason}"
        if not self.skips:
            raise DataLoadError(f'{sentence} (on_bad_row="skip" leaves such rows out)')
        self.report.skipped += 1
        self.report.bad_records.append(number)
        if len(self.report.problems) < SENTENCES_KEPT:
            self.report.problems.append(sentence)

    def rows(self) -> Rows:
        """What has been found usable so far."""
        return Rows(self.source, self.convert, np.array(self._records), np.array(self._parts), self.report)


def read_rows(source: Source, config: DataConfig, kind: Kind) -> Rows:
    """Check every row of a source once.

    Raises:
        DataLoadError: with file and line, for the first row that cannot be used (on_bad_row = "error"), or
            where none can be.
    """
    scan = Scan(source, config, kind)
    for _ in scan:
        pass
    report = scan.report
    if not report.used:
        if report.skipped:
            raise DataLoadError(
                f"{source.name}: none of {report.rows} rows can be used; first: {report.problems[0]}"
            )
        if report.filtered:
            raise DataLoadError(
                f"{source.name}: filter_keywords leaves none of {report.rows} rows; use fewer words"
            )
        raise DataLoadError(f"{source.name}: there are no rows; at least one is needed")
    return scan.rows()


def _mentions(fields: Mapping[str, Any], words: Sequence[str]) -> bool:
    """Whether a text anywhere in the row holds one of the words."""
    waiting: list[Any] = [fields]
    while waiting:  # not by recursion: rows may be nested as deep as JSON could be read
        value = waiting.pop()
        if isinstance(value, str):
            folded = value.casefold()
            if any(word in folded for word in words):
                return True
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    return False
