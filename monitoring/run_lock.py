"""One run, one folder: a lock that the operating system takes back when its process is gone, however it went."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from config.errors import CheckpointError

LOCK = "run.lock"
logger = logging.getLogger(__name__)


class RunLock:
    """Holds ``run.lock`` of a folder from :meth:`acquire` to :meth:`release`, or to the end of the process.

    The file says who holds it (``pid``, ``host``). It stays when the run is over: the lock is the system's, not the
    file, so a file of a process that was killed stands in nobody's way.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take it.

        Raises:
            CheckpointError: another process, or another trainer of this one, has it; naming which.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise CheckpointError(
                f'output_dir: "{self.path.parent}" is in use by a run that is still going ({_holder(self.path)}); wait '
                "for it, stop it, or choose another folder"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "%s cannot be locked (%s): nothing keeps a second run out of this folder.",
                self.path,
                error.strerror,
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_running(folder: Path) -> bool:
    """Whether a live process holds the lock of this run folder."""
    if not (folder / LOCK).is_file():
        return False
    descriptor = os.open(folder / LOCK, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # no locks here: nobody knows
        return False
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known"
