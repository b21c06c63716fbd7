"""Pre-tokenised rows: flat token ids with offsets in NPY files, mapped into memory, nothing parsed.

    PREFIX_prompts.npy               (tokens,) int32        all prompts, one after the other
    PREFIX_prompts_offsets.npy       (rows + 1,) int64      row i is prompts[offsets[i]:offsets[i + 1]]
    PREFIX_completions.npy, …        the same; absent where rows are prompts alone
    PREFIX_columns.npy, …            (bytes,) uint8         the other fields of a row as JSON; absent where none
    PREFIX_tokenizer.json            whose ids these are: the tokenizer's fingerprint

Files of MLX RL Trainer hold an object array instead, one list of ids per row. Such an array is a pickle, which
may run any code when it is opened: it is read by an unpickler that knows NumPy arrays and nothing else.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config.errors import DataLoadError
from data_loading.records import open_for_reading

PARTS = ("prompts", "completions", "columns")

#: All that an array of arrays is made of, under the names of NumPy 1 and 2.
HARMLESS = frozenset(
    [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
    + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
    + [("numpy", "ndarray"), ("numpy", "dtype")]
)
#: Readers of a file's header, by its version; later ones hold names of fields, which rows of ids have none of.
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, and only NumPy arrays are read")
        return super().find_class(module, name)


class Ragged:
    """Rows of different lengths in one flat array.

    Attributes:
        values: (N,) all rows, one after the other.
        offsets: (rows + 1,) int64, from 0 to N, never falling.
    """

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, rows: Sequence[Any], dtype: Any) -> Ragged:
        """Rows laid out flat."""
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        values = np.empty(int(offsets[-1]), dtype=dtype)
        for row, start, end in zip(rows, offsets, offsets[1:], strict=False):
            values[start:end] = row
        return cls(values, offsets)


def part_path(prefix: str | Path, part: str) -> Path:
    """The file of one part; its offsets are in ``part + "_offsets"``."""
    return Path(f"{prefix}_{part}.npy")


def prefix_of(path: str | Path) -> str | None:
    """The prefix that ``path`` is, or whose prompts file it is; None where there is no such file."""
    text = str(path).removesuffix("_prompts.npy")
    return text if part_path(text, "prompts").is_file() else None


class TokenFiles:
    """The parts of one prefix, as they stand on disk.

    Raises:
        DataLoadError: naming the file, for parts that are damaged or do not fit together.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.prompts = _token_part(prefix, "prompts")
        self.completions = _optional(_token_part, prefix, "completions")
        self._columns = _optional(_byte_part, prefix, "columns")
        for part, rows in (("completions", self.completions), ("columns", self._columns)):
            if rows is not None and len(rows) != len(self.prompts):
                raise DataLoadError(
                    f"{part_path(prefix, part)}: {len(self.prompts)} rows are expected, as in "
                    f"{part_path(prefix, 'prompts').name}, found {len(rows)}; write both anew with preprocess"
                )
        self.description = _description(prefix)

    def __len__(self) -> int:
        return len(self.prompts)

    def columns(self, row: int) -> Mapping[str, Any]:
        """The other fields of a row."""
        if self._columns is None:
            return {}
        try:
            fields = json.loads(self._columns[row].tobytes())
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise DataLoadError(f"{self.place(row)}: its columns are no JSON object; write the files anew")
        return fields

    def place(self, row: int) -> str:
        """The row's number, from 1 like the lines of a file."""
        return f"{part_path(self.prefix, 'prompts')}, row {row + 1}"


def _optional(read: Any, prefix: str, part: str) -> Ragged | None:
    result: Ragged | None = read(prefix, part) if part_path(prefix, part).exists() else None
    return result


def _byte_part(prefix: str, part: str) -> Ragged:
    return _ragged(prefix, part, np.dtype(np.uint8))


def _token_part(prefix: str, part: str) -> Ragged:
    return _ragged(prefix, part, np.dtype(np.int32))


def _ragged(prefix: str, part: str, dtype: np.dtype) -> Ragged:
    path, offsets_path = part_path(prefix, part), part_path(prefix, f"{part}_offsets")
    if not offsets_path.exists():  # a file of the older system
        return _older(path)
    values, offsets = _mapped(path, dtype), np.array(_mapped(offsets_path, np.dtype(np.int64)))
    if not (
        len(offsets) and offsets[0] == 0 and offsets[-1] == len(values) and (np.diff(offsets) >= 0).all()
    ):
        raise DataLoadError(
            f"{offsets_path}: offsets from 0 to {len(values)}, never falling, are expected; the files do not belong "
            "together: write them anew with preprocess"
        )
    return Ragged(values, offsets)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A flat array of one type, mapped into memory."""
    open_for_reading(path).close()
    try:
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, and raises whatever that raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataLoadError(
            f"{path}: not an NPY file that can be mapped ({reason:.200}); write it anew"
        ) from None
    if values.ndim != 1 or values.dtype != dtype:
        raise DataLoadError(
            f"{path}: a flat array of {dtype} is expected, found {values.dtype} of shape {values.shape}"
        )
    return values


def _older(path: Path) -> Ragged:
    """An object array of rows, or a plain array (rows, tokens) where all rows had one length."""
    with open_for_reading(path) as file:
        try:
            read_header = HEADERS[np.lib.format.read_magic(file)]
            shape, _, dtype = read_header(file)
            if dtype.hasobject:
                rows = _ArraysOnly(io.BytesIO(file.read())).load()
            else:
                file.seek(0)
                rows = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # a hostile pickle may make NumPy raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataLoadError(f"{path}: not rows of token ids ({reason:.200})") from None
    if not isinstance(rows, np.ndarray) or rows.shape != shape or rows.ndim not in (1, 2):
        raise DataLoadError(f"{path}: an array of rows of token ids is expected, found shape {shape}")
    return _flat(path, rows)


def _flat(path: Path, rows: np.ndarray) -> Ragged:
    checked = []
    for number, row in enumerate(rows):
        try:
            ids = np.asarray(row)
        except ValueError:  # lists in lists, of different lengths
            ids = np.empty((0, 0))
        if ids.size == 0 and ids.ndim == 1:
            ids = ids.astype(np.int64)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DataLoadError(
                f"{path}, row {number + 1}: a list of token ids is expected, found {row!r:.60}"
            )
        if ids.size and not (ids.min() >= 0 and ids.max() < 1 << 31):
            raise DataLoadError(f"{path}, row {number + 1}: token ids from 0 to 2^31 are expected")
        checked.append(ids)
    return Ragged.of(checked, np.int32)


def _description(prefix: str) -> Mapping[str, Any]:
    path = Path(f"{prefix}_tokenizer.json")
    if not path.exists():  # the older system writes none
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataLoadError(f"{path}: not JSON ({error}); write the files anew with preprocess") from None
    if not isinstance(described, dict) or not isinstance(described.get("fingerprint"), str):
        raise DataLoadError(f'{path}: the tokenizer\'s "fingerprint" is missing; write the files anew')
    return described
