"""Arithmetic in text, worked out without the interpreter's ``eval``: numbers, + − * / // % **, four functions.

Everything is a float, so a power is either a float or refused: no expression takes time or memory beyond its length.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

LONGEST = 1000  # characters of an expression
DEEPEST = 50  # brackets within brackets

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS = ("abs", "round", "min", "max")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][+-]?\d{1,4})?")
_NUMBER_INSIDE = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d{1,4})?")


class ArithmeticProblem(ValueError):
    """Not an expression that can be worked out; the message says why."""


def evaluate(expression: str) -> float:
    """The value of an arithmetic expression; ``^`` is a power, ``1,234`` a number.

    >>> evaluate("2^3 * (1 + 1) / 4")
    4.0

    Raises:
        ArithmeticProblem: for anything else than finite arithmetic.
    """
    text = expression.strip().replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-")
    if "(" not in text:
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if not text or len(text) > LONGEST:
        raise ArithmeticProblem("empty" if not text else f"longer than {LONGEST} characters")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST or re.search(r"[-+~]{50}", re.sub(r"\s", "", text)):
        raise ArithmeticProblem("nested too deeply")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except ArithmeticProblem:
        raise
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ArithmeticProblem(f"{type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ArithmeticProblem("not finite")
    return value


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return float(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _call(node.func.id, [_value(argument) for argument in node.args])
    raise ArithmeticProblem(f"{type(node).__name__} is no arithmetic")


def _call(name: str, arguments: list[float]) -> float:
    if name not in _FUNCTIONS or not arguments:
        raise ArithmeticProblem(f"{name} of {len(arguments)} is none of {', '.join(_FUNCTIONS)}")
    if name in ("min", "max"):
        return min(arguments) if name == "min" else max(arguments)
    if name == "abs" and len(arguments) == 1:
        return abs(arguments[0])
    if name == "round" and len(arguments) <= 2 and all(abs(digits) <= 30 for digits in arguments[1:]):
        return float(round(arguments[0], *(int(digits) for digits in arguments[1:])))
    raise ArithmeticProblem(f"{name} does not take {len(arguments)} arguments")


def number(text: str) -> Decimal | None:
    """The number that a text is, exactly: ``72``, ``72.0``, ``1,234``, ``$5``, ``-3e2``; None if it is none."""
    text = text.strip().strip("$€£").strip().removesuffix(".")
    if not any(map(str.isdigit, text)) or len(text) > 200 or not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:  # digits of other scripts that are no decimals
        return None


def reference_number(reference: str) -> float | None:
    """The number in what follows ``####`` in a reference (or in all of it); of several, all digits joined.

    Joined are digits and ``. - e E``; where that gives no number, the last one counts.

    >>> reference_number("She has 3 + 4 eggs.\\n#### 7 eggs")
    7.0
    """
    text = reference.rpartition("####")[2]
    found = _NUMBER_INSIDE.findall(text)
    if not found:
        return None
    if len(found) > 1:  # digits that are apart, such as 1 000, or several numbers
        try:
            return _finite(float("".join(c for c in text if c.isascii() and (c.isdigit() or c in ".-eE"))))
        except ValueError:
            pass
    return _finite(float(found[-1].replace(",", "")))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
