"""Inside the sandbox: give up every right that the program must not have, start it, and say how it ended.

Three frames arrive on stdin: these modules (``runner.bundle``), the job, and for a test its text. The program is
forked off *before* the text of the test is read, with none of this process's descriptors, and cannot look into it
(no tracing, not dumpable). One report leaves on stdout. The parent believes it as far as it goes: a program that
could forge it would still have to know the expected values, which never come here.
"""

from __future__ import annotations

# ruff: noqa: SIM105  (contextlib, and what it imports, would cost every program a millisecond)
# ruff: noqa: SIM115  (stdin stays open)
import fcntl
import os
import resource
import select
import signal
import sys
import time

import rewards.sandbox.kernel as kernel
from rewards.sandbox.judge import Line, judge
from rewards.sandbox.program import SYNTAX_ERROR, execute, leave, write_all
from rewards.sandbox.values import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Job = dict[str, Any]

MEGABYTE = 1024 * 1024
VALUE_KB = 256  # the longest value that a call may return, encoded
_FIRST_KEPT = 10  # descriptors of folders that the program needs begin here
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def main(next_frame: Callable[[], bytes]) -> NoReturn:
    job: Job = decode(next_frame())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    sys.stdin = open(os.devnull)
    kept = _confine(job)
    started = time.monotonic()

    def done(**what: Any) -> NoReturn:
        data = encode({"stdout": b"", "stderr": b"", "value": None, "exit_code": None, **what})
        write_all(report, len(data).to_bytes(8, "big") + data)
        os._exit(0)

    if job["test"]:
        questions, answers = os.pipe(), os.pipe()
        child = _start(job, kept, null, null, null, {3: questions[0], 4: answers[1]})
        os.close(questions[0])
        os.close(answers[1])

        def too_late(*_: Any) -> None:
            _end(child)
            done(status="timeout", seconds=time.monotonic() - started)

        signal.signal(signal.SIGALRM, too_late)
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        text = next_frame().decode("utf-8", "surrogatepass")
        why_not = judge(text, Line(answers[0], questions[1], trusts_the_other=False))
        signal.setitimer(signal.ITIMER_REAL, 0)
        status = "error" if why_not else "ok"
        if why_not.startswith("Gone") and _soon(child) == SYNTAX_ERROR:
            status = "syntax_error"
        _end(child)
        done(
            status=status,
            stderr=why_not.encode("utf-8", "backslashreplace")[:4000],
            seconds=time.monotonic() - started,
        )
    outcome = _run(job, kept, started)
    done(seconds=time.monotonic() - started, **outcome)


# Giving up rights ------------------------------------------------------------------------------------


def _confine(job: Job) -> list[int]:
    """Confine this process and all to come; the descriptors of folders that have to stay open."""
    kept: list[int] = []
    sys.path += job["site"]
    if sys.platform == "linux":
        kernel.never_gain_rights()
        kernel.adopt_orphans()
        folders = {path: fd for path in job["read"] if (fd := _opened(path)) is not None}
        write = [fd for path in job["write"] if (fd := _opened(path)) is not None]
        devices = [fd for path in _DEVICES if (fd := _opened(path)) is not None]
        if os.getuid() == 0 and job["nobody"]:
            kernel.become_nobody()
            if not os.access(os.path.dirname(os.__file__), os.R_OK | os.X_OK):
                kept = _reach_through(folders)
        if job["hide"]:
            kernel.hide_from_debuggers(True)
        if job["landlock"]:
            kernel.only_these_files(folders.values(), write, devices, job["landlock"])
        for descriptor in [*folders.values(), *write, *devices]:
            if descriptor not in kept:
                os.close(descriptor)
        if job["seccomp"]:
            kernel.without_calls(outside=job["outside"], leaving=True)
    kernel.limit("CORE", 0)
    kernel.limit("FSIZE", job["file_mb"] * MEGABYTE)
    return kept


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None


def _reach_through(folders: dict[str, int]) -> list[int]:
    """An interpreter in a home that the ordinary user may not enter: reach it by descriptors opened before.

    Opening goes through /proc/self/fd, where the way to the folder has been walked already.
    """
    kept: dict[str, int] = {}
    for path, descriptor in folders.items():
        if any(entry == path or entry.startswith(path + "/") for entry in sys.path):
            number = _FIRST_KEPT + len(kept)
            os.dup2(descriptor, number)
            kept[path] = number

    def through(entry: str) -> str:
        for path, number in kept.items():
            if entry == path or entry.startswith(path + "/"):
                return f"/proc/self/fd/{number}{entry[len(path):]}"
        return entry

    sys.path[:] = map(through, sys.path)
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if getattr(module, "__path__", None):
            module.__path__ = [through(entry) for entry in module.__path__]
    return [*kept.values()]


# The program's process -------------------------------------------------------------------------------


