"""Benchmarks on local rows: how answers are read, what is refused, perplexity of a model that knows nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line.benchmark_rows import Task, final_number, first_letter, human_eval, mbpp, program
from command_line.benchmarks import check_benchmarks, exact_match, pass_at_1, perplexity
from config.errors import DataLoadError, InvalidConfigurationError
from config.ppo_config import PPOConfig
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 12 = 72 #### 72", "72"),
        ("#### 1,200.0", "1200"),
        ("#### 3.50", "3.5"),
        ("it is -4", "-4"),
        ("72 of 80", "80"),
        ("#### 0", "0"),
        ("#### 100", "100"),
        ("9 #### none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"),
        ("The answer is C.", "C"),
        ("D", "D"),
        (" 3)", "3"),
        ("Because", None),
        ("x", None),
        ("AB", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert first_letter(text) == letter


@pytest.mark.parametrize(
    ("names", "data", "sentence"),
    [
        (["human_eval"], [], "give --benchmark-data human_eval=FILE"),
        (["gsm8k"], [], "give --benchmark-data gsm8k=FILE"),
        (["gsm8k"], ["gsm8k"], "NAME=FILE is expected, found 'gsm8k'"),
        ([], ["arc=x"], "add --benchmark arc"),
    ],
)
def test_what_is_not_there_is_refused(names: list[str], data: list[str], sentence: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        check_benchmarks(names, data, None)


@pytest.mark.parametrize(
    ("name", "line", "sentence"),
    [
        ("gsm8k", "{", "rows.jsonl:2: not valid JSON"),
        ("gsm8k", '{"question": "x"}', "rows.jsonl:2: 'answer' is missing"),
        ("gsm8k", '{"question": "x", "answer": "none"}', "a number in answer"),
        ("arc", '{"question": "x", "choices": [], "answerKey": "A"}', "rows.jsonl:2: "),
        (
            "arc",
            '{"question": "x", "choices": {"text": ["y"], "label": ["B"]}, "answerKey": "A"}',
            "among the labels",
        ),
        ("arc", "[1]", "rows.jsonl:2: "),
        ("mbpp", '{"text": "x", "test_list": []}', "a test in test_list"),
        ("mbpp", '{"text": "x", "test_list": [1]}', "text in test_list"),
        ("human_eval", '{"prompt": "x", "test": "y"}', "'entry_point' is missing"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, name: str, line: str, sentence: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(DataLoadError, match=sentence):
        check_benchmarks([name], [f"{name}={tmp_path / 'rows.jsonl'}"], None)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataLoadError, match=r"rows\.jsonl"):
        check_benchmarks(["gsm8k"], [f"gsm8k={path}"], None)


def test_an_answer_counts_when_its_number_is_the_gold_one(
    tmp_path: Path, tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    """The gold answer of one row is what the model says, so that exactly that row is right."""
    policy, config = PolicyModel(tiny, make_config(PPOConfig)), make_config(PPOConfig, max_new_tokens=4)
    rows = [{"question": f"{n}?", "answer": "#### 987654321"} for n in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [benchmark] = check_benchmarks(["gsm8k"], [f"gsm8k={path}"], None)
    result = benchmark.run(policy, config)
    assert (result["exact_match"], result["rows"]) == (0.0, 3)
    said = result["samples"][1]["completion"]
    tasks = [task._replace(gold=said if i == 1 else "another") for i, task in enumerate(benchmark.rows)]
    judged = exact_match(policy, config, tasks, lambda text: text)
    assert judged["exact_match"] == pytest.approx(1 / 3)
    [limited] = check_benchmarks(["gsm8k"], [f"gsm8k={path}"], 2)
    assert len(limited.rows) == 2


def test_perplexity_is_that_of_the_policy_not_of_its_base(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    """Untrained it is near the vocabulary's size; with the embedding zeroed all logits are 0 and it is that size."""
    import mlx.core as mx

    config = make_config(PPOConfig, fine_tune_type="full")
    rows = [{"prompt": "10 ", "completion": "12 14"}, {"prompt": "x", "completion": "y"}]
    policy = PolicyModel(tiny, config)
    size = tiny.config["vocab_size"]
    before = perplexity(policy, config, rows)
    assert 0.5 * size < before["perplexity"] < 2 * size
    policy.model.model.embed_tokens.weight = mx.zeros_like(policy.model.model.embed_tokens.weight)
    after = perplexity(policy, config, rows)
    assert after["perplexity"] == pytest.approx(size, rel=1e-5)
    assert after["nats_per_token"] == pytest.approx(math.log(size), rel=1e-6)
    assert after["rows"] == 2


def test_a_program_ends_where_the_function_does() -> None:
    task = human_eval(
        {"prompt": "def f(x):\n", "test": "def check(g):\n    assert g(1) == 2", "entry_point": "f"}
    )
    body = "    return (\n        x + 1\n    )\n"
    assert program(task, body) == "def f(x):\n" + body
    assert program(task, body + "def g():\n    pass\n") == "def f(x):\n" + body
    assert program(task, body + "# and so on") == "def f(x):\n" + body
    assert program(task, "```python\ndef f(x): return 2\n```") == "```python\ndef f(x): return 2\n```"
    assert program(Task("write f"), "def f(): ...\nf()") == "def f(): ...\nf()"


def test_programs_pass_all_of_their_tests_or_do_not_count(
    tiny: LanguageModel, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four programs that a model is made to say, two pass everything: 0.5."""
    from command_line import benchmarks
    from rewards.code_execution import CodeExecution

    tests = "def check(g):\n    assert g(1) == 2\n    assert g(-1) == 0\n"
    completed = human_eval({"prompt": "def f(x):\n", "test": tests, "entry_point": "f"})
    written = mbpp({"text": "Add one.", "test_list": ["assert f(1) == 2", "assert f(-1) == 0"]})
    assert written.prompt == "Add one.\nYour code should pass this test:\nassert f(1) == 2\n"
    said = [
        "    return x + 1\nprint(",
        "    return 2 * x",
        "```python\nf = lambda x: x + 1\n```",
        "def f(x): return 2 * x",
    ]
    generate = benchmarks.Generator.generate

    def generated(*arguments: Any, **options: Any) -> Any:
        rollouts = generate(*arguments, **options)
        return [dataclasses.replace(r, text=text) for r, text in zip(rollouts, said, strict=True)]

    monkeypatch.setattr(benchmarks.Generator, "generate", generated)
    policy, config = PolicyModel(tiny, make_config(PPOConfig)), make_config(PPOConfig, max_new_tokens=2)
    try:
        judge = CodeExecution(num_workers=1)
    except InvalidConfigurationError as error:
        pytest.skip(f"no sandbox here: {error}")
    result = pass_at_1(policy, config, [completed, completed, written, written], judge)
    assert [sample["passed"] for sample in result["samples"]] == [True, False, True, False]
    assert (result["pass@1"], result["rows"]) == (0.5, 4)
