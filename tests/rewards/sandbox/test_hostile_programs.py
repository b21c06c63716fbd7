"""Programs that try to get out, to use too much, or to stay: none escapes, and none is left."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import tempfile
import threading
from typing import Any

import pytest

from rewards.sandbox.backends import Backend, Unsafe
from rewards.sandbox.kernel import NOBODY
from rewards.sandbox.limits import Limits, Result
from rewards.sandbox.probe import remains
from rewards.sandbox.runner import run_program
from rewards.sandbox.session import run_job

CTYPES = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"

#: What a program does to get at something outside; it succeeds by printing ESCAPED (or by what `Outside` sees).
ESCAPES = {
    "read": "if open(SECRET).read(): print('ESCAPED')",
    "read by ctypes": CTYPES + "if libc.open(SECRET.encode(), 0) >= 0: print('ESCAPED')",
    "read by a symbolic link": "import os; os.symlink(SECRET, 'a'); print('ESCAPED', open('a').read())",
    "read by a hard link": "import os; os.link(SECRET, 'b'); print('ESCAPED', open('b').read())",
    "read by a link unpacked from an archive": (
        "import io, tarfile\n"
        "data = io.BytesIO()\n"
        "with tarfile.open(fileobj=data, mode='w') as tar:\n"
        "    link = tarfile.TarInfo('c'); link.type = tarfile.SYMTYPE; link.linkname = SECRET\n"
        "    tar.addfile(link)\n"
        "data.seek(0)\n"
        "tarfile.open(fileobj=data).extractall()\n"
        "print('ESCAPED', open('c').read())"
    ),
    "read by climbing": "import os; print('ESCAPED', open('../' * 40 + SECRET[1:]).read())",
    "read in a shell": "import subprocess; subprocess.run(['cat', SECRET], check=True); print('ESCAPED')",
    "read by descriptors left open": (
        "import os\n"
        "for fd in range(3, 64):\n"
        "    for path in ('', '..', '../..', '../../..', '../../../..', '../../../../..'):\n"
        "        try: inside = os.open(path + '/' + SECRET.lstrip('/') if path else SECRET, os.O_RDONLY, dir_fd=fd)\n"
        "        except OSError: continue\n"
        "        print('ESCAPED', fd)"
    ),
    "list": "import os; print('ESCAPED', os.listdir(FOLDER))",
    "write": "open(FOLDER + '/written', 'w').write('x'); print('ESCAPED')",
    "append": "open(SECRET, 'a').write('x'); print('ESCAPED')",
    "truncate": "import os; os.truncate(SECRET, 0); print('ESCAPED')",
    "remove": "import os; os.unlink(SECRET); print('ESCAPED')",
    "rename": "import os; os.rename(SECRET, FOLDER + '/other'); print('ESCAPED')",
    "make a folder": "import os; os.mkdir(FOLDER + '/made'); print('ESCAPED')",
    "change the mode": "import os; os.chmod(SECRET, 0o777); print('ESCAPED')",
    "change the time": "import os; os.utime(SECRET, (0, 0)); print('ESCAPED')",
    "write to the shared memory of the machine": (
        "import os; open(f'/dev/shm/escaped', 'w').write('x'); print('inside', os.path.exists('/dev/shm/escaped'))"
    ),
    "connect by TCP": (
        "import socket; socket.create_connection(('127.0.0.1', TCP), 1).send(b'x'); print('ESCAPED')"
    ),
    "connect by TCP in ctypes": (
        CTYPES + "import struct\n"
        "s = libc.socket(2, 1, 0)\n"
        "a = struct.pack('=HHI8x', 2, ((TCP & 255) << 8) | TCP >> 8, 0x0100007f)\n"
        "if s >= 0 and libc.connect(s, a, 16) == 0: print('ESCAPED')"
    ),
    "send by UDP": (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', UDP))"
    ),
    "connect to a Unix socket": (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect(UNIX); print('ESCAPED')"
    ),
    "connect to an abstract socket": (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect(ABSTRACT); print('ESCAPED')"
    ),
    "read the trainer's environment": "print('ESCAPED', open(f'/proc/{TRAINER}/environ').read())",
    "read the trainer's memory": "print('ESCAPED', open(f'/proc/{TRAINER}/mem', 'rb').read(1))",
    "read the trainer's files": "import os; print('ESCAPED', os.listdir(f'/proc/{TRAINER}/fd'))",
    "trace the trainer": CTYPES + "if libc.ptrace(16, TRAINER, 0, 0) == 0: print('ESCAPED')",
    "copy from the trainer's memory": (
        CTYPES + "b = ctypes.create_string_buffer(16)\n"
        "class V(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]\n"
        "v = V(ctypes.addressof(b), 16); w = V(ctypes.addressof(b), 16)\n"
        "if libc.process_vm_readv(TRAINER, ctypes.byref(v), 1, ctypes.byref(w), 1, 0) > 0: print('ESCAPED')"
    ),
    "signal the trainer": "import os, signal; os.kill(TRAINER, signal.SIGUSR1); print('ESCAPED')",
    "signal by sigqueue": (
        CTYPES + "if libc.sigqueue(TRAINER, 10, ctypes.c_void_p(0)) == 0: print('ESCAPED')"
    ),
    "signal everybody": "import os, signal; os.kill(-1, signal.SIGUSR1)",
    "limit the trainer": (
        "import resource; resource.prlimit(TRAINER, resource.RLIMIT_CPU, (60, 60)); print('ESCAPED')"
    ),
    "slow the trainer down": "import os; os.setpriority(os.PRIO_PROCESS, TRAINER, 19); print('ESCAPED')",
    "become root": (
        "import os, subprocess\n"
        "try: os.setuid(0)\n"
        "except OSError: pass\n"
        "if os.getuid() == 0: print('ESCAPED')\n"
        "caps = [l for l in open('/proc/self/status') if l.startswith(('CapEff', 'CapPrm'))]\n"
        "if any(int(l.split()[1], 16) for l in caps): print('ESCAPED', caps)"
    ),
    "make a user namespace": CTYPES + "if libc.unshare(0x10000000) == 0: print('ESCAPED')",
    "mount": CTYPES + "if libc.mount(b'none', b'.', b'tmpfs', 0, None) == 0: print('ESCAPED')",
    "watch io_uring, BPF, keys": (
        CTYPES + "import os\n"
        "numbers = (425, 321, 248) if os.uname().machine == 'x86_64' else (425, 280, 217)\n"
        "b = ctypes.create_string_buffer(256)\n"
        "for n in numbers:\n"
        "    r = libc.syscall(n, 1, b, 0, 0, 0)\n"
        "    if r >= 0 or ctypes.get_errno() != 1: print('ESCAPED', n, r, ctypes.get_errno())"
    ),
    "find a variable of the trainer": (
        "import os\nif 'MLX_PPO_TEST_SECRET' in os.environ or len(os.environ) > 12: print('ESCAPED', os.environ)"
    ),
    "import the trainer's code": (
        "import sys; sys.path.insert(0, ROOT); import config.errors; print('ESCAPED', config.errors.__file__)"
    ),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_program_reaches_anything_outside(
    name: str, wall: Backend, outside: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLX_PPO_TEST_SECRET", "canary")
    signalled = []
    before = signal.signal(signal.SIGUSR1, lambda *_: signalled.append(1))
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    try:
        code = outside.program(f"ROOT = {root!r}\nprint('began', flush=True)\n{ESCAPES[name]}")
        result = run_program(code, limits=Limits(seconds=3), backend=wall)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "began" in result.stdout or name == "signal everybody", result
    assert "ESCAPED" not in result.stdout, result.stdout
    assert "canary" not in result.stdout + result.stderr
    assert not signalled
    assert outside.reached() == []
    assert outside.untouched()
    assert not os.path.exists("/dev/shm/escaped")


@pytest.mark.parametrize(
    "name",
    ["read", "read by ctypes", "list", "append", "rename", "connect by TCP", "connect to a Unix socket"],
)
def test_the_attacks_are_real_they_succeed_where_there_is_no_sandbox(name: str, outside: Any) -> None:
    result = run_program(outside.program(ESCAPES[name]), backend=Unsafe())
    assert "ESCAPED" in result.stdout, result


CHANGE_WHAT_MAY_BE_READ = """
import fcntl, os
fd = os.open(PLACE, os.O_RDONLY)
assert os.read(fd, 1) == b"x"
for change in (
    lambda: os.fchmod(fd, 0o666),
    lambda: os.fchown(fd, -1, os.getgid()),
    lambda: os.setxattr(fd, "user.a", b"1"),
    lambda: os.utime(fd, (1, 1)),
    lambda: fcntl.ioctl(fd, 0x40086602, bytes(8)),
):
    try:
        change()
        print("ESCAPED")
    except OSError:
        print("refused")
