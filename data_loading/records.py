"""What every reader gives: numbered records, each with a place that a person can find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from config.errors import DataLoadError

#: Longest line or cell that is read as one row; longer is a file that has lost its line ends.
LONGEST_LINE = 1 << 26  # bytes


class BadRowError(Exception):
    """One row cannot be used; the message says why, whoever catches it knows where.

    It may quote the row, so line ends and control characters in it are written as escapes.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in reason))


class Record(NamedTuple):
    """One row as it stands in its source: its fields, or what is wrong with it."""

    number: int  # from 0, what ``read`` takes
    fields: Mapping[str, Any] | None
    problem: str | None = None


class Source(Protocol):
    """Rows that are gone through once (``scan``) and then asked for one by one (``read``), from any thread."""

    name: str

    def scan(self) -> Iterator[Record]:
        """Every record in order. Raises DataLoadError where the file as a whole cannot be read."""
        ...

    def read(self, number: int) -> Mapping[str, Any]:
        """The fields of a record that ``scan`` has seen, read again."""
        ...

    def place(self, number: int) -> str:
        """``file:line`` or the like."""
        ...


def path_of(name: str | Path) -> Path:
    """A path with its ~ resolved, if the file system takes it at all."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a nul byte, nobody's home
        reason = getattr(error, "strerror", None) or error
        raise DataLoadError(f"{str(name)!r:.120}: cannot be read ({reason}); check the path") from None
    return path


def open_for_reading(path: Path) -> Any:
    """The file, opened in binary, or a sentence about why it cannot be."""
    try:
        if path.is_dir():
            raise DataLoadError(f"{path}: a file is expected, found a folder; name the file in it")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a nul byte in the name
        reason = getattr(error, "strerror", None) or error
        raise DataLoadError(f"{path}: cannot be read ({reason}); check the path") from None


def check_start(path: Path, start: bytes) -> None:
    """Refuse what is no UTF-8 text by its first bytes."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataLoadError(f"{path}: UTF-8 text is expected, found UTF-16; save the file as UTF-8")
    if start.startswith(b"\x1f\x8b"):
        raise DataLoadError(f"{path}: text is expected, found a gzip archive; unpack it (gunzip)")
    if start.startswith(b"PAR1"):
        raise DataLoadError(f"{path}: text is expected, found Parquet; let its name end in .parquet")


def decode_line(line: bytes) -> str:
    """A line as text. Raises BadRowError naming the first byte that is not UTF-8."""
    if b"\0" in line:
        raise BadRowError(
            f"a nul byte at column {line.index(0) + 1}: the file is damaged or not UTF-8; save it as UTF-8"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"not UTF-8 at column {error.start + 1} (byte 0x{line[error.start]:02x}); save the file as UTF-8"
        ) from None


def too_long(found: str = "") -> str:
    """The sentence about a line over ``LONGEST_LINE``."""
    return f"a row of more than {LONGEST_LINE >> 20} MiB{found}: one row per line is expected; is a line end missing?"
