"""From nothing but a data file to a trained and judged model, by typing what each command says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_from_a_data_file_to_a_judged_model(workplace: Path, command: Callable[..., Any]) -> None:
    made = command(
        *("generate-config", "--model-path", "embedded", "--data-path", "pairs.jsonl"),
        *("--template", "minimal", "--output", "mine.yaml"),
    )
    assert made.code == 0, made.err
    assert "next:    python main.py train --config mine.yaml --dry-run" in made.out

    checked = command("data", "check", "pairs.jsonl")
    assert checked.code == 0, checked.err
    assert "12" in checked.out

    short = ["--num-steps", "2", "--max-new-tokens", "6", "--output-dir", "runs/mine", "--batch-size", "2"]
    planned = command("train", "--config", "mine.yaml", *short, "--dry-run")
    assert planned.code == 0, planned.err
    assert "12 prompts of" in planned.out
    assert "peak" in planned.out
    assert not (workplace / "runs").exists()

    trained = command("train", "--config", "mine.yaml", *short)
    assert trained.code == 0, trained.err
    assert (workplace / "runs/mine/final/adapters.safetensors").is_file()
    assert len((workplace / "runs/mine/metrics.jsonl").read_text().splitlines()) >= 2

    judged = command(
        "evaluate", "--config", "mine.yaml", "--checkpoint", "runs/mine", "--val-path", "prompts.jsonl"
    )
    assert judged.code == 0, judged.err
    results = json.loads((workplace / "eval_outputs/mine.json").read_text())
    assert len(results["validation"]["samples"]) == 6
    assert results["validation"]["reward"] == results["validation"]["avg_reward"]