"""


def test_a_file_of_ones_own_that_may_be_read_cannot_be_changed_through_its_descriptor(
    wall: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="installed-") as name:  # as packages of whoever runs the trainer
        os.chmod(name, 0o755)
        place = os.path.join(os.path.realpath(name), "site-packages", "module.py")
        os.mkdir(os.path.dirname(place))
        with open(place, "w") as file:
            file.write("x = 1")
        if os.getuid() == 0:
            os.chown(place, NOBODY, NOBODY)
        os.chmod(place, 0o644)
        monkeypatch.setattr(sys, "path", [*sys.path, os.path.dirname(place)])
        before = os.stat(place)
        result = run_program(f"PLACE = {place!r}\n{CHANGE_WHAT_MAY_BE_READ}", backend=wall)
        after = os.stat(place)
    assert result.stdout.split() == ["refused"] * 5, result
    assert (before.st_mode, before.st_ctime_ns) == (after.st_mode, after.st_ctime_ns)


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of System V memory are tried on Linux")
def test_shared_memory_of_others_is_not_attached_by_guessing_its_number(wall: Backend) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(0, 4096, 0o1666)
    assert number >= 0
    address = libc.shmat(number, None, 0)
    try:
        ctypes.memmove(address, b"canary\0", 7)
        attach = (
            f"{CTYPES}libc.shmat.restype = ctypes.c_void_p\n"
            f"there = libc.shmat({number}, None, 0)\n"
            "if there not in (None, 2**64 - 1):\n"
            "    print('ESCAPED', ctypes.string_at(there)); ctypes.memmove(there, b'changed', 8)\n"
            f"print('removed', libc.shmctl({number}, 0, None))"
        )
        result = run_program(attach, backend=wall)
        assert "ESCAPED" not in result.stdout
        assert "removed -1" in result.stdout, result
        assert ctypes.string_at(address) == b"canary"
        assert "ESCAPED" in run_program(attach, backend=Unsafe()).stdout  # the attack is real
    finally:
        libc.shmdt(ctypes.c_void_p(address))
        libc.shmctl(number, 0, None)


# Too much of something -------------------------------------------------------------------------------

MB = 1024 * 1024
SMALL = Limits(seconds=2, memory_mb=128, processes=12, file_mb=1, disk_mb=8, output_kb=32, open_files=32)


def run(code: str, backend: Backend, limits: Limits = SMALL, stdin: str = "") -> Result:
    """Run it and see that no process remains."""
    mark = secrets.token_hex(8)
    job = {"code": code, "stdin": stdin, "call": None, "imports": None}
    result = run_job(job, None, limits, backend, mark)
    assert remains(mark) == []
    return result


def test_output_has_an_end(backend: Backend) -> None:
    result = run("while True: print('x' * 1000)", backend)
    assert result.status == "output"
    assert len(result.stdout) == SMALL.output_kb * 1024
    result = run("import os\nwhile True: os.write(2, b'y' * 60000)", backend)
    assert result.status == "output"
    assert len(result.stderr) == SMALL.output_kb * 1024


def test_memory_has_an_end_in_one_process(backend: Backend) -> None:
    result = run(f"x = bytearray(400 * {MB}); print('ESCAPED')", backend)
    assert result.stdout == ""
    assert result.status == ("crashed" if backend.name == "sandlock" else "memory")


def test_memory_has_an_end_in_all_processes_together(backend: Backend) -> None:
    code = f"""
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(60 * {MB})
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(60)
time.sleep(60)
"""
    result = run(code, backend, Limits(seconds=5, memory_mb=128))
    if backend.name == "sandlock":  # kills those that ask for more (two of six get it); the rest sleeps on
        assert result.status == "timeout"
    else:
        assert result.status in (
            "memory",
            "crashed",
        ), result  # 360 MB in 6 processes of 60: not the time limit


def test_processes_have_an_end(backend: Backend) -> None:
    code = """
