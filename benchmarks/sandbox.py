"""What a sandbox costs: 64 short programs in each back end that holds here, beside the same without any.

    ./run python -m benchmarks.sandbox

"plain" starts `python -I -S` for each program and reads what it prints: the time that the programs need themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rewards.sandbox.backends import Backend, Bubblewrap, Landlock, SandboxExec, Sandlock
from rewards.sandbox.choice import why_not
from rewards.sandbox.runner import run_program, run_test

PROGRAM = "def add(a, b):\n    return a + b\nprint(add(2, 3))\n"
COUNT = 64


def plain() -> None:
    subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-S", "-c", PROGRAM], capture_output=True, check=True
    )


def printing(backend: Backend) -> Callable[[], None]:
    def once() -> None:
        assert run_program(PROGRAM, backend=backend).stdout == "5\n"

    return once


def tested(backend: Backend) -> Callable[[], None]:
    def once() -> None:
        assert run_test(PROGRAM, "assert add(2, 3) == 5", backend=backend).status == "ok"

    return once


def milliseconds(once: Callable[[], None], workers: int) -> float:
    """Per program, over all of them, with so many at one time; the best of three rounds."""
    rounds = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(3):
            started = time.perf_counter()
            for future in [pool.submit(once) for _ in range(COUNT)]:
                future.result()
            rounds.append(time.perf_counter() - started)
    return 1e3 * min(rounds) / COUNT


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{COUNT} programs, milliseconds each{'':14}one at a time{'':4}{cores} at a time")
    rows: list[tuple[str, Callable[[], None]]] = [("plain", plain)]
    for backend in (Bubblewrap(), Sandlock(), Landlock(), SandboxExec()):
        if trouble := why_not(backend):
            print(f"{backend.name}: not here ({trouble})")
            continue
        rows += [(backend.name, printing(backend)), (f"{backend.name}, an assertion", tested(backend))]
    for name, once in rows:
        print(f"{name:<42}{milliseconds(once, 1):>13.1f}{milliseconds(once, cores):>17.1f}")


if __name__ == "__main__":
    main()
