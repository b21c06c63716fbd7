"""From outside: the folder of a program, the memory of its processes, and the end of all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from rewards.sandbox.kernel import NOBODY

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Scratch:
    """A folder that exists for one program, if it needs one; nothing in it can keep it from being removed."""

    def __init__(self, needed: bool) -> None:
        self.needed = needed
        self.folder: Path | None = None

    def __enter__(self) -> Path | None:
        if self.needed:
            self.folder = Path(tempfile.mkdtemp(prefix="program-")).resolve()
            if os.getuid() == 0:
                os.chown(self.folder, NOBODY, NOBODY)
        return self.folder

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.folder is not None:
            remove(self.folder)

    @staticmethod
    def within(folder: Path, ceiling: int) -> bool:
        """Whether the files below take no more than this, at 4 kB for a name."""
        total, todo = 0, [str(folder)]
        while todo:
            try:
                with os.scandir(todo.pop()) as entries:
                    for entry in entries:
                        total += 4096 + 512 * entry.stat(follow_symlinks=False).st_blocks
                        if total > ceiling:
                            return False
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(entry.path)
            except OSError:  # gone in the meantime, or closed to us, which its maker cannot fill either
                continue
        return True


def remove(folder: Path) -> None:
    """Remove a tree that a stranger made: locked folders, links and any depth of nesting.

    Folders are emptied by moving what is inside them up, so that no path ever gets long; links are not followed.
    """
    todo, count = [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            todo.append(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    while todo:
        inner = todo.pop()
        os.chmod(inner, 0o700)
        with os.scandir(inner) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)  # a folder can be moved only by who may write in it
                    count += 1
                    moved = f"{folder}/.removed-{count}"
                    os.rename(entry.path, moved)
                    todo.append(moved)
                else:
                    os.unlink(entry.path)
        os.rmdir(inner)
    shutil.rmtree(folder, ignore_errors=True)


def children_of(pid: int) -> list[int]:
    try:
        found: list[int] = []
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
        return found
    except (OSError, ValueError):
        return []


def memory_of_tree(pid: int) -> int:
    """Bytes that a process and its descendants hold and share with no file; 0 where that cannot be known."""
    if sys.platform != "linux":
        return _memory_by_ps(pid)
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        todo += children_of(one)
        try:
            with open(f"/proc/{one}/statm", encoding="ascii") as file:
                _, resident, shared, *_rest = map(int, file.read().split())
            total += (resident - shared) * _PAGE
        except (OSError, ValueError):
            continue
    return total


def _memory_by_ps(pid: int) -> int:
    """For macOS, which does not enforce RLIMIT_AS."""
    table: dict[int, list[tuple[int, int]]] = {}
    listing = subprocess.run(["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True, check=False)
    for line in listing.stdout.splitlines():
        own, parent, kilobytes = map(int, line.split())
        table.setdefault(parent, []).append((own, kilobytes * 1024))
    total, todo = 0, [pid]
    while todo:
        for own, size in table.get(todo.pop(), []):
            total += size
            todo.append(own)
    return total


def end_all(process: subprocess.Popen[bytes], thorough: bool) -> None:
    """Kill the sandbox; with ``thorough`` (it did not end by itself) everything of its session, too."""
    if thorough:
        for child in children_of(process.pid):  # the program's group, before the keeper that it is a child of
            _kill_group(child)
    _kill_group(process.pid)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.wait()
    if thorough and sys.platform == "linux":
        until = time.monotonic() + 2.0
        while (left := session_of(process.pid)) and time.monotonic() < until:
            for pid in left:
                _signal(pid)
            time.sleep(0.002)


def session_of(leader: int) -> list[int]:
    """Processes of the session that this one leads, zombies aside."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    state, _, _, session = file.read().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(session) == leader and state not in "ZX":
                found.append(int(entry))
    return found


def processes_with(word: str) -> list[int]:
    """Processes that have a word among the arguments which they were started with, zombies aside."""
    if sys.platform != "linux":
        listing = subprocess.run(["ps", "-axwwo", "pid=,args="], capture_output=True, text=True, check=False)
        lines = (line.split(None, 1) for line in listing.stdout.splitlines())
        return [int(pid) for pid, *words in lines if words and word in words[0]]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                if word.encode() in file.read():
                    found.append(int(entry))
    return found


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        if os.getpgid(pid) != os.getpgid(0):
            os.killpg(os.getpgid(pid), signal.SIGKILL)


def _signal(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