import os, time
made = 0
for _ in range(600):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
    except OSError:
        break
print(made)
"""
    result = run(code, backend)
    assert result.status == "ok"
    assert int(result.stdout) <= SMALL.processes + 4


def test_a_file_and_the_folder_have_an_end(backend: Backend) -> None:
    code = "f = open('big', 'wb')\nfor _ in range(300): f.write(bytes(1024 * 1024))\nprint('ESCAPED')"
    result = run(code, backend)
    assert result.status == "error"
    assert "File too large" in result.stderr
    many = (
        "import time\nfor i in range(3000):\n    open(f'{i}', 'wb').write(bytes(900_000))\nprint('ESCAPED')\n"
        "time.sleep(9)"
    )
    result = run(many, backend)
    assert result.status in ("disk", "error"), result  # ended from outside, or no space left on the device
    assert "ESCAPED" not in result.stdout


def test_a_folder_that_resists_is_removed_all_the_same(backend: Backend) -> None:
    deep = """
import os
open('file', 'w')
os.symlink('/', 'root')
for depth in range(300):
    os.mkdir('d' * 50); os.chdir('d' * 50)
os.mkdir('locked', 0)
print('ok')
"""
    assert run(deep, backend).stdout == "ok\n"


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
        "10 ** 10 ** 9",
        "import atexit\n@atexit.register\ndef forever():\n    while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
    ids=["busy", "asleep", "deaf", "thread", "power", "atexit", "catching"],
)
def test_time_has_an_end(code: str, backend: Backend) -> None:
    result = run(code, backend, Limits(seconds=0.3))
    assert result.status == "timeout"


@pytest.mark.parametrize(
    "code",
    [
        # a daemon: two forks, a session of its own, and its parents gone
        "import os, time\nif os.fork() == 0:\n    try: os.setsid()\n    except OSError: pass\n"
        "    if os.fork() == 0: time.sleep(30)\n    os._exit(0)",
        "import subprocess; subprocess.Popen(['sleep', '30'])",
        "import os, time\nos.fork() or os.fork() or time.sleep(30)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        # kill the keeper, so that nobody is left who would end the others
        "import os, signal, time\nif os.fork() == 0: time.sleep(30)\nos.kill(os.getppid(), signal.SIGKILL)\n"
        "time.sleep(30)",
        "import os, signal, time\nif os.fork() == 0: time.sleep(30)\nos.kill(os.getppid(), signal.SIGSTOP)\n"
        "time.sleep(30)",
    ],
    ids=["daemon", "subprocess", "children", "fork bomb", "kills the keeper", "stops the keeper"],
)
def test_nothing_outlives_the_run(code: str, wall: Backend) -> None:
    run(code, wall, Limits(seconds=0.4, processes=12))  # asserts that nothing remains


@pytest.mark.parametrize(
    ("code", "statuses"),
    [
        ("def f(n): return f(n + 1)\nf(0)", ["error"]),
        (
            "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
            ["crashed", "memory", "timeout", "error"],
        ),
        ("import ctypes; ctypes.string_at(0)", ["crashed"]),
        ("import os; os.abort()", ["crashed"]),
        ("import os; os._exit(0)", ["ok"]),
        ("raise SystemExit(3)", ["error"]),
        ("print(10 ** 5000)", ["error"]),
        ("(" * 100_000, ["syntax_error"]),
        ("x = " + "-" * 100_000 + "1", ["syntax_error", "crashed"]),
        ("\0", ["syntax_error"]),
        ("\udc80", ["syntax_error"]),
        ("def f(:", ["syntax_error"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_program_that_breaks_is_a_result_and_no_exception(
    code: str, statuses: list[str], backend: Backend
) -> None:
    assert run(code, backend).status in statuses


# Honest ones -----------------------------------------------------------------------------------------


def test_honest_programs_work(backend: Backend) -> None:
    code = """
