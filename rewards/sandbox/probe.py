"""An attack on a sandbox, to be seen failing before the first program is run in it.

A program in it tries to get at things that are really there, made for it: a file to read, a folder to write to, two
sockets that listen, an environment variable, this process to signal and to look into, and a descendant that is to
outlive it. It also does what honest programs do, so that a sandbox in which nothing works does not pass for safe.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import time
from pathlib import Path

from rewards.sandbox.backends import Backend
from rewards.sandbox.limits import Limits
from rewards.sandbox.session import run_job
from rewards.sandbox.supervision import processes_with

_ATTACK = """
import os, signal, socket
found = []
def attempt(name, action):
    try:
        if action() is not False: found.append(name)
    except BaseException: pass
def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as out:
        out.settimeout(0.5)
        out.connect(address)
def write():
    with open(os.path.join(FOLDER, "written"), "w") as file: file.write("x")
attempt("read a file", lambda: CANARY in open(SECRET).read())
attempt("link to a file and read it", lambda: (os.symlink(SECRET, "link"), CANARY in open("link").read())[1])
attempt("write a file", write)
attempt("remove a file", lambda: os.unlink(SECRET))
attempt("change the mode of a file", lambda: os.chmod(SECRET, 0o777))
attempt("list a folder", lambda: os.listdir(FOLDER))
attempt("open a TCP connection", lambda: connect(socket.AF_INET, ("127.0.0.1", PORT)))
attempt("connect to a Unix socket", lambda: connect(socket.AF_UNIX, SOCKET))
attempt("read the trainer's environment", lambda: open(f"/proc/{TRAINER}/environ").read())
attempt("read the trainer's memory map", lambda: open(f"/proc/{TRAINER}/maps").read())
attempt("signal the trainer", lambda: os.kill(TRAINER, SIGNAL))
attempt("find a variable of the trainer", lambda: CANARY in "".join(os.environ.values()))
attempt("be root", lambda: os.getuid() == 0)
open("mine", "w").write("honest")
assert open("mine").read() == "honest"
try:
    if os.fork() == 0:
        attempt("leave the group", os.setsid)
        if os.fork() == 0:
            import time
            time.sleep(30)
        os._exit(0)
except OSError: pass
print("done:" + ", ".join(found))
"""


def weakness(backend: Backend) -> str:
    """What an attack achieved, or why the sandbox does not work here; empty if it holds."""
    canary, mark = secrets.token_hex(16), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="canary-") as name:
        folder = Path(name)
        secret = folder / "secret"
        secret.write_text(canary)
        if os.getuid() == 0:  # or the owner alone would keep the ordinary user out
            folder.chmod(0o777)
            secret.chmod(0o666)
        listening = _listening(socket.AF_INET, ("127.0.0.1", 0))
        with listening as tcp, _listening(socket.AF_UNIX, str(folder / "socket")):
            (folder / "socket").chmod(0o777)
            facts = {
                "CANARY": canary,
                "SECRET": str(secret),
                "FOLDER": str(folder),
                "PORT": tcp.getsockname()[1],
                "SOCKET": str(folder / "socket"),
                "TRAINER": os.getpid(),
                "SIGNAL": 0,  # is it there, and may I: nothing is delivered
            }
            code = "".join(f"{key} = {value!r}\n" for key, value in facts.items()) + _ATTACK
            os.environ[_VARIABLE] = canary
            try:
                job = {"code": code, "stdin": "", "call": None, "imports": None}
                result = run_job(job, None, Limits(seconds=5), backend, mark)
            finally:
                del os.environ[_VARIABLE]
        untouched = secret.exists() and secret.read_text() == canary and not (folder / "written").exists()
    if result.status != "ok" or "done:" not in result.stdout:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return f"it does not run programs here ({result.status}: {last})"
    achieved = result.stdout.rpartition("done:")[2].strip()
    if backend.foreign_python:  # inside a container, root is nobody, and a listing is of its own files
        achieved = ", ".join(
            one for one in achieved.split(", ") if one not in ("be root", "signal the trainer")
        )
    if remains(mark):
        achieved += ", outlive its time"
    if achieved or not untouched:
        return f"a program in it could {achieved or 'change a file outside'}"
    return ""


def remains(mark: str) -> list[int]:
    """Processes that are still there, after as long as a killed one takes to go."""
    until = time.monotonic() + 2.0
    while (left := processes_with(mark)) and time.monotonic() < until:
        time.sleep(0.01)
    return left


_VARIABLE = "MLX_PPO_SANDBOX_PROBE"


class _listening:
    """A socket that accepts connections as long as the block lasts."""

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int] | str) -> None:
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.bind(address)
        self.socket.listen(4)

    def __enter__(self) -> socket.socket:
        return self.socket

    def __exit__(self, *_: object) -> None:
        self.socket.close()
