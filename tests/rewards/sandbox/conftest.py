"""Every back end that holds on this machine; the others are skipped with the reason."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.sandbox.backends import Backend, Bubblewrap, Landlock, SandboxExec, Sandlock
from rewards.sandbox.choice import why_not
from rewards.sandbox.kernel import NOBODY

BACKENDS: dict[str, Backend] = {
    "landlock": Landlock(),
    "landlock-of-linux-5.13": Landlock(abi=1),  # without its signals, TCP and truncation: seccomp does it all
    "bubblewrap": Bubblewrap(),
    "sandlock": Sandlock(),
    "sandbox-exec": SandboxExec(),
}


def usable(name: str) -> Backend:
    if reason := why_not(BACKENDS[name]):
        pytest.skip(f"{name}: {reason}")
    return BACKENDS[name]


@pytest.fixture(params=[name for name in BACKENDS if "5.13" not in name])
def backend(request: pytest.FixtureRequest) -> Backend:
    return usable(request.param)


@pytest.fixture(params=BACKENDS)
def wall(request: pytest.FixtureRequest) -> Backend:
    """For what differs between the versions of Landlock: what is outside, and who can be signalled."""
    return usable(request.param)


class Outside:
    """Things outside that a program would like to reach, and whether it did."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.secret = folder, folder / "secret"
        folder.chmod(0o777)  # no ordinary permission is what stops a program here
        self.secret.write_text("canary")
        self.secret.chmod(0o666)
        if os.getuid() == 0:
            os.chown(self.secret, NOBODY, NOBODY)  # as where the trainer and the program are the same user
        self.sockets = {
            "tcp": socket.socket(socket.AF_INET, socket.SOCK_STREAM),
            "unix": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "abstract": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        }
        path, abstract = str(folder / "socket"), "\0mlx-ppo-" + folder.name
        self.sockets["tcp"].bind(("127.0.0.1", 0))
        self.sockets["udp"].bind(("127.0.0.1", 0))
        self.sockets["unix"].bind(path)
        self.sockets["abstract"].bind(abstract)
        os.chmod(path, 0o777)
        for name in ("tcp", "unix", "abstract"):
            self.sockets[name].listen(4)
        self.facts: dict[str, Any] = {
            "SECRET": str(self.secret),
            "FOLDER": str(folder),
            "TRAINER": os.getpid(),
            "TCP": self.sockets["tcp"].getsockname()[1],
            "UDP": self.sockets["udp"].getsockname()[1],
            "UNIX": path,
            "ABSTRACT": abstract,
        }
        for one in self.sockets.values():
            one.setblocking(False)

    def reached(self) -> list[str]:
        """The sockets at which something has arrived."""
        found = []
        for name, one in self.sockets.items():
            with contextlib.suppress(BlockingIOError):
                one.recv(1) if name == "udp" else one.accept()[0].close()
                found.append(name)
        return found

    def program(self, body: str) -> str:
        """The program, with the places of all that by name."""
        return "".join(f"{key} = {value!r}\n" for key, value in self.facts.items()) + body

    def untouched(self) -> bool:
        names = sorted(path.name for path in self.folder.iterdir())
        mode = self.secret.stat().st_mode & 0o777
        return names == ["secret", "socket"] and self.secret.read_text() == "canary" and mode == 0o666


@pytest.fixture
def outside() -> Iterator[Outside]:
    with tempfile.TemporaryDirectory(prefix="outside-") as name:
        there = Outside(Path(name))
        yield there
        for one in there.sockets.values():
            one.close()
