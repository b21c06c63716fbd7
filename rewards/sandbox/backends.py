"""The ways to shut a program in, strongest first.

| name | made of | where |
|---|---|---|
| ``bubblewrap`` | namespaces: another file system, process table and network; seccomp | Linux with ``bwrap`` |
| ``sandlock`` | Landlock, seccomp and a supervisor of system calls, from the package ``sandlock`` | Linux 6.12 |
| ``landlock`` | Landlock and seccomp, by ``kernel.py`` alone | Linux 5.13, x86-64 or arm64 |
| ``sandbox-exec`` | the sandbox of macOS | macOS |
| ``command`` | whatever the user names: docker, podman, … | anywhere |
| ``unsafe`` | resource limits: no wall at all | by ``allow_unsafe_code=True`` only |

None is used before ``probe`` has seen an attack on it fail.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.sandbox import kernel
from rewards.sandbox.limits import Limits

_WORK = "/program"  # the program's folder, where it has a file system of its own


def python_folders() -> list[str]:
    """What the interpreter and its packages need to be read: nothing above them, and no home as a whole."""
    found = [path for key, path in sysconfig.get_paths().items() if key in ("stdlib", "platstdlib")]
    found += [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    base = os.path.realpath(sys.base_prefix)
    too_much = {"/", "/usr/local", os.path.realpath(Path.home()), os.path.realpath(Path.home().parent)}
    if base not in too_much:
        found.append(base)
    found.append(os.path.dirname(os.path.realpath(sys.executable)))
    real = dict.fromkeys(os.path.realpath(path) for path in found if os.path.isdir(path))
    return [path for path in real if not any(path.startswith(other + "/") for other in real)]


def site_folders() -> list[str]:
    """Where installed packages are, in the order of sys.path."""
    return [
        os.path.realpath(path)
        for path in sys.path
        if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)
    ]


def system_folders() -> list[str]:
    """Libraries and programs of the system, and the few settings that they read."""
    wanted = [
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/sbin",
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/etc/alternatives",
    ]
    return [path for path in wanted if os.path.exists(path)]


class Backend:
    """One way to shut a program in. Its instances hold no state but what they were made with."""

    name = ""
    needs_folder = True
    foreign_python = False
    python: Sequence[str] = (os.path.realpath(sys.executable),)

    def missing(self) -> str:
        """Why it cannot be tried here, or nothing."""
        return ""

    def words(self, folder: Path | None, limits: Limits) -> list[str]:
        """The command that runs a command inside."""
        return []

    def job(self, folder: Path | None) -> dict[str, Any]:
        """What the keeper has to know beside the program."""
        return {
            "read": python_folders(),
            "write": [],
            "site": site_folders(),
            "landlock": 0,
            "seccomp": kernel.seccomp_is_known(),
            "nobody": True,
            "hide": True,
            "outside": False,  # whether calls that reach outside have to be refused one by one
            "leaving": True,  # whether a process may leave its group: nothing else may hold them together then
            "tasks": _tasks_already(),
        }

    def environment(self, folder: Path | None) -> dict[str, str]:
        """Nothing of the trainer's; one thread per program for numerical libraries."""
        home = str(folder or _WORK)
        one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **one}

    def __repr__(self) -> str:
        return f"<sandbox {self.name}>"


