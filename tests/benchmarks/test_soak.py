"""The soak itself, short: kills at random moments, and a planted difference that it must see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.soak import Soak, _start, mismatches


@pytest.mark.slow
def test_a_run_that_is_killed_five_times_is_the_run_that_was_not(tmp_path: Path) -> None:
    assert _start(tmp_path / "whole", 30, "grpo").wait() == 0
    soak = Soak(tmp_path / "killed", 30, "grpo", seed=1, longest=0.3)
    assert soak.run(kills=5, seconds=300)
    assert (soak.lost, soak.damaged, mismatches(tmp_path / "whole", tmp_path / "killed")) == (0, 0, 0)
    assert soak.kills > 0
    assert soak.resumes + soak.anew >= soak.kills  # what follows a kill begins from a checkpoint, or anew


def test_a_difference_is_counted(tmp_path: Path) -> None:
    for name, rewards in (("a", [0.1, 0.2]), ("b", [0.1, 0.3, 0.3])):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "final" / "adapters.safetensors").write_bytes(name.encode())
        lines = [
            json.dumps({"step": i, "reward": r, "time/update": i * len(name)}) for i, r in enumerate(rewards)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / name / "samples.jsonl").write_text("")
    assert (
        mismatches(tmp_path / "a", tmp_path / "b") == 3
    )  # one line differs, one is too many, the weights differ
    assert mismatches(tmp_path / "a", tmp_path / "a") == 0
