"""One sandbox from its start to its end: the job goes in, the report comes out, and nothing is left."""

from __future__ import annotations

import functools
import marshal
import os
import selectors
import subprocess
import time
from pathlib import Path
from typing import Any

from rewards.sandbox import keeper, values
from rewards.sandbox.backends import Backend
from rewards.sandbox.limits import MEGABYTE, Limits, Result
from rewards.sandbox.supervision import Scratch, end_all, memory_of_tree

#: For the sandbox to start and the report to come back, on a busy machine.
PATIENCE = 10.0
_WATCHED_EVERY = 0.03
_INSIDE = ("values", "kernel", "judge", "program", "keeper")
_START = """\
import os, sys
def exactly(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part: sys.exit(90)
        data += part
    return data
def frame(): return exactly(int.from_bytes(exactly(8), "big"))
def start(modules):
    for name, code in modules:
        module = sys.modules[name] = type(sys)(name)
        if name.endswith(("rewards", "sandbox")): module.__path__ = []
        if code is not None: exec(compile(code, name, "exec") if isinstance(code, str) else code, module.__dict__)
        outer, _, inner = name.rpartition(".")
        if outer: setattr(sys.modules[outer], inner, module)
kind, modules = exactly(1), frame()
if kind == b"m":
    import marshal
    start(marshal.loads(modules))
else:
    start(eval(modules))
sys.modules["rewards.sandbox.keeper"].main(frame)
"""


def run_job(
    job: dict[str, Any], test: str | None, limits: Limits, backend: Backend, mark: str = ""
) -> Result:
    """What ``keeper`` reads as its job; ``mark`` is a word by which the processes can be found from outside."""
    with Scratch(backend.needs_folder) as folder:
        return _run_in(folder, job, test, limits, backend, mark)


def _run_in(
    folder: Path | None, job: dict[str, Any], test: str | None, limits: Limits, backend: Backend, mark: str
) -> Result:
    complete = {**job, **vars(limits), **backend.job(folder), "test": test is not None}
    feed = (b"s" if backend.foreign_python else b"m") + _frame(bundle(backend.foreign_python))
    feed += _frame(values.encode(complete))
    if test is not None:
        feed += _frame(test.encode("utf-8", "surrogatepass"))
    words = [*backend.words(folder, limits), *backend.python, "-I", "-S", "-B", "-c", _START, mark]
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=backend.environment(folder),
        cwd=folder or "/",
        start_new_session=True,
        bufsize=0,
    )
    started = time.monotonic()
    status = "crashed"
    try:
        report, complaint, status = _converse(process, feed, limits, folder, started)
    finally:
        end_all(process, thorough=status != "reported")
    if status != "reported":
        return Result(status, stderr=_readable(complaint), seconds=time.monotonic() - started)  # type: ignore[arg-type]
    return _result(report, _readable(complaint))


def _converse(
    process: subprocess.Popen[bytes], feed: bytes, limits: Limits, folder: Path | None, started: float
) -> tuple[bytes, bytes, str]:
    """Feed the sandbox, collect its report, and keep an eye on its memory and disk."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    streams = (process.stdin, process.stdout, process.stderr)
    for stream in streams:
        os.set_blocking(stream.fileno(), False)
    deadline = started + limits.seconds + PATIENCE
    report, complaint = bytearray(), bytearray()
    longest = 2 * limits.output_kb * 1024 + keeper.VALUE_KB * 1024 + 65536
    rest = memoryview(feed)
    next_look = started + _WATCHED_EVERY
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while process.stdout in selector.get_map():
            now = time.monotonic()
            if now > deadline:
                return bytes(report), bytes(complaint), "timeout"
            if now > next_look:
                if memory_of_tree(process.pid) > (limits.memory_mb + 64) * MEGABYTE:
                    return b"", b"It held more memory than its limit, all processes together.", "memory"
                if folder is not None and not Scratch.within(folder, limits.disk_mb * MEGABYTE):
                    return b"", b"Its folder outgrew its limit.", "disk"
                next_look = time.monotonic() + _WATCHED_EVERY
            for key, _ in selector.select(max(0.0, min(next_look, deadline) - now)):
                source: Any = key.fileobj
                if source is process.stdin:
                    try:
                        rest = rest[os.write(source.fileno(), rest[:65536]) :]
                    except BlockingIOError:
                        continue
                    except OSError:
                        rest = rest[:0]
                    if not rest:
                        selector.unregister(source)
                    continue
                part = os.read(source.fileno(), 65536)
                target = report if source is process.stdout else complaint
                if not part:
                    selector.unregister(source)
                elif len(target) < longest:
                    target += part
            if len(report) >= 8 and len(report) >= 8 + int.from_bytes(report[:8], "big"):
                return bytes(report[8:]), bytes(complaint), "reported"
    return bytes(report), bytes(complaint), "crashed"


def _result(report: bytes, complaint: str) -> Result:
    """From the report, in which nothing is believed to have the right type."""
    try:
        found = values.decode(report)
        stdout, stderr = _readable(found["stdout"]), _readable(found["stderr"])
        returned = found["value"] is not None
        value = values.decode(found["value"]) if returned else None
        status, seconds, code = found["status"], float(found["seconds"]), found["exit_code"]
    except (values.BadValue, LookupError, TypeError, ValueError) as error:
        return Result(
            "crashed", stderr=f"The sandbox gave no report that could be read: {error}. {complaint}"
        )
    if status == "error" and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        status = "memory"
    return Result(status, stdout, stderr, value, seconds, code, returned)


def _readable(data: bytes) -> str:
    return bytes(data).decode("utf-8", "replace")


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


@functools.cache
def bundle(as_text: bool) -> bytes:
    """The modules of the inside, in the order of their imports: compiled, or as text for another Python."""
    modules: list[tuple[str, Any]] = [("rewards", None), ("rewards.sandbox", None)]
    for name in _INSIDE:
        text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        full = f"rewards.sandbox.{name}"
        modules.append(
            (full, text if as_text else compile(text, full, "exec", dont_inherit=True, optimize=2))
        )
    return repr(modules).encode() if as_text else marshal.dumps(modules)
