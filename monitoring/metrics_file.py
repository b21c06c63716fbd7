"""``metrics.jsonl``: one line of JSON per training step, readable while the run goes on.

Each line is handed to the operating system before the next step begins, so a run that is killed has
lost nothing that it reported (a power cut may take the last seconds). NaN and infinity are written as
``null``, because they are not JSON. A line has a flat set of numbers and short strings in it; text from
the model goes to ``samples.jsonl``.

A full disk must not end a run that has cost a night: a line that cannot be written is dropped, the
first of them with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.errors import CheckpointError, DataLoadError

LONGEST_STRING = 200
logger = logging.getLogger(__name__)


class JsonLines:
    """An append-only file of JSON objects that never raises because of the disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._warned = False
        self._torn = _ends_without_newline(self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. It goes to the system at once, in one call: no buffer of ours can lose it."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        # A lone surrogate (half a character, from a byte-level tokenizer) becomes \udXXX, which is JSON.
        line = text.encode("utf-8", errors="backslashreplace") + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                if self._torn:  # half a line is there: leave it alone on its line
                    file.write(b"\n")
                self._torn = True
                if file.write(line) != len(line):
                    raise OSError("only a part of the line could be written")
                self._torn = False
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "%s cannot be written (%s); training goes on without those lines.", self.path, error
                )
            self._warned = True

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def cut_to(self, size: int) -> None:
        """Take away what was written after the file had ``size`` bytes: a run that goes on from there repeats it.

        Raises:
            CheckpointError: the file is shorter, or cannot be written.
        """
        there = self.size
        if there < size:
            raise CheckpointError(
                f"{self.path}: {there} bytes are there and {size} were when the checkpoint was made; put the file "
                "back, or go on in another output_dir"
            )
        try:
            if there > size:
                os.truncate(self.path, size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: could not be cut ({error.strerror or error})") from error
        self._torn = _ends_without_newline(self.path)


class MetricsFile(JsonLines):
    """The metrics of a run. A file that is there already is continued, as after a resume."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Append ``record``: numbers as they are (not finite: null), anything else as a short string."""
        self.append({str(key): plain(value) for key, value in record.items()})


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in their order.

    A line that was torn by a crash is left out: silently at the end of the file, where a run may still be
    writing it, and with a warning elsewhere.
    """
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise DataLoadError(f"The metrics file {path} cannot be read: {error.strerror or error}.") from error
    records = []
    last = max((number for number, line in enumerate(lines, start=1) if line.strip()), default=0)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number != last:
            logger.warning("%s:%d is not a JSON object and was left out.", path, number)
    return records


def plain(value: Any) -> float | int | bool | str | None:
    """A value as JSON has it; scalars of NumPy, MLX or torch become Python numbers.

    >>> plain(float("nan")), plain(True), plain("x" * 300)[-3:]
    (None, True, 'xx…')
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    text = str(value)
    return text if len(text) <= LONGEST_STRING else text[: LONGEST_STRING - 1] + "…"


def _ends_without_newline(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            if file.tell() == 0:
                return False
            file.seek(-1, 2)
            return file.read(1) != b"\n"
    except OSError:  # not there yet, or not readable: writing will say so
        return False