import asyncio, collections, concurrent.futures, dataclasses, heapq, json, math, pathlib, random, re, sys, tempfile
import datetime, decimal, fractions, functools, itertools, statistics, string, subprocess, typing, unittest.mock
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "note"
    file.write_text("grüße")
    assert file.read_text() == "grüße"
@dataclasses.dataclass
class Point:
    x: int
assert Point(1) == Point(1)
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert list(pool.map(abs, [-1, -2])) == [1, 2]
async def later(): return 5
assert asyncio.run(later()) == 5
assert subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout == "hi\\n"
print(sum(map(int, sys.stdin.read().split())), __name__)
"""
    result = run(code, backend, Limits(), stdin="1 2\n3\n")
    assert (result.status, result.stdout, result.exit_code) == ("ok", "6 __main__\n", 0), result.stderr


def test_large_input_and_output_pass_through(backend: Backend) -> None:
    result = run(
        "import sys; print(len(sys.stdin.read())); print('y' * 200_000)", backend, Limits(), "x" * 1_000_000
    )
    assert result.stdout == "1000000\n" + "y" * 200_000 + "\n"


def test_many_at_one_time_do_not_mix(backend: Backend) -> None:
    results: dict[int, str] = {}

    def one(number: int) -> None:
        results[number] = run_program(f"print({number} * 2)", backend=backend).stdout

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{2 * number}\n" for number in range(6)}
