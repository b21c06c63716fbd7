"""Writing what ``token_files`` reads, a row at a time, so that no file need fit into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from data_loading.json_text import to_json
from data_loading.token_files import PARTS, part_path


class FlatFile:
    """A flat array of a length that is known at the end; NumPy's header has room for it."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.length = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)  # padded for the shape to grow in place

    def append(self, values: Any) -> None:
        """Add values at the end."""
        data = np.asarray(values, dtype=self.dtype)
        self._file.write(data.tobytes())
        self.length += data.size

    def finish(self) -> None:
        """Put the length into the header."""
        self._file.seek(0)
        self._write_header()
        self._file.close()


class TokenWriter:
    """The files of one prefix, under temporary names until every row is there.

    A part that no row has is not written, and one of an earlier run with this prefix is removed: parts of two
    runs do not fit together.
    """

    def __init__(self, prefix: str | Path, description: Mapping[str, Any]) -> None:
        self.prefix, self.description = str(prefix), description
        self.rows = 0
        self.tokens = 0
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._parts: dict[str, tuple[FlatFile, FlatFile]] = {}
        for part, dtype in zip(PARTS, (np.int32, np.int32, np.uint8), strict=True):
            names = part_path(self.prefix, part), part_path(self.prefix, f"{part}_offsets")
            values, offsets = (path.with_name(path.name + ".writing") for path in names)
            self._parts[part] = FlatFile(values, dtype), FlatFile(offsets, np.int64)
            self._parts[part][1].append([0])
        self._used: set[str] = {"prompts"}

    def add(
        self, prompt: Sequence[int], completion: Sequence[int] | None, columns: Mapping[str, Any]
    ) -> None:
        """One row. ``completion``: None where rows have none."""
        data = np.frombuffer(to_json(columns, f"row {self.rows + 1}").encode(), dtype=np.uint8)
        for part, values, there in (
            ("prompts", prompt, True),
            ("completions", completion or (), completion is not None),
            ("columns", data, bool(columns)),
        ):
            flat, offsets = self._parts[part]
            flat.append(values)
            offsets.append([flat.length])
            if there:
                self._used.add(part)
        self.rows += 1
        self.tokens += len(prompt) + len(completion or ())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part, files in self._parts.items():
            for file in files:
                file.finish()
                target = file.path.with_name(file.path.name.removesuffix(".writing"))
                if kind is None and part in self._used:
                    os.replace(file.path, target)
                    continue
                file.path.unlink()
                if kind is None:
                    target.unlink(missing_ok=True)
        if kind is None:
            text = json.dumps({**self.description, "rows": self.rows, "tokens": self.tokens}, indent=2)
            Path(f"{self.prefix}_tokenizer.json").write_text(text + "\n", encoding="utf-8")
