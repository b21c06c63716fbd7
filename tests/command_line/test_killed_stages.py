"""Real processes of ``main.py`` that are killed in the middle of a stage, and the same command again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.command_line.conftest import TINY
from token_attribution import host_math

ROOT = Path(__file__).parents[2]
SFT = ["sft", "--model-name", "embedded", "--embedded-model", json.dumps(TINY), "--train-path", "pairs.jsonl"]


FEW = host_math.FEW  # as it is outside of tests


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed here is compared with what a child computes."""
    monkeypatch.setattr(host_math, "FEW", FEW)


def killed_at(words: Sequence[str], metrics: Path, step: int, by: signal.Signals) -> tuple[int, str]:
    """Run a command until ``metrics`` has so many lines, then send it a signal; its exit code and what it printed."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(by)
        out, _ = process.communicate(timeout=60)
    return process.returncode, out


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if "time/" not in k and "tokens_per_second" not in k} for r in records
    ]


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = (dict(mx.load(str(folder / "adapters.safetensors"))) for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not np.array_equal(np.array(mine[name]), np.array(theirs[name]))] == []


def test_a_stage_goes_on_by_its_folder_alone(workplace: Path, command: Callable[..., Any]) -> None:
    words = [*SFT, "--num-steps", "40", "--save-every", "3", "--min-free-gb", "0", "--learning-rate", "1e-2"]
    assert command(*words, "--output-dir", "straight").code == 0
    words = [*words, "--output-dir", "run"]
    code, _ = killed_at(words, workplace / "run" / "metrics.jsonl", 7, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "already holds a run" in command(*words).err
    assert "sft" in command("runs", "list", ".").out
    done = command("sft", "--resume", "run")  # with the config that it began with
    assert done.code == 0, done.err
    assert "going on after step" in done.out
    assert lines(workplace / "run") == lines(workplace / "straight")
    assert_same_weights(workplace / "run" / "final", workplace / "straight" / "final")


@pytest.mark.parametrize(
    ("stage", "by"),
    [
        ("sft", signal.SIGKILL),
        pytest.param("reward_model", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("train", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("sft", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_goes_on_in_the_middle_of_a_stage(
    stage: str, by: signal.Signals, workplace: Path, command: Callable[..., Any]
) -> None:
    text = (
        (workplace / "pipeline.toml")
        .read_text()
        .replace("num_steps = 2\n", "num_steps = 12\nsave_every = 1\n")
    )
    text = text.replace("batch_size = 3\n", "batch_size = 3\nmin_free_gb = 0\n")
    text = text.replace('[evaluate]\nval_path = "prompts.jsonl"\nmax_new_tokens = 6\n[fuse]\n', "")
    (workplace / "killed.toml").write_text(text.replace('"out"', '"killed"'))
    (workplace / "pipeline.toml").write_text(text)
    until = ["--until", stage]
    assert command("pipeline", "--config", "pipeline.toml", *until).code == 0
    words = ["pipeline", "--config", "killed.toml", *until]
    code, out = killed_at(words, workplace / "killed" / stage / "metrics.jsonl", 4, by)
    assert code == (0 if by == signal.SIGTERM else -by), out
    assert not (workplace / "killed" / stage / "final").exists()
    done = command(*words)
    assert done.code == 0, done.err
    assert f"{stage}: interrupted, goes on in killed/{stage}" in done.out.replace("\\", "/")
    assert not (workplace / "killed" / f"{stage}-old-1").exists()
    assert lines(workplace / "killed" / stage) == lines(workplace / "out" / stage)
    assert_same_weights(workplace / "killed" / stage / "final", workplace / "out" / stage / "final")
    again = command(*words)
    assert "interrupted" not in again.out
    assert f"{stage}: done already" in again.out
