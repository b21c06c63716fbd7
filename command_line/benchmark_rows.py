"""The rows of benchmarks as questions, and what counts as an answer in a model's text.

gsm8k        {"question", "answer": "… #### 72"}
arc          {"question", "choices": {"text": […], "label": […]}, "answerKey"}
human_eval   {"prompt": "def f(…): …", "test": "def check(candidate): …", "entry_point"}
mbpp         {"text" or "prompt", "test_list": ["assert …", …], "test_setup_code": optional}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import DataLoadError


class Task(NamedTuple):
    """A question; its right answer, or the tests of a program that continues ``start``."""

    prompt: str
    gold: str = ""
    start: str = ""
    cases: tuple[Any, ...] = ()


def read_tasks(path: Path, read: Callable[[Mapping[str, Any]], Task], limit: int | None) -> list[Task]:
    """The first ``limit`` rows of a JSONL file.

    Raises:
        DataLoadError: file, line and what is wrong with the row.
    """
    tasks: list[Task] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                tasks.append(_task(f"{path}:{number}", line, read))
                if len(tasks) == limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataLoadError(f"{path}: cannot be read ({reason}); give a JSONL file") from error
    if not tasks:
        raise DataLoadError(f"{path}: it is empty; a row per line is expected")
    return tasks


def _task(place: str, line: str, read: Callable[[Mapping[str, Any]], Task]) -> Task:
    try:
        return read(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise DataLoadError(f"{place}: not valid JSON ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataLoadError(
            f"{place}: {error} is missing or of another kind, found {line.strip()!r:.100}"
        ) from error


def gsm8k(row: Mapping[str, Any]) -> Task:
    """A sum in words; the number after ####."""
    gold = final_number(row["answer"])
    if gold is None:
        raise KeyError("a number in answer")
    return Task(f"{row['question']}\nGive the final answer after ####.\n", gold)


def arc(row: Mapping[str, Any]) -> Task:
    """A question with lettered options."""
    choices = row["choices"]
    options = [f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=False)]
    if not options or row["answerKey"] not in choices["label"]:
        raise KeyError("an answerKey among the labels")
    return Task("\n".join([str(row["question"]), *options, "Answer:"]), str(row["answerKey"]))


def human_eval(row: Mapping[str, Any]) -> Task:
    """A function to be finished."""
    prompt = _text(row, "prompt")
    case = {"test": _text(row, "test"), "entry_point": _text(row, "entry_point")}
    return Task(prompt, start=prompt, cases=(case,))


def mbpp(row: Mapping[str, Any]) -> Task:
    """A function to be written; the first test shows its name."""
    text = _text(row, "text" if "text" in row else "prompt")
    tests = [_text({"test_list": test}, "test_list") for test in row["test_list"]]
    setup = row.get("test_setup_code") or ""
    prompt = f"{text}\nYour code should pass this test:\n{tests[0]}\n" if tests else ""
    if not prompt:
        raise KeyError("a test in test_list")
    return Task(prompt, cases=tuple(f"{setup}\n{test}".strip() for test in tests))


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"text in {name}")
    return str(row[name])


# Answers -------------------------------------------------------------------------------------------------


def final_number(text: str) -> str | None:
    """The number after the last ####, else the last number, in one spelling: ``1,200.0`` is ``1200``.

    >>> final_number("6 * 12 = 72 #### 72.0")
    '72'
    """
    found = re.findall(r"-?\d[\d,]{0,40}(?:\.\d{1,40})?", text.rpartition("####")[2])
    if not found:
        return None
    try:
        number = Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None
    return f"{number:f}".rstrip("0").rstrip(".") if number != number.to_integral() else f"{number:.0f}"


def first_letter(text: str) -> str | None:
    """The first capital or digit that stands alone, as in ``(B)`` or ``Answer: 3.``; the article A is one, too.

    >>> first_letter("The answer is (B).")
    'B'
    """
    found = re.search(r"(?<![A-Za-z0-9])([A-H1-8])(?![A-Za-z0-9'])", text)
    return found[1] if found else None


def program(task: Task, completion: str) -> str:
    """The program in a completion, as the reward ``code_execution`` takes it.

    A block between fences stands for itself. Otherwise the completion goes on with ``task.start`` and ends before
    the first line that is not indented and no longer belongs to it.

    >>> program(Task("", start="def f():\\n"), "    return 1\\n\\nprint(f())")
    'def f():\\n    return 1\\n\\n'
    """
    if "```" in completion or not task.start:
        return completion
    kept: list[str] = []
    for line in completion.splitlines(keepends=True):
        if kept and line[:1].strip() and not line.startswith((")", "]", "}")):
            break
        kept.append(line)
    return task.start + "".join(kept)
