"""What is in a data file: counts, schema, lengths, duplicates, leaks, and every bad row."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config.data_config import DataConfig
from config.errors import DataLoadError
from config.training_config import TrainingConfig
from data_loading.histogram import histogram
from data_loading.loading import SPLIT_FILES, open_source, split_file
from data_loading.normalising import prompt_key, repeated, shared, text_key
from data_loading.records import path_of
from data_loading.rows import SENTENCES_KEPT, Report, Scan
from data_loading.schemas import LOADERS, Row
from data_loading.token_files import TokenFiles, prefix_of
from data_loading.token_rows import TokenRows

#: The fields of a row for a trainer that hold text, in the order in which they are reported.
TEXTS = ("prompt", "completion", "chosen", "rejected", "text", "completions", "steps")


@dataclass
class CheckReport:
    """What was found in one file; ``str()`` is the text.

    Attributes:
        report: rows, bad rows and the sentences about them. lengths: of each kind of text, in ``unit``: one per row, or
            one per entry where rows have a list of them.
        columns: in how many rows each column is. repeated_prompts: rows whose prompt an earlier row has.
        repeated_rows: rows that an earlier row equals. leaks: rows whose prompt is in another file, by its name.
    """

    report: Report
    unit: str
    lengths: Mapping[str, np.ndarray]
    columns: Mapping[str, int] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    repeated_rows: int = 0
    leaks: dict[str, int] = field(default_factory=dict)
    longest_prompt: int | None = None  # max_prompt_length, where lengths are in tokens

    @property
    def repeated_prompts(self) -> int:
        """Rows whose prompt, up to case and spaces, an earlier row has."""
        return repeated(self.keys)

    @property
    def ok(self) -> bool:
        """Whether there are rows and every one can be used. Duplicates and leaks are for a person to judge."""
        return self.report.used > 0 and not self.report.skipped

    def __str__(self) -> str:
        report = self.report
        found = f"{report.rows - report.skipped - report.filtered} usable, {report.skipped} bad"
        if report.filtered:
            found += f", {report.filtered} left out by filter_keywords"
        lines = [
            report.name,
            _line("rows", f"{report.rows} ({found})"),
            _line("schema", report.schema or "none"),
        ]
        if self.uses:
            lines.append(_line("read by", ", ".join(self.uses)))
        if self.columns:
            lines.append(_line("columns", ", ".join(f"{name} ({n})" for name, n in self.columns.items())))
        for name, lengths in self.lengths.items():
            if len(lengths):
                lines += [_line(name, _summary(lengths, self.unit)), *histogram(lengths)]
        if self.longest_prompt is not None and "prompt" in self.lengths:
            over = int((self.lengths["prompt"] > self.longest_prompt).sum())
            lines.append(
                _line("too long", f"{_rows(over)} with a prompt of more than {self.longest_prompt} tokens")
            )
        lines.append(
            _line(
                "duplicates",
                f"{_rows(self.repeated_prompts)} repeating a prompt, {self.repeated_rows} of them the whole row",
            )
        )
        lines += [_line("leaks", f"{_rows(n)} with a prompt of {name}") for name, n in self.leaks.items()]
        lines += [_line("bad row", problem) for problem in report.problems]
        if report.skipped > len(report.problems):
            lines.append(_line("", f"… and {report.skipped - len(report.problems)} more"))
        return "\n".join(lines)


@dataclass
class FolderReport:
    """The files of a folder with train, valid and test; ``str()`` is the text."""

    files: list[CheckReport]

    @property
    def ok(self) -> bool:
        """Whether every row of every file can be used."""
        return all(report.ok for report in self.files)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.files))


def check_file(
    path: str | Path,
    config: DataConfig | None = None,
    *,
    tokenizer: Any = None,
    against: str | Path | None = None,
) -> CheckReport | FolderReport:
    """Read all of a file, or of the train, valid and test files of a folder, and say what is in it.

    Args:
        config: names of columns, filters, prompt format; a TrainingConfig also says how long a prompt may be.
        tokenizer: lengths are counted in its tokens; None: in words.
        against: another file; rows that share a prompt with it are counted as leaks.
    Raises:
        DataLoadError: where a file as a whole cannot be read. Bad rows are in the report.
    """
    config = config or DataConfig()
    folder = path_of(path)
    if prefix_of(folder) is None and folder.is_dir():
        found = [split_file(folder, split) for split in SPLIT_FILES]
        reports = [_check(file, config, tokenizer) for file in found if file is not None]
        if not reports:
            raise DataLoadError(
                f"{path}: the folder has no train.jsonl, valid.jsonl or test.jsonl; name a file"
            )
        for later in range(1, len(reports)):
            for earlier in reports[:later]:
                _compare(reports[later], earlier)
        return FolderReport(reports)
    report = _check(folder, config, tokenizer)
    if against is not None:
        _compare(report, _check(path_of(against), config, None))
    return report


def _compare(report: CheckReport, other: CheckReport) -> None:
    report.leaks[other.report.name] = int(shared(report.keys, other.keys).sum())


def _check(path: Path, config: DataConfig, tokenizer: Any) -> CheckReport:
    prefix = prefix_of(path)
    if prefix is not None:
        return _check_tokens(TokenRows(TokenFiles(prefix)), config)
    length_of, unit = _lengths_in(tokenizer)
    scan = Scan(open_source(path), config, None, keep_bad=True)
    lengths: dict[str, array[int]] = {name: array("q") for name in TEXTS}
    columns: Counter[str] = Counter()
    keys, hashes = array("Q"), array("Q")
    for number, fields, rows in scan:
        try:
            counted = [(name, length_of(one, name)) for name, one in _texts(rows)]
        except DataLoadError as error:  # of the chat template
            scan.report.used -= len(rows)
            scan.bad(number, str(error))
            continue
        for name, length in counted:
            lengths[name].append(length)
        columns.update(map(str, fields))
        keys.append(prompt_key(rows[0]))
        hashes.append(text_key(repr(fields).encode("utf-8", "surrogatepass")))
    schema = scan.schema
    return CheckReport(
        scan.report,
        unit,
        {name: np.array(values) for name, values in lengths.items() if values},
        dict(columns),
        tuple(LOADERS[use] for use in schema.uses) if schema is not None else (),
        np.array(keys),
        repeated(np.array(hashes)),
        longest_prompt=_limit(config) if tokenizer is not None else None,
    )


def _check_tokens(rows: TokenRows, config: DataConfig) -> CheckReport:
    lengths = {"prompt": rows.prompt_lengths}
    if rows.files.completions is not None:
        lengths["completion"] = rows.files.completions.lengths
    for row in np.flatnonzero(rows.prompt_lengths == 0).tolist():
        rows.report.used -= 1
        rows.report.skipped += 1
        rows.report.bad_records.append(row)
        if len(rows.report.problems) < SENTENCES_KEPT:
            rows.report.problems.append(f"{rows.place(row)}: the prompt is empty")
    return CheckReport(
        rows.report,
        "tokens",
        lengths,
        uses=(LOADERS["prompts"], *((LOADERS["pairs"],) if "completion" in lengths else ())),
        keys=rows.keys,
        longest_prompt=_limit(config),
    )


def _limit(config: DataConfig) -> int | None:
    return config.max_prompt_length if isinstance(config, TrainingConfig) else None


def _texts(rows: Iterable[Row]) -> Iterator[tuple[str, Any]]:
    """What is counted of rows: (which field, a text or a chat)."""
    for row in rows:
        for name in TEXTS:
            value = row.get(name)
            if name in ("completions", "steps"):
                yield from ((name, one) for one in value or ())
            elif value:
                yield name, value


def _lengths_in(tokenizer: Any) -> tuple[Callable[[Any, str], int], str]:
    """How long a text of a row is, and in what."""
    if tokenizer is None:
        return _words, "words"
    from base_setup.tokenizer_setup import encode, encode_prompt  # and with it MLX

    def tokens(text: Any, name: str) -> int:
        return len(encode_prompt(tokenizer, text) if name == "prompt" else encode(tokenizer, text))

    return tokens, "tokens"


def _words(value: Any, name: str) -> int:
    texts = [value] if isinstance(value, str) else [message["content"] for message in value]
    return sum(len(text.split()) for text in texts)


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _line(name: str, text: str) -> str:
    return f"  {name:<11} {text}"


def _summary(lengths: np.ndarray, unit: str) -> str:
    median, most = np.percentile(lengths, [50, 95], method="lower").astype(int)
    spread = f"{lengths.min()} to {lengths.max()} {unit}"
    return f"{spread}, mean {lengths.mean():.1f}, half up to {median}, 95% up to {most}"
