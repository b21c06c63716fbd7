"""The README tells the truth: its sample runs, its tree and its links are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_sample_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 3 epochs in place of 40; the first one's reward is that of a model that knows nothing."""
    monkeypatch.chdir(tmp_path)
    sample = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert "num_epochs=40" in sample
    space: dict[str, Any] = {}
    exec(sample.replace("num_epochs=40", "num_epochs=3"), space)
    assert len(capsys.readouterr().out.splitlines()) >= 4  # a line per epoch, and the completion
    assert space["trainer"].algorithm.name == "grpo"
    assert list(tmp_path.glob("runs/grpo-*/final/adapters.safetensors"))


def test_every_path_of_the_tree_and_every_link_exists() -> None:
    tree = re.findall(r"^([a-z_]+/|main\.py)\s{2,}", README, re.MULTILINE)
    assert len(tree) == 21
    linked = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    named = re.findall(r"`((?:docs|tests|examples|rewards|config|ppo_trainer|benchmarks)/[\w./]+)`", README)
    for path in (*tree, *linked, *named):
        assert (ROOT / path).exists(), path


def test_the_table_is_within_what_is_claimed() -> None:
    worst = re.search(r"\| worst \|.*\*\*([\d.]+)\*\* \|.*\*\*([\d.]+)\*\* \|", README)
    seconds = re.search(r"^Seed 0 took (\d+) seconds", README, re.MULTILINE)
    assert worst is not None
    assert seconds is not None
    ppo, grpo = (float(x) for x in worst.groups())
    assert ppo >= 0.8
    assert grpo >= 0.9
    assert int(seconds[1]) < 120
