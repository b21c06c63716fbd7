"""``main.py doctor`` as a user runs it: what it prints, what it returns, what it leaves behind."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import main
from diagnosis.machine import TESTED

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_layers": 1,
    "intermediate_size": 32,
}


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs it in a folder with prompts and a config, where temporary files go to ``temporary/``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "abc"}\n')
    (tmp_path / "run.yaml").write_text(
        f"model_name: embedded\nembedded_model: {json.dumps(TINY)}\ntrain_path: prompts.jsonl\n"
        "rewards: [well_formed]\nalgorithm: grpo\ngroup_size: 3\nmax_new_tokens: 5\n"
    )
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def run(*words: str) -> Result:
        try:
            code = main.main(["doctor", *words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Result(code, printed.out, printed.err)

    return run


def verdicts(lines: Sequence[str]) -> dict[str, str]:
    found = (re.match(r"(ok|warning|FAULT) +(.+?)  ", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def test_a_sound_run(doctor: Any, tmp_path: Path) -> None:
    done = doctor("--config", "run.yaml")
    assert done.code == 0, done.out + done.err
    lines = done.out.splitlines()
    assert lines[0] == "grpo on embedded, lora, seed 0: a few steps in a temporary folder"
    assert set(verdicts(lines).values()) <= {"ok", "warning"}
    assert re.fullmatch(r"16 checks: \d+ ok, \d warnings?, 0 faults \(\d+\.\d s\)", lines[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "run.yaml", "temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []
    documented = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} |" in documented for name in verdicts(lines))


def test_a_fault_is_told_with_what_to_do_and_the_exit_code(doctor: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def same(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    done = doctor("--config", "run.yaml", "--reward", "mine.py:same")
    assert done.code == 1
    lines = done.out.splitlines()
    assert verdicts(lines)["reward"] == "FAULT"
    assert "2 of 2 groups without spread" in done.out
    assert any(line.strip().startswith("→ completions with equal scores teach nothing") for line in lines)
    assert lines[-1].count("1 fault ")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--config", "run.yaml", "--adapter-path", "nowhere"], 1, "adapters"),
        (["--config", "run.yaml", "--model-name", "nowhere"], 1, 'model_name: there is no folder "nowhere"'),
        (["--config", "run.yaml", "--train-path", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--algorithm", "grop"], 2, "grpo"),
        (["--learning-rte", "1"], 2, "--learning-rate"),
    ],
)
def test_what_could_not_even_start_is_one_sentence(
    doctor: Any, words: list[str], code: int, sentence: str
) -> None:
    done = doctor(*words)
    assert done.code == code
    assert sentence in done.err
    assert done.err.startswith("error: ")


def test_the_tested_series_are_those_that_are_installed_by_the_requirements() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^(mlx|mlx-lm)(?:\[cpu\])?>=(\d+\.\d+)", text, re.MULTILINE))
    assert asked == TESTED
