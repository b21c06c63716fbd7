"""What a program may use, and what is known of it afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from config.errors import InvalidConfigurationError

Status = Literal["ok", "error", "syntax_error", "timeout", "memory", "output", "disk", "crashed"]

MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """Ceilings for one program with everything that it starts."""

    seconds: float = 5.0  # by the clock; processor time per process has the same limit, rounded up
    memory_mb: int = 512  # address space of each process, and what all of them hold at one time
    processes: int = 32  # processes and threads at one time
    file_mb: int = 16  # the longest file that it can write
    disk_mb: int = 64  # everything in its folder
    output_kb: int = 256  # stdout, and as much stderr
    open_files: int = 64  # per process

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name != "seconds"
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or not math.isfinite(value)
                or value <= 0
            ):
                kind = "a whole number" if whole else "a number"
                raise InvalidConfigurationError(
                    f"The limit {field.name} is {value!r}; expected {kind} above 0 "
                    f"(the default is {field.default})."
                )
        if self.memory_mb < 64:
            raise InvalidConfigurationError(
                f"The limit memory_mb is {self.memory_mb}; Python itself needs 64: use at least that."
            )


@dataclass(frozen=True)
class Result:
    """How a program ended.

    ``status``: ``ok`` (exit code 0), ``error`` (an exception or another exit code), ``syntax_error``,
    ``timeout``, ``memory``, ``output`` (printed too much), ``disk`` (wrote too much), ``crashed`` (a signal).
    ``value`` is what the call returned, rebuilt here from plain data, if ``returned`` says that it did.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    value: Any = None
    seconds: float = 0.0  # from the program's first line to its end; the sandbox's own start is not in it
    exit_code: int | None = None  # None when a signal ended it
    returned: bool = False
