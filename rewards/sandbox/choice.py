"""Which back end this machine has: the first that is seen to hold, or none and a sentence."""

from __future__ import annotations

import shlex
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from config.errors import InvalidConfigurationError
from rewards.sandbox.backends import Backend, Bubblewrap, Command, Landlock, SandboxExec, Sandlock, Unsafe
from rewards.sandbox.probe import weakness

_ORDER: tuple[type[Backend], ...] = (Bubblewrap, Sandlock, Landlock, SandboxExec)
_lock = threading.Lock()
_verdicts: dict[Any, str] = {}
_warned = threading.Event()


def why_not(backend: Backend) -> str:
    """Empty if the attacks of ``probe`` fail against a back end on this machine; found out once per process."""
    key = backend if isinstance(backend, Command) else (backend.name, getattr(backend, "abi", None))
    with _lock:
        if key not in _verdicts:
            _verdicts[key] = backend.missing() or weakness(backend)
        return _verdicts[key]


def proven_backend(command: str | Sequence[str] | None = None, allow_unsafe_code: bool = False) -> Backend:
    """The user's own command if there is one, else the first back end that holds on this machine.

    Raises:
        InvalidConfigurationError: none does, and ``allow_unsafe_code`` is not set.
    """
    if command:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        own = Command(tuple(words))
        if trouble := why_not(own):
            raise InvalidConfigurationError(
                f"The sandbox command {shlex.join(words)!r} cannot be used: {trouble}. It has to run "
                f"`python3` inside, pass on stdin and stdout, and keep files and network away (docs/sandbox.md)."
            )
        return own
    reasons = []
    for kind in _ORDER:
        backend = kind()
        trouble = why_not(backend)
        if not trouble:
            return backend
        reasons.append(f"{backend.name}: {trouble}")
    if allow_unsafe_code:
        if not _warned.is_set():
            _warned.set()
            warnings.warn(
                "allow_unsafe_code=True: programs written by the model run WITHOUT A SANDBOX, with your rights over "
                "your files and your network; resource limits are all there is.",
                RuntimeWarning,
                stacklevel=2,
            )
        return Unsafe()
    advice = (
        "install bubblewrap (apt install bubblewrap, dnf install bubblewrap) or pip install sandlock"
        if sys.platform == "linux"
        else "use macOS's own sandbox-exec, or name a command such as docker"
    )
    raise InvalidConfigurationError(
        f"Programs written by a model are not run without a sandbox, and none holds here ({'; '.join(reasons)}).\n"
        f"{advice[0].upper()}{advice[1:]}; or name a sandbox_command (docs/sandbox.md), or, where nothing can be "
        f"lost, allow_unsafe_code=true."
    )
