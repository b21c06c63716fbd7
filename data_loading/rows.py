"""A checked file as a sequence that holds where its rows are, and reads each when it is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        bad_places: where each of the skipped rows is. problems: the first sentences about them.
        not_drawn: left out by max_samples.
    """

    name: str
    schema: str = ""
    rows: int = 0
    used: int = 0
    filtered: int = 0
    skipped: int = 0
    not_drawn: int = 0
    problems: list[str] = field(default_factory=list)
    bad_records: array[int] = field(default_factory=lambda: array("q"))

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.used} rows ({self.schema or 'no schema'})"]
        for count, what in (
            (self.filtered, "left out by filter_keywords"),
            (self.not_drawn, "left out by max_samples"),
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
        keys: np.ndarray,
        report: Report,
    ) -> None:
        """
        Args:
            records: (N,) the source's record of each row. parts: (N,) which of the rows that the record becomes.
            keys: (N,) uint64, equal where prompts are, up to case and spaces (``normalising.prompt_key``).
        """
        self._source, self._convert = source, convert
        self.records, self.parts, self.keys = records, parts, keys
        self.report = report

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
        return Rows(
            self._source,
            self._convert,
            self.records[indices],
            self.parts[indices],
            self.keys[indices],
            report,
        )


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
        self._index = array("q"), array("q"), array("Q")

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any], list[Row]]]:
        """Each usable record with the rows that it becomes."""
        for number, fields, problem in self.source.scan():
            self.report.rows += 1
            if fields is not None and self._words and _mentions(fields, self._words):
                self.report.filtered += 1
                continue
            try:
                if fields is None:
                    raise BadRowError(problem)
                rows = self.convert(fields)
            except BadRowError as error:
                self._bad(number, str(error))
                continue
            key = prompt_key(rows[0])
            for part in range(len(rows)):
                for values, value in zip(self._index, (number, part, key), strict=True):
                    values.append(value)
            self.report.used += len(rows)
            yield fields, rows

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

    def _bad(self, number: int, reason: str) -> None:
        sentence = f"{self.source.place(number)}: {reason}"
        if not self.skips:
            raise DataLoadError(f'{sentence} (on_bad_row="skip" leaves such rows out)')
        self.report.skipped += 1
        self.report.bad_records.append(number)
        if len(self.report.problems) < SENTENCES_KEPT:
            self.report.problems.append(sentence)

    def rows(self) -> Rows:
        """What has been found usable so far."""
        records, parts, keys = (np.array(values) for values in self._index)
        return Rows(self.source, self.convert, records, parts, keys, self.report)


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
