"""Run one program, shut in, and say how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.sandbox.backends import Backend
from rewards.sandbox.choice import proven_backend
from rewards.sandbox.limits import Limits, Result
from rewards.sandbox.session import run_job


def run_program(
    code: str,
    stdin: str = "",
    limits: Limits | None = None,
    backend: Backend | None = None,
    *,
    call: tuple[str, Sequence[Any], Mapping[str, Any]] | None = None,
    imports: Sequence[str] | None = None,
) -> Result:
    """Run a Python program that nobody has read, in a process of its own that is new for it.

    Args:
        code: The program.
        stdin: What it reads.
        limits: Ceilings; ``Limits()`` when not given.
        backend: From ``choice.proven_backend``; when not given the first that proves itself on this machine.
        call: (name, arguments, keywords) of a function to call once the program has run; its plain value comes
            back as ``Result.value``. ``Class.method`` makes an instance without arguments.
        imports: The modules that the program may name in an import. None: whatever there is.

    Raises:
        InvalidConfigurationError: nothing on this machine can shut a program in.

    What holds, in every back end but ``unsafe`` (``docs/sandbox.md`` has the measurements): the program cannot
    read files outside its folder, the Python installation and the system's libraries; cannot write outside its
    folder; cannot open a connection to anything outside; sees no environment variable of the trainer, nor its
    ``/proc`` entry; cannot signal or trace it; is ended with all its descendants when its time is up; and stays
    within its processor time, memory, number of processes, length of files and of output. Nothing runs as root.

    What does not: faults of the kernel and of the processor, which share one machine with you; how long things
    take, which others can observe; names, sizes and dates of files, which Landlock alone does not hide; and how
    well the program solves its task, which is ``grading``'s business. ``imports`` is a rule, not a wall.
    """
    limits = limits or Limits()
    job: dict[str, Any] = {"code": _text(code), "stdin": _text(stdin), "call": None, "imports": None}
    if call is not None:
        name, arguments, keywords = call
        job["call"] = [name, list(arguments), dict(keywords)]
    if imports is not None:
        job["imports"] = list(imports)
    return run_job(job, None, limits, backend or proven_backend())


def run_test(
    code: str,
    test: str,
    limits: Limits | None = None,
    backend: Backend | None = None,
    *,
    imports: Sequence[str] | None = None,
) -> Result:
    """Put a program to a test, which is a text of assertions: ``ok``, or ``error`` with the reason in ``stderr``.

    ``judge`` describes who executes what. Raises what ``run_program`` raises.
    """
    job = {
        "code": _text(code),
        "stdin": "",
        "call": None,
        "imports": None if imports is None else list(imports),
    }
    return run_job(job, _text(test), limits or Limits(), backend or proven_backend())


def _text(text: str) -> str:
    return text if isinstance(text, str) else str(text)
