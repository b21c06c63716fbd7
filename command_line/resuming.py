"""``--resume`` of the commands that train: the config that the run has written down, and an early look for damage."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from checkpointing.resuming import LATEST, find_resume, run_folder_of
from config.declaration import Declaration
from config.training_config import TrainingConfig


def take_run_config(options: argparse.Namespace, cls: type[Declaration]) -> None:
    """``--resume`` without a config takes the one that the run has written down, below what else is said here."""
    said = dict(options.overrides)
    resume = said.get("resume")
    if resume is None or options.config or options.preset or options.from_system:
        return
    where = said.get("output_dir") if resume == LATEST else resume
    if where is None:
        return
    folder = run_folder_of(where) if Path(where).expanduser().is_dir() else Path(where)
    config = _written_down(folder / "config.json", cls)
    if config:
        if config.get("rewards") and "rewards" not in said:
            from command_line.checkpoints import Checkpoint, check_written_rewards

            check_written_rewards(Checkpoint(folder, True, config, {}), config["rewards"], "--resume")
        config["output_dir"] = str(folder)
        taken = [(name, value) for name, value in config.items() if name not in ("resume", "resume_fallback")]
        options.overrides = [*taken, *options.overrides]


def check_resume(config: TrainingConfig) -> None:
    """Refuse what cannot be gone on from, before a weight is loaded."""
    if config.resume is not None:
        output = Path(config.output_dir).expanduser() if config.output_dir else None
        find_resume(config.resume, output, fallback=config.resume_fallback)


def _written_down(path: Path, cls: type[Declaration]) -> dict[str, Any]:
    """The config in a run's ``config.json``; empty where there is none that can be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        mine = cls.__dataclass_fields__.keys() - {"trust_remote_code"}  # type: ignore[attr-defined]
        return {name: value for name, value in config.items() if name in mine}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
