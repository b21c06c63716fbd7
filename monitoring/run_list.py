"""The runs in a folder, each read off what it has written: a line for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from monitoring.metrics_file import read_metrics
from monitoring.run_lock import is_running
from monitoring.samples import printable


class RunLine(NamedTuple):
    """One run."""

    folder: Path
    stage: str  # the algorithm of RL, or the stage, as config.json says
    state: str  # running, finished, or stopped
    step: int  # the last one written down
    reward: float | None  # of that step


def list_runs(folder: Path) -> list[RunLine]:
    """Every folder under ``folder`` (and itself) that has a ``metrics.jsonl``, by name."""
    inside = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [_describe(path) for path in [folder, *sorted(inside)] if (path / "metrics.jsonl").is_file()]


def _describe(folder: Path) -> RunLine:
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if "kind" not in record and isinstance(record.get("step"), int)]
    last: dict[str, Any] = steps[-1] if steps else {}
    state = "stopped"
    if is_running(folder):
        state = "running"
    elif (folder / "final").is_dir() or (folder / "model").is_dir():
        state = "finished"
    reward = last.get("reward")
    known = isinstance(reward, (int, float))  # what stands in a file may be anything
    return RunLine(
        folder, printable(_stage(folder)), state, int(last.get("step", 0)), reward if known else None
    )


def _stage(folder: Path) -> str:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "?"
    if not isinstance(content, dict):
        return "?"
    return str(content.get("algorithm") or content.get("stage") or "?")
