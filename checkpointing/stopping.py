"""The wish to stop: Ctrl-C, SIGTERM, or a file ``.save_on_exit_request`` in the run folder."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

REQUEST = ".save_on_exit_request"


class RunStopped(Exception):
    """A run has ended because somebody wished it, has saved and has said where: a command that trains raises it, and
    its caller has nothing to do but end, too.
    """


class StopRequest:
    """Within the block the first signal is a wish, to be granted at the next update boundary; a second ends at once.

    Only the main thread can take signals; elsewhere the file alone is looked at. A file from before is removed.

    Attributes:
        reason: ``sigint``, ``sigterm`` or ``request`` once somebody wishes it, for a checkpoint's name.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, folder: Path) -> None:
        self.file = folder / REQUEST
        self._signalled: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why the run is to stop; None: it is not."""
        if self._signalled is None and self.file.exists():
            return "request"
        return self._signalled

    def __enter__(self) -> StopRequest:
        self.file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        with contextlib.suppress(
            OSError
        ):  # a folder that has become read-only must not hide why the run ends
            self.file.unlink(missing_ok=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signalled is not None:
            _write_error(f"\n{name} again: ending at once; the last complete checkpoint stands\n")
            os._exit(1)
        self._signalled = name.lower()
        _write_error(f"\n{name}: the run saves and ends after this update; once more ends it at once\n")
        with contextlib.suppress(OSError):  # a full disk is no reason not to stop
            self.file.touch()  # seen by other processes of the run


def _write_error(text: str) -> None:
    """To standard error, from within a signal handler; Ctrl-C has ended the ``tee`` that was reading it, too."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def say(text: str) -> None:
    """Print a line; a reader that has gone (``| tee``, ended by the same Ctrl-C) must not keep a run from saving."""
    try:
        print(text, flush=True)
    except OSError:  # what is still in the buffer may go to nowhere: Python would complain of it at its end
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
