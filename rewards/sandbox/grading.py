"""Test cases: what may be written, and whether a program passes.

    "assert add(2, 3) == 5"                                     assertions about what the program defines
    {"input": "2 3\\n", "expected": "5"}                         stdin, and the stdout that it must lead to
    {"function": "add", "args": [2, 3], "expected": 5}          a call, and the plain value it must return
    {"test": "def check(candidate): …", "entry_point": "add"}   HumanEval's form: check(add) is called

Every case runs the program anew, from its first line, in a sandbox of its own. Expected values never enter the
process of the program: stdout and values are compared here, assertions in the judge's process (``judge``).

Cheating that no harness can see: answers written down for the inputs that a task is known to use, a guess where
there are two answers only, and tests that take *both* sides of a comparison from the program
(``assert decode(encode(x)) == x``), or let its own functions decide (``assert is_right(solve(x))``).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from config.errors import RewardError
from rewards.sandbox.backends import Backend
from rewards.sandbox.limits import Limits, Result
from rewards.sandbox.runner import run_program, run_test

_EXPECTED = ("expected", "output", "expected_output")
_FUNCTION = ("function", "fn_name")


@dataclass(frozen=True)
class Assertions:
    text: str


@dataclass(frozen=True)
class Printed:
    stdin: str
    expected: str


@dataclass(frozen=True)
class Returned:
    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    expected: Any


Case = Assertions | Printed | Returned


def read_cases(given: Any, row: int) -> list[Case]:
    """The cases of one row: a case, a list of them, or either as JSON text; None is no case at all.

    Raises:
        RewardError: something is none of the four forms; names the row and the case.
    """
    if given is None:
        return []
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # an assertion may begin with a bracket, too
            given = json.loads(given)
    if isinstance(given, (str, Mapping)):
        given = [given]
    if not isinstance(given, Sequence):
        raise RewardError(
            f"The test cases of row {row} are a {type(given).__name__}; expected a list of assertions "
            f'or of {{"input": …, "expected": …}}, or None.'
        )
    return [_read_case(case, row, number) for number, case in enumerate(given)]


def _read_case(case: Any, row: int, number: int) -> Case:
    if isinstance(case, str):
        return Assertions(case)
    if isinstance(case, Mapping):
        if "test" in case:
            entry = case.get("entry_point")
            return Assertions(f"{case['test']}\ncheck({entry})\n" if entry else str(case["test"]))
        expected = next((key for key in _EXPECTED if key in case), None)
        function = next((key for key in _FUNCTION if case.get(key)), None)
        if expected and function:
            arguments = case.get("args", case.get("input", ()))
            if isinstance(arguments, Sequence) and not isinstance(arguments, str):
                return Returned(
                    str(case[function]), tuple(arguments), dict(case.get("kwargs") or {}), case[expected]
                )
        elif expected and "input" in case:
            return Printed(_lines(case["input"]), _lines(case[expected]))
    raise RewardError(
        f"Test case {number} of row {row} is {str(case)[:80]!r}; expected an assertion as text, "
        f'{{"input": …, "expected": …}} or {{"function": …, "args": […], "expected": …}}.'
    )


def _lines(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return "" if value is None else str(value)


def run_case(
    code: str, case: Case, limits: Limits, backend: Backend, imports: Sequence[str] | None = None
) -> tuple[bool, Result]:
    """Whether the program passes this case, and how it ended."""
    if isinstance(case, Assertions):
        result = run_test(code, case.text, limits, backend, imports=imports)
        return result.status == "ok", result
    if isinstance(case, Printed):
        result = run_program(code, case.stdin, limits, backend, imports=imports)
        return result.status == "ok" and same_text(result.stdout, case.expected), result
    call = (case.function, case.args, case.kwargs)
    result = run_program(code, "", limits, backend, call=call, imports=imports)
    # A program that leaves before the call has exit code 0 and no value, not even None.
    return result.status == "ok" and result.returned and same_value(result.value, case.expected), result


def same_text(printed: str, expected: str) -> bool:
    """The same lines, white space at their ends and empty lines at the end aside."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(printed) == lines(expected)


def same_value(value: Any, expected: Any) -> bool:
    """Equal plain data. Test cases often come from JSON, which has no tuples: a tuple equals the same list.

    Floats may differ by the last bits (1e-9 of their size). True is not 1.
    """
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, Mapping):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in value)
    if isinstance(value, float) or isinstance(expected, float):
        try:
            return value == expected or math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
        except (TypeError, OverflowError):
            return False
    return type(value) is type(expected) and bool(value == expected)
