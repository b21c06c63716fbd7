"""Mathematical equality by math-verify, in children that can be killed."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

import pytest

from config.errors import InvalidConfigurationError
from rewards.line_workers import LineWorkers
from rewards.registry import resolve
from rewards.row_reward import Row

CASES = [
    ("The answer is $\\frac{1}{2}$", "0.5", 1.0),
    ("\\boxed{(x-1)(x+1)}", "x^2-1", 1.0),
    ("<think>5?</think><answer>1,234</answer>", "1234", 1.0),
    ("<answer>\\sqrt{2}</answer>", "\\sqrt{2}", 1.0),
    ("$(1,2)$", "(1, 2)", 1.0),
    ("It is $50\\%$", "0.5", 1.0),
    ("<answer>12</answer>", "half of it is 6\n#### 12", 1.0),
    ("$10.00", "$10.00", 1.0),
    ("$\\frac{1}{3}$", "0.5", 0.0),
    ("no idea", "0.5", 0.0),
    ("", "0.5", 0.0),
]


def test_answers_by_hand() -> None:
    reward: Any = resolve({"name": "math_verify", "config": {"workers": 1}})
    judged = reward.judge_all([Row("", text, {"answer": gold}) for text, gold, _ in CASES])
    assert [j.score for j in judged] == [expected for *_, expected in CASES]
    assert reward.judge(Row("", "5", {})).score is None


ECHO = """
import sys, time, json, os
print("{}", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task == "die": os._exit(3)
    if task == "hang":
        while True: time.sleep(1)
    print(json.dumps(task * 2), flush=True)
"""


def test_children_that_hang_or_die_are_replaced_and_the_others_answer() -> None:
    workers = LineWorkers([sys.executable, "-c", ECHO], 2)
    tasks = [1, "hang", 2, "die", 3, "x", 4]
    begin = time.monotonic()
    assert workers.ask(tasks, seconds=0.3, budget=60) == [2, "timeout", 4, "lost", 6, "xx", 8]
    assert time.monotonic() - begin < 30
    assert workers.ask([5], seconds=5, budget=60) == [10]
    workers.close()


def test_what_is_not_begun_within_the_budget_is_said() -> None:
    workers = LineWorkers([sys.executable, "-c", ECHO], 1)
    assert workers.ask(["hang", 1, 2], seconds=0.3, budget=0.1) == ["timeout", "budget", "budget"]
    assert workers.ask([1], seconds=1, budget=0.0) == ["budget"]
    workers.close()


@pytest.mark.slow
def test_an_answer_that_never_ends_costs_its_timeout_and_is_wrong() -> None:
    reward: Any = resolve({"name": "math_verify", "config": {"workers": 2, "timeout": 2.0}})
    hostile = ["$9^{9^{9^9}}$", "$" + "(" * 900 + "1" + ")" * 900 + "$", "$10000000!$", "9" * 100_000]
    begin = time.monotonic()
    scores = reward(prompts=[""] * 5, completions=[*hostile, "$5$"], answer=["5"] * 5)
    assert scores == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - begin < 60


def test_without_the_library_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("math_verify", "math-verify"), ("rouge", "rouge-score")):
        with pytest.raises(InvalidConfigurationError, match=f"{package} is not installed; pip install"):
            resolve(name)
