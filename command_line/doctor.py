"""``doctor``: a few steps of a run in a temporary folder, and what a run can have wrong with it looked at."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from command_line.config_options import add_config_options, add_log_level, load
from command_line.explaining import resolved
from command_line.parsing import Command, Parser
from command_line.train import add_reward_option, take_rewards
from config.ppo_config import PPOConfig

if TYPE_CHECKING:
    from diagnosis.findings import Finding


def _options(parser: Parser) -> None:
    add_reward_option(parser)
    add_config_options(parser, PPOConfig)
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    """Print a line for each check; 1 where one found a fault."""
    take_rewards(options)
    loaded = load(PPOConfig, options)
    asked = loaded.config.with_defaults({"model_name": "embedded"})  # no model is named: none is downloaded
    from command_line.checks import check_model
    from ppo_trainer.reference import check_reference_path
    from ppo_trainer.reward_sources import build_rewards

    config, _ = resolved(loaded, asked)
    check_model(config)
    check_reference_path(config)
    build_rewards(config.rewards or "well_formed", config)
    rows = _rows(config)

    from diagnosis.examination import examine
    from diagnosis.findings import summary

    started = time.perf_counter()
    print(
        f"{config.algorithm} on {config.model_name}, {config.fine_tune_type}, seed {config.seed}: a few steps in a "
        "temporary folder",
        flush=True,
    )
    findings = examine(config, rows, _show)
    print(summary(findings, time.perf_counter() - started))
    return 1 if any(finding.verdict == "fault" for finding in findings) else 0


def _rows(config: PPOConfig) -> Sequence[Any]:
    """The run's own prompts, or some of the doctor's where no data are named."""
    from command_line.checks import read_rows
    from diagnosis.examination import OWN_PROMPTS

    if config.train_path is None and config.dataset_name is None:
        return OWN_PROMPTS
    return read_rows(config, "prompts").train


def _show(finding: Finding) -> None:
    from diagnosis.findings import as_lines

    print("\n".join(as_lines(finding)), flush=True)


DOCTOR = Command(
    "doctor",
    "train a few seconds on a run's own model, data and reward, and say what is wrong with it",
    _options,
    run,
    [
        "doctor --algorithm grpo --group-size 4",
        "doctor --config run.yaml",
    ],
)
