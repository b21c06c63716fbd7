"""The reward that runs programs: extraction, formula, options."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from config.errors import InvalidConfigurationError, RewardError
from rewards.code_execution import CodeExecution, extract_code
from rewards.composition import RewardSet
from rewards.sandbox.choice import proven_backend
from rewards.show import try_reward

ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def sandboxed() -> None:
    try:
        proven_backend()
    except InvalidConfigurationError as error:
        pytest.skip(str(error))


@pytest.fixture
def reward(sandboxed: None) -> CodeExecution:
    return CodeExecution(timeout=3)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("Text\n```py\nx = 1\n```\nmore\n```Python\nx = 2\n```\nend", "x = 2\n"),  # the last one
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
        ("```json\n{}\n```", ""),
        ("```python\nx = 1", "x = 1"),  # cut off
        ("x = 1", "x = 1"),
        ("<think>```python\nx = 0\n```</think>\n```python\nx = 1\n```", "x = 1\n"),
        ("<think>x = 0</think>", ""),
        ("<think>```python\nx = 0\n```", ""),  # thinking that is never closed
        ("   ```python\n  x = 1\n   ```", "  x = 1\n"),
        ("```python\n```", ""),
        ("", ""),
        (" \n", ""),
    ],
)
def test_the_program_is_found_in_the_answer(text: str, code: str) -> None:
    assert extract_code(text) == code


def test_an_answer_of_nothing_but_fences_takes_linear_time() -> None:
    assert extract_code("```python\n" * 100_000 + "`" * 100_000) != "x"


def test_the_score_is_three_tenths_and_seven_tenths_of_the_tests(reward: CodeExecution) -> None:
    tests = [
        "assert add(2, 3) == 5",
        "assert add(-1, 1) == 0",
        {"function": "add", "args": [1, 1], "expected": 3},
    ]
    completions = [
        f"Here it is:\n```python\n{ADD}```",  # 2 of 3
        ADD.replace("+", "-"),  # none
        "```python\ndef add(:\n```",  # no Python
        "I do not know.",  # neither
        "import sys; sys.exit(0)",
    ]
    scores = reward(completions=completions, test_cases=[tests] * 5)
    assert scores == pytest.approx([0.3 + 0.7 * 2 / 3, 0.3, 0.0, 0.0, 0.3])


def test_without_tests_it_is_enough_to_run(reward: CodeExecution) -> None:
    assert reward(["print(1)", "1 / 0", "def f(:", ""]) == [1.0, 0.3, 0.0, 0.0]
    assert reward(["print(1)", "1 / 0"], test_cases=[None, []]) == [1.0, 0.3]


def test_tests_may_stand_in_the_rows_meta(reward: CodeExecution) -> None:
    meta = {"test_cases": ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]}
    assert reward([ADD], meta=[meta]) == pytest.approx([0.65])


def test_the_log_says_what_a_score_is_made_of(sandboxed: None) -> None:
    rewards = RewardSet.build("code_execution")
    programs = [ADD, "def add(:", "", "print(1)", "def add(a, b): return 1 / 0"]
    tests: list[Any] = [["assert add(1, 2) == 3", "assert add(1, 2) == 4"]] * 3 + [
        None,
        "assert add(1, 2) == 3",
    ]
    scored = rewards.score([""] * 5, programs, test_cases=tests)
    told = list((scored.extra or {})["code_execution log"])
    assert told[0] == "1 of 2 tests; test 1: error 'an assertion does not hold'"
    assert told[1:4] == ["syntax_error", "no program", "no tests; ok"]
    assert told[4] == "0 of 1 tests; test 0: error 'ZeroDivisionError: division by zero'"
    assert "1 of 2 tests" in try_reward("code_execution", "", ADD, columns={"test_cases": tests[0]})


def test_out_of_time_no_further_test_is_begun(sandboxed: None) -> None:
    reward = CodeExecution(timeout=0.2, num_workers=1)
    rewards = RewardSet([reward], timeout=0.5)
    with pytest.raises(RewardError, match="took longer than reward_timeout"):
        rewards.score([""], ["while True: pass"], test_cases=[["assert True"] * 200])
    end = time.monotonic() + 10  # of 40 s and more that all tests would take
    while any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_answer_of_nothing_is_no_program(reward: CodeExecution) -> None:
    said = [[{"role": "assistant", "content": content}] for content in (None, "", [])]
    assert reward([*said, [], None]) == [0.0] * 5
    assert reward([[{"role": "assistant", "content": [{"type": "text", "text": "1 / 0"}]}]]) == [0.3]
    assert reward(["print(1)", "4</think>print(1)"], prompts=["2 + 2? <think>"] * 2) == [0.0, 1.0]


def test_stdin_and_stdout_are_compared(reward: CodeExecution) -> None:
    double = "print(2 * int(input()))"
    cases = [{"input": "4\n", "expected": "8"}, {"input": "0\n", "expected": "0\n"}]
    assert reward([double, "print(8)"], test_cases=[cases, cases]) == pytest.approx([1.0, 0.65])


def test_it_is_found_by_name_and_takes_conversations(sandboxed: None) -> None:
    rewards = RewardSet.build("code_execution")
    assert rewards.names == ["code_execution"]
    completions = [[{"role": "assistant", "content": f"```python\n{ADD}```"}]]
    scored = rewards.score(["p"], completions, test_cases=[["assert add(1, 2) == 3"]])
    assert scored.total.tolist() == [1.0]


@pytest.mark.parametrize(
    ("allowed", "scores"), [(True, [1.0, 1.0, 1.0]), (False, [1.0, 0.3, 0.3]), (["math"], [1.0, 1.0, 0.3])]
)
def test_imports_are_allowed_by_name(sandboxed: None, allowed: Any, scores: list[float]) -> None:
    programs = ["print(1)", "import math\nfrom math import pi", "from collections import deque"]
    assert CodeExecution(allow_imports=allowed)(programs) == scores


def test_the_memory_and_time_limits_are_the_options(sandboxed: None) -> None:
    program = "x = bytearray(200 * 1024 * 1024)"
    assert CodeExecution(memory_limit=512)([program]) == [1.0]
    assert CodeExecution(memory_limit=128)([program]) == [0.3]
    assert CodeExecution(timeout=0.2, num_workers=1)(["while True: pass"]) == [0.3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_workers": 0}, "num_workers is 0"),
        ({"timeout": -1}, "limit seconds is -1"),
        ({"memory_limit": "1G"}, "limit memory_mb is '1G'"),
        ({"allow_imports": "math"}, "allow_imports is 'math'"),
        ({"allow_unsafe_code": "false"}, "allow_unsafe_code is 'false'"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=says):
        CodeExecution(**options)
