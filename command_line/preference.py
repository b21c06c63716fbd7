"""``preference``: DPO, IPO, SimPO, ORPO, KTO and CPO, from a file of preferences to a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_line.parsing import Command
from command_line.supervised import Lines, Stage, save_policy
from config.supervised_config import PreferenceConfig


def _trainer(base: Any, config: Any) -> Any:
    from training.preference_trainer import PreferenceTrainer

    return PreferenceTrainer(base, config)


def _check(config: Any, rows: Any) -> None:
    from command_line.checks import check_preferences

    check_preferences(config, rows)


def _judge(trainer: Any, metrics: dict[str, float], rows: Any, folder: Path) -> Lines:
    loss, accuracy, margin = (metrics[f"validation/{name}"] for name in ("loss", "accuracy", "margin"))
    return [
        f"validation loss {loss:.4f}, {accuracy:.1%} of the rows in the right order, margin {margin:+.3f}"
    ]


STAGE = Stage(
    "preference",
    PreferenceConfig,
    "preferences",
    {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
    _trainer,
    _judge,
    save_policy,
    _check,
)
PREFERENCE = Command(
    "preference",
    "learn from preferences without RL: DPO, IPO, SimPO, ORPO, KTO, CPO",
    STAGE.add_options,
    STAGE.run,
    [
        "preference --model-name embedded --train-path preferences.jsonl --num-steps 5 --batch-size 2",
        "preference --model-name embedded --train-path preferences.jsonl --algorithm simpo --dry-run",
    ],
)
