"""A folder as a user has it: prompts, pairs and preferences of a few rows, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import main


class Result(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


#: A model that takes milliseconds, for config files.
TINY = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_layers": 1,
    "intermediate_size": 32,
}


#: Every stage of a pipeline, with that model.
PIPELINE = """
[pipeline]
output_dir = "out"
model_name = "embedded"
embedded_model = {hidden_size = 16, num_attention_heads = 2, num_key_value_heads = 1, num_layers = 1}
batch_size = 3
[sft]
train_path = "pairs.jsonl"
num_steps = 2
learning_rate = 1e-2
[reward_model]
train_path = "preferences.jsonl"
num_steps = 2
[train]
algorithm = "grpo"
train_path = "prompts.jsonl"
group_size = 2
num_steps = 2
max_new_tokens = 6
learning_rate = 1e-2
[evaluate]
val_path = "prompts.jsonl"
max_new_tokens = 6
[fuse]
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data files and ``run.yaml``."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"{n} ", "completion": f"{n + 2} {n + 4}"} for n in range(10, 34, 2)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs[:6]])
    write_rows(
        tmp_path / "preferences.jsonl",
        [{"prompt": f"{n} ", "chosen": f"{n + 2}", "rejected": "x"} for n in range(10, 34, 2)],
    )
    (tmp_path / "run.yaml").write_text(
        "model:\n  model_name: embedded\n"
        f"  embedded_model: {json.dumps(TINY)}\n"
        "data:\n  train_path: prompts.jsonl\n"
        "rewards: [well_formed]\n"
        "rollouts:\n  max_new_tokens: 6\n"
        "batches:\n  batch_size: 3\n  num_steps: 2\n",
        encoding="utf-8",
    )
    chat = tmp_path / "message_data"
    chat.mkdir()
    (chat / "+15551230000.txt").write_text(
        "".join(
            f"May 0{1 + n // 24}, 2022  5:{n % 60:02d}:42 PM\n{'Me' if n % 2 else '+15551230000'}\nline {n}\n\n"
            for n in range(48)
        ),
        encoding="utf-8",
    )
    (tmp_path / "pipeline.toml").write_text(PIPELINE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs ``python main.py …`` in this process."""

    def run(*words: str) -> Result:
        try:
            code = main.main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Result(code, printed.out, printed.err)

    return run