class Bubblewrap(Backend):
    """Namespaces made by bubblewrap: what is not mounted, not started or not connected inside does not exist.

    As root the keeper drops to an ordinary user inside, after the mounts: the user who may see the interpreter need
    not be the one who runs the program.
    """

    name = "bubblewrap"
    needs_folder = False

    def missing(self) -> str:
        if sys.platform != "linux":
            return "it is for Linux"
        return "" if shutil.which("bwrap") else "there is no bwrap on the PATH"

    def words(self, folder: Path | None, limits: Limits) -> list[str]:
        words = [shutil.which("bwrap") or "bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
        words += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--as-pid-1"]
        if os.getuid() == 0:
            words += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            words += ["--unshare-user"]
        size = str(limits.disk_mb << 20)
        for folder_inside in ("/tmp", _WORK):
            words += ["--perms", "1777", "--size", size, "--tmpfs", folder_inside]
        for path in [*system_folders(), *python_folders()]:
            if os.path.islink(path):
                words += ["--symlink", os.readlink(path), path]
            else:
                words += ["--ro-bind", path, path]
        words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        return [*words, "--remount-ro", "/", "--chdir", _WORK, "--"]

    def job(self, folder: Path | None) -> dict[str, Any]:
        own_count = os.getuid() != 0  # a user namespace counts its processes from 0
        return {**super().job(folder), **({"tasks": 0} if own_count else {})}


class Landlock(Backend):
    """Landlock and seccomp by our own hand: nothing to install, no namespace needed, so it works in containers."""

    name = "landlock"

    def __init__(self, abi: int | None = None) -> None:
        self.abi = abi  # a lower version than the kernel's, for tests

    def missing(self) -> str:
        if sys.platform != "linux":
            return "it is for Linux"
        if not kernel.seccomp_is_known():
            return "it knows the system calls of x86-64 and arm64 only"
        return "" if kernel.landlock_abi() else "the kernel has no Landlock (Linux 5.13 has)"

    def job(self, folder: Path | None) -> dict[str, Any]:
        return {
            **super().job(folder),
            "read": [*system_folders(), *python_folders()],
            "write": [str(folder)],
            "landlock": self.abi or kernel.landlock_abi(),
            "outside": True,
            "leaving": False,
        }


_SANDLOCK = """\
import os, sys
sys.path[:0] = [sys.argv[1]]
from sandlock import Sandbox
read, write, memory, processes, command = eval(sys.argv[2])
box = Sandbox(fs_readable=read, fs_writable=[write, '/dev/null'], max_memory=memory, max_processes=processes, cwd=write)
sys.exit(box.run_interactive(command + sys.argv[3:]))
"""


class Sandlock(Backend):
    """The package sandlock. It has its own launcher, whose import costs each program some fifty milliseconds."""

    name = "sandlock"

    def missing(self) -> str:
        if sys.platform != "linux":
            return "it is for Linux"
        if os.getuid() == 0 and not _reachable_by_nobody():
            return "as root it needs a Python that every user may execute"
        return "" if importlib.util.find_spec("sandlock") else "the package sandlock is not installed"

    def words(self, folder: Path | None, limits: Limits) -> list[str]:
        found = importlib.util.find_spec("sandlock")
        origin = Path(found.origin).parents[1] if found and found.origin else Path()
        read = [*system_folders(), *python_folders(), "/dev"]
        told: tuple[Any, ...] = (read, str(folder), f"{limits.memory_mb + 64}M", limits.processes + 4, [])
        return [sys.executable, "-c", _SANDLOCK, str(origin), repr(told)]

    def job(self, folder: Path | None) -> dict[str, Any]:
        # It refuses PR_SET_DUMPABLE; without /proc and with tracing refused, nobody can look into the keeper either.
        return {**super().job(folder), "hide": False, "outside": True, "leaving": False}


class SandboxExec(Backend):
    """The sandbox of macOS, by ``sandbox-exec``. Programs start no processes there: nothing could end them all."""

    name = "sandbox-exec"

    def missing(self) -> str:
        if not _on("darwin"):
            return "it is for macOS"
        return "" if shutil.which("sandbox-exec") else "there is no sandbox-exec on the PATH"

    def words(self, folder: Path | None, limits: Limits) -> list[str]:
        return ["sandbox-exec", "-p", seatbelt_profile(folder or Path(_WORK), python_folders())]

    def job(self, folder: Path | None) -> dict[str, Any]:
        return {**super().job(folder), "seccomp": False, "processes": 0, "tasks": 0}


def seatbelt_profile(folder: Path, python: Sequence[str]) -> str:
    """What macOS allows the program, in the language of its sandbox: all that is not here is denied."""

    def quoted(path: object) -> str:
        return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'

    readable = [*python, "/usr/lib", "/usr/share", "/System/Library", "/System/Volumes/Preboot/Cryptexes/OS"]
    readable += ["/Library/Frameworks", "/Library/Apple/System", "/private/var/db/timezone", str(folder)]
    return "\n".join(
        [
            "(version 1)",
            "(deny default)",
            "(deny network*)",
            "(allow process-fork)",  # the keeper's; the program's own processes are limited to none
            *(f"(allow process-exec (subpath {quoted(path)}))" for path in python),
            *(f"(allow file-read* (subpath {quoted(path)}))" for path in readable),
            '(allow file-read* (literal "/") (literal "/dev/null") (literal "/dev/zero"))',
            '(allow file-read* (literal "/dev/random") (literal "/dev/urandom"))',
            "(allow file-read-metadata)",  # names, sizes and dates: the loader walks paths with it
            f"(allow file-write* (subpath {quoted(folder)}))",
            '(allow file-write-data (literal "/dev/null"))',
            "(allow signal (target self) (target children))",
            "(allow sysctl-read)",
        ]
    )


@dataclass(frozen=True, repr=False)
class Command(Backend):
    """A command of the user's, to which the words ``python3 -I -S …`` are added. ``{dir}`` is an empty folder.

    It has to pass on stdin and stdout, as ``docker run --rm -i --network=none IMAGE`` does.
    """

    given: tuple[str, ...]
    name = "command"
    foreign_python = True
    python = ("python3",)

    def missing(self) -> str:
        return (
            "" if self.given and shutil.which(self.given[0]) else f"there is no {self.given[:1]} on the PATH"
        )

    def words(self, folder: Path | None, limits: Limits) -> list[str]:
        return [word.replace("{dir}", str(folder)) for word in self.given]

    def job(self, folder: Path | None) -> dict[str, Any]:
        return {
            **super().job(folder),
            "read": [],
            "site": [],
            "tasks": 4096,
        }  # the processes are its own business

    def environment(self, folder: Path | None) -> dict[str, str]:
        return dict(os.environ)  # a client of docker or podman finds its service by them


class Unsafe(Backend):
    """Resource limits and an empty environment. The program may read, send and remove whatever you may."""

    name = "unsafe"

    def job(self, folder: Path | None) -> dict[str, Any]:
        return {**super().job(folder), "seccomp": False}


def _on(platform: str) -> bool:
    return sys.platform == platform


def _tasks_already() -> int:
    if sys.platform != "linux":
        return 0
    return kernel.tasks_of(kernel.NOBODY if os.getuid() == 0 else os.getuid())


@functools.cache
def _reachable_by_nobody() -> bool:
    path = Path(os.path.realpath(sys.executable))
    return all(part.stat().st_mode & 0o001 for part in [path, *path.parents])