def _start(job: Job, kept: list[int], stdin: int, stdout: int, stderr: int, more: dict[int, int]) -> int:
    """Fork the program off; ``more`` gives it further descriptors, by the numbers it will know them under."""
    child = os.fork()
    if child:
        try:
            os.setpgid(child, child)  # here and there, so that neither has to wait for the other
        except OSError:
            pass
        return child
    try:
        os.setpgid(0, 0)
    except OSError:
        pass
    wanted = {0: stdin, 1: stdout, 2: stderr, **more}
    safe = {target: _high(source) for target, source in wanted.items()}
    for target, source in safe.items():
        os.dup2(source, target)
    last = max(wanted)
    top = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(last + 1, _FIRST_KEPT)
    os.closerange(_FIRST_KEPT + len(kept), min(top, 1 << 20))
    _confine_program(job)
    leave(execute(job))


def _high(descriptor: int) -> int:
    """A copy above all the numbers that are about to be taken."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64)


def _confine_program(job: Job) -> None:
    seconds = int(job["seconds"]) + 1
    kernel.limit("AS", job["memory_mb"] * MEGABYTE)
    kernel.limit("CPU", seconds)
    kernel.limit("NOFILE", job["open_files"])
    kernel.limit("NPROC", job["processes"] + job["tasks"])
    if sys.platform == "linux":
        if job["hide"]:
            kernel.hide_from_debuggers(False)  # itself only: the keeper stays hidden
        if job["landlock"] >= 6:
            kernel.no_signals_to_others()
        if job["seccomp"]:
            own = os.getpid() if job["outside"] and job["landlock"] < 6 else None
            kernel.without_calls(outside=job["outside"], leaving=job["leaving"], signals_to=own)


# Watching it -----------------------------------------------------------------------------------------


def _run(job: Job, kept: list[int], started: float) -> dict[str, Any]:
    feed, out, err, value = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    child = _start(job, kept, feed[0], out[1], err[1], {3: value[1]})
    for descriptor in (feed[0], out[1], err[1], value[1]):
        os.close(descriptor)
    os.set_blocking(feed[1], False)
    ceilings = {out[0]: job["output_kb"] * 1024, err[0]: job["output_kb"] * 1024, value[0]: VALUE_KB * 1024}
    text = job["stdin"].encode("utf-8", "surrogatepass")
    received: dict[int, list[bytes]] = {descriptor: [] for descriptor in ceilings}
    left = dict(ceilings)
    poll = select.poll()
    for descriptor in ceilings:
        poll.register(descriptor, select.POLLIN)
    poll.register(feed[1], select.POLLOUT)
    deadline, code, verdict = started + job["seconds"], None, ""
    nap = 0.001
    while not verdict:
        now = time.monotonic()
        if code is None:
            code = _exit_status(child)
            if code is not None:
                _end(child)
                deadline = min(deadline, now + 0.2)  # for whoever still holds its output open
        elif not left:
            break
        if now > deadline:
            verdict = "timeout" if code is None else ""
            break
        # Its end is seen at the latest a nap after it; its output, and the end of that, at once.
        nap = min(2 * nap, 0.05)
        for descriptor, _ in poll.poll(1000 * min(nap, max(0.0, deadline - now))):
            if descriptor == feed[1]:
                text = _feed(poll, descriptor, text)
                continue
            part = os.read(descriptor, 65536)
            if not part:
                poll.unregister(descriptor)
                left.pop(descriptor)
                nap = 0.001
                continue
            received[descriptor].append(part[: left[descriptor]])
            left[descriptor] -= len(part)
            if left[descriptor] < 0:
                verdict = "output"
    if code is None:
        _end(child)
        code = 0
    ended = _verdict(code)
    what: dict[str, Any] = {"status": verdict or ended, "exit_code": None if verdict or code < 0 else code}
    what["stdout"], what["stderr"] = (b"".join(received[pipe[0]]) for pipe in (out, err))
    returned = b"".join(received[value[0]])
    what["value"] = returned if returned and not verdict and ended == "ok" else None
    return what


def _feed(poll: select.poll, descriptor: int, text: bytes) -> bytes:
    try:
        text = text[os.write(descriptor, text[:65536]) :] if text else b""
    except BlockingIOError:
        return text
    except OSError:  # it does not want to read any more
        text = b""
    if not text:
        poll.unregister(descriptor)
        os.close(descriptor)
    return text


def _verdict(code: int) -> str:
    if code < 0:
        return "timeout" if -code == signal.SIGXCPU else "crashed"
    return "syntax_error" if code == SYNTAX_ERROR else "error" if code else "ok"


def _exit_status(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _soon(child: int) -> int | None:
    """The exit status of a program that has hung up."""
    patience = time.monotonic() + 0.05
    while (code := _exit_status(child)) is None and time.monotonic() < patience:
        time.sleep(0.001)
    return code


def _end(child: int) -> None:
    """Kill all that the program has started, and wait until it is gone."""
    try:
        os.killpg(child, signal.SIGKILL)
    except OSError:
        pass
    if os.getpid() == 1:  # a PID namespace of our own: nobody hides in it
        try:
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass
    patience = (
        time.monotonic() + 1.0
    )  # a process that left the group, where that is possible, is not waited for
    try:
        while time.monotonic() < patience:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                for orphan in _children():  # nothing to be found where the program cannot leave its group
                    os.kill(orphan, signal.SIGKILL)
                time.sleep(0.0005)
    except (ChildProcessError, ProcessLookupError):
        pass


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []
