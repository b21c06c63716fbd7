"""Does the program in the answer do what its tests ask? Runs it, in a sandbox (``rewards/sandbox``).

    score = 0                          no code, or it is no Python
            0.3 + 0.7 · pass_rate      otherwise                                        in [0, 1]

    pass_rate     share of the row's test cases that pass; without test cases 1 if the program ends
                  by itself with exit code 0, else 0

The code is the last block between ``` fences that is marked as Python or not at all, after the last ``</think>``;
an answer without fences is taken as code as it stands. Test cases come in the column ``test_cases``, one list per
row, or in that field of the row's ``meta``, in the forms of ``rewards/sandbox/grading.py``. Each of them runs the
program anew.

A model can cheat in the ways that ``grading`` lists, none of them by printing or leaving: a program that prints
"passed", calls ``sys.exit(0)`` or ``os._exit(0)``, or brings an ``==`` that is always true, gets 0.3.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from config.errors import InvalidConfigurationError
from rewards.registry import register
from rewards.row_reward import rows_of
from rewards.sandbox.choice import proven_backend
from rewards.sandbox.grading import Case, read_cases, run_case
from rewards.sandbox.limits import Limits, Result
from rewards.sandbox.runner import run_program
from rewards.tags import PRESETS
from rewards.text_utils import shortened

FOR_RUNNING = 0.3
_PYTHON = ("", "python", "python3", "py", "py3")


def extract_code(text: str) -> str:
    """The program in an answer, empty if there is none; in time linear in its length.

    >>> extract_code("Here:\\n```python\\nprint(1)\\n```\\nDone.")
    'print(1)\\n'
    >>> extract_code("def f():\\n    return 1")
    'def f():\\n    return 1'
    """
    text = text.rpartition("</think>")[2].partition("<think>")[
        0
    ]  # thinking that is never closed is no answer
    last: str | None = None
    block: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if fence and mark.startswith("```") and mark.strip("`") == "":
            last = "".join(block) if fence == "python" else last
            fence = ""
        elif not fence and mark.startswith("```"):
            fence = "python" if mark.strip("`").strip().lower() in _PYTHON else "other"
            block = []
        elif fence:
            block.append(line)
    if fence == "python":  # cut off before its end
        last = "".join(block)
    if last is not None:
        return last if last.strip() else ""
    return text if text.strip() and "```" not in text else ""


@register("code_execution")
class CodeExecution:
    """The reward; its options are the keywords of ``__init__``.

    Args:
        timeout: Seconds for one run of a program.
        num_workers: Programs that run at one time. None: one per processor core.
        memory_limit: Megabytes, for each process of a program and for all of them together.
        allow_imports: True: whatever is installed. False: none. A list: the modules that a program may import.
        sandbox_command: A command of your own that runs a command in a container.
        allow_unsafe_code: Run programs without a sandbox where there is none.

    Raises:
        InvalidConfigurationError: an option is out of range, or no sandbox works here; before any model is loaded.
    """

    reward_name = "code_execution"

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        num_workers: int | None = None,
        memory_limit: int = 512,
        allow_imports: bool | Sequence[str] = True,
        sandbox_command: str | Sequence[str] | None = None,
        allow_unsafe_code: bool = False,
    ) -> None:
        if num_workers is not None and (
            isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1
        ):
            raise InvalidConfigurationError(
                f"code_execution: num_workers is {num_workers!r}; expected a whole number from 1, or None for "
                f"one per processor core."
            )
        if not isinstance(allow_imports, bool) and (
            isinstance(allow_imports, str)
            or not isinstance(allow_imports, Sequence)
            or not all(isinstance(name, str) for name in allow_imports)
        ):
            raise InvalidConfigurationError(
                f"code_execution: allow_imports is {allow_imports!r}; expected true, false or a list of module "
                f'names such as ["math", "collections"].'
            )
        if not isinstance(allow_unsafe_code, bool):  # the text "false" is true to Python
            raise InvalidConfigurationError(
                f"code_execution: allow_unsafe_code is {allow_unsafe_code!r}; expected true or false."
            )
        self.limits = Limits(seconds=timeout, memory_mb=memory_limit)
        self.workers = num_workers or _cores()
        self.imports = None if allow_imports is True else list(allow_imports or ())
        self.backend = proven_backend(sandbox_command, allow_unsafe_code)

    def __call__(
        self,
        completions: Sequence[Any],
        test_cases: Sequence[Any] | None = None,
        prompts: Sequence[Any] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One score per completion; ``test_cases`` is one list of cases per completion."""
        rows = list(rows_of(prompts, completions, {"test_cases": test_cases, **columns}))
        cases = [read_cases(row.field("test_cases"), number) for number, row in enumerate(rows)]
        programs = [extract_code(row.tagged(PRESETS["think-only"])) for row in rows]
        over = threading.Event()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                judged = list(pool.map(lambda code, own: self._judge(code, own, over), programs, cases))
            finally:
                over.set()  # out of time, or interrupted: no further test is begun
        if log_extra is not None:
            log_extra(f"{self.reward_name} log", [why for _, why in judged])
        return [score for score, _ in judged]

    def _judge(self, code: str, cases: Sequence[Case], over: threading.Event) -> tuple[float, str]:
        """The score of a program, and in a line what it is made of."""
        if not code:
            return 0.0, "no program"
        if not cases:
            result = run_program(code, "", self.limits, self.backend, imports=self.imports)
            score = {"syntax_error": 0.0, "ok": 1.0}.get(result.status, FOR_RUNNING)
            return score, f"no tests; {_told(result)}"
        passed, failed = 0, ""
        for number, case in enumerate(cases):
            if over.is_set():
                break
            good, result = run_case(code, case, self.limits, self.backend, self.imports)
            if result.status == "syntax_error":
                return 0.0, result.status
            passed += good
            failed = failed or ("" if good else f"; test {number}: {_told(result)}")
        return (
            FOR_RUNNING + (1 - FOR_RUNNING) * passed / len(cases),
            f"{passed} of {len(cases)} tests{failed}",
        )


def _told(result: Result) -> str:
    """How a program ended, with the last line that it wrote to stderr if it ended badly."""
    last = (result.stderr.strip().splitlines() or [""])[-1]
    return f"{result.status} {shortened(last)}" if last and result.status != "ok" else result.status


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
