"""The program's own process, from its first line to its last."""

from __future__ import annotations

# ruff: noqa: SIM115  (the program's own stdin and stdout stay open)
import builtins
import os
import sys

from rewards.sandbox.judge import Line, serve_program
from rewards.sandbox.values import BadValue, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Job = dict[str, Any]

SYNTAX_ERROR, NO_SUCH_FUNCTION = 120, 121


def execute(job: Job) -> int:
    """Execute it under the name of a program of its own; the exit code."""
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    sys.argv = ["program.py"]
    asked = job["test"] or job["call"] is not None
    main_module = type(sys)("program" if asked else "__main__")
    sys.modules[main_module.__name__] = main_module
    names = main_module.__dict__
    names["__builtins__"] = builtins
    try:
        code = compile(job["code"], "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        sys.stderr.write(f"program.py{line}: {type(error).__name__}: {str(error)[:200]}\n")
        return SYNTAX_ERROR
    if job["imports"] is not None:
        _only_import(job["imports"])
    try:
        exec(code, names)
        if job["test"]:
            serve_program(names, Line(3, 4, trusts_the_other=True))
        elif job["call"] is not None:
            name, arguments, keywords = job["call"]
            function = _function(names, name)
            if function is None:
                return NO_SUCH_FUNCTION
            value = encode(function(*arguments, **keywords))
            write_all(3, value)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 0xFF
        sys.stderr.write(f"{leaving.code}\n")
        return 1
    except BadValue as error:
        sys.stderr.write(f"The call returned what cannot be compared: {error}\n")
        return 1
    except BaseException as error:
        trace = error.__traceback__
        sys.excepthook(type(error), error, trace.tb_next if trace else None)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """As Python ends, threads awaited and atexit run, but without taking itself apart, which takes 5 ms."""
    import atexit

    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException as error:
        os.write(2, f"{type(error).__name__} at the end\n".encode())
        code = code or 1
    os._exit(code)


def _only_import(allowed: list[str]) -> None:
    """A rule of the task rather than a wall: what the program's own text imports, by name."""
    original = builtins.__import__

    def checked(name: str, names: Any = None, local: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        own = (names or {}).get("__name__") in ("__main__", "program")
        if own and name.partition(".")[0] not in allowed:
            raise ImportError(
                f"importing {name} is not allowed here; allowed: {', '.join(allowed) or 'nothing'}"
            )
        return original(name, names, local, fromlist, level)

    setattr(builtins, "__import__", checked)  # noqa: B010  (by name, for mypy)


def _function(names: dict[str, Any], dotted: str) -> Any:
    """``f``, ``Class.method``, or a method of a class called Solution, whose instance is made without arguments."""
    first, *rest = dotted.split(".")
    found = names.get(first)
    if found is None and isinstance(names.get("Solution"), type):
        found, rest = names["Solution"], [first]
    for part in rest:
        found = getattr(found() if isinstance(found, type) else found, part, None)
    return found if callable(found) else None


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
