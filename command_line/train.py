"""``train``: reinforcement learning from a config, a file of prompts and rewards by name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.config_options import add_config_options, add_override, add_run_options, load
from command_line.explaining import explained, resolved
from command_line.parsing import Command, Parser
from config.loader import Loaded
from config.ppo_config import PPOConfig

if TYPE_CHECKING:
    from data_loading.loading import DataSplits
    from rewards.composition import RewardSet


class _Reward(argparse.Action):
    """``--reward NAME[=WEIGHT]``; all of them together are the config's ``rewards``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        name, equals, weight = values.rpartition("=")
        try:
            entry = {"name": name, "weight": float(weight)} if equals else values
        except ValueError:
            raise argparse.ArgumentError(self, f"NAME=NUMBER is expected, found {values!r}") from None
        namespace.reward = [*(getattr(namespace, "reward", None) or []), entry]


def add_reward_option(parser: Parser) -> None:
    """Rewards by name, without a file."""
    parser.add_argument(
        "--reward",
        action=_Reward,
        metavar="NAME[=WEIGHT]",
        help="a registered reward, module:function, file.py:function or learned:FOLDER; repeatable; in place of those "
        "of the config (rewards list shows the names)",
    )


def take_rewards(options: argparse.Namespace) -> None:
    """Make what ``--reward`` said an override of the config's ``rewards``."""
    if options.reward:
        add_override(options, "rewards", options.reward)


def _options(parser: Parser) -> None:
    add_run_options(parser, resumes=True)
    add_reward_option(parser)
    add_config_options(parser, PPOConfig)


def take_run_config(options: argparse.Namespace) -> None:
    """``--resume`` without a config takes the one that the run has written down, below what else is said here."""
    said = dict(options.overrides)
    resume = said.get("resume")
    if resume is None or options.config or options.preset or options.from_system:
        return
    from command_line.checkpoints import Checkpoint, check_written_rewards, written_down
    from ppo_trainer.resuming import LATEST, run_folder_of

    where = said.get("output_dir") if resume == LATEST else resume
    if where is None:
        return
    folder = run_folder_of(where) if Path(where).expanduser().is_dir() else Path(where)
    config, _ = written_down(folder / "config.json")
    if config:
        if "rewards" not in said:
            check_written_rewards(Checkpoint(folder, True, config, {}), config.get("rewards"), "--resume")
        config["output_dir"] = str(folder)
        taken = [(name, value) for name, value in config.items() if name not in ("resume", "resume_fallback")]
        options.overrides = [*taken, *options.overrides]


def run(options: argparse.Namespace) -> int:
    """Check everything, say what will happen, train, say where the result is."""
    take_rewards(options)
    take_run_config(options)
    loaded = load(PPOConfig, options)
    if options.explain:
        print(explained(loaded))
        return 0
    config, rewards, data = _checked(loaded, own_prompts=options.from_system == "mlx-rlhf")
    from command_line.plan import training_plan

    plan = training_plan(config, data, rewards, dry=options.dry_run)
    if config.verbose or options.dry_run:
        print("\n".join(plan), flush=True)
    return 0 if options.dry_run else _train(config, data)


def _checked(loaded: Loaded[PPOConfig], *, own_prompts: bool) -> tuple[PPOConfig, RewardSet, DataSplits]:
    """The resolved config, its rewards and its rows, or a refusal before a weight is loaded.

    Args:
        own_prompts: without data, and with the score of the digit task, take that task's prompts.
    """
    from command_line.checks import check_model, check_output, digit_rows, read_rows
    from ppo_trainer.reference import check_reference_path
    from ppo_trainer.resuming import find_resume
    from ppo_trainer.reward_sources import build_rewards

    config, _ = resolved(loaded)
    check_model(config)
    check_reference_path(config)
    if config.resume is not None:
        output = Path(config.output_dir).expanduser() if config.output_dir else None
        find_resume(config.resume, output, fallback=config.resume_fallback)
    check_output(config.output_dir, goes_on=config.resume is not None)
    rewards = build_rewards(config.rewards or "well_formed", config)
    if own_prompts and not (config.train_path or config.dataset_name) and "digits" in str(config.rewards):
        return config, rewards, digit_rows(config)
    return config, rewards, read_rows(config, "prompts")


def _train(config: PPOConfig, data: DataSplits) -> int:
    from command_line.plan import steps_of
    from monitoring.console import StageConsole
    from monitoring.step_log import StepProgress
    from ppo_trainer.ppo_trainer import PPOTrainer

    console = StageConsole()
    trainer = PPOTrainer(config.replace(verbose=False))  # the progress line stands for the line per epoch
    say = console.note if config.verbose else lambda text: None
    if data.validation is not None and config.resume is None:
        say(_judged("before", trainer.evaluate(data.validation)))
    if config.verbose:
        with console.progress(steps_of(config, data), config.algorithm) as progress:
            result = trainer.train(data.train, callbacks=[StepProgress(progress)])
    else:
        result = trainer.train(data.train)
    if "stopped" in result:
        return 0  # it has said where it is saved
    if data.validation is not None:
        say(_judged("after", trainer.evaluate(data.validation)))
    folder = result["run_folder"]
    say(f"reward {result['avg_reward']:.3f} in the last epoch; metrics, samples and weights are in {folder}")
    say(f"judge it: python main.py evaluate --checkpoint {folder} --val-path FILE")
    return 0


def _judged(when: str, metrics: Mapping[str, Any]) -> str:
    parts = [f"validation {when}: reward {metrics['avg_reward']:.3f}"]
    if "objective/kl" in metrics:
        parts.append(f"kl {metrics['objective/kl']:.3g}")
    parts.append(f"length {metrics['completions/mean_length']:.3g}")
    return "  ".join(parts)


TRAIN = Command(
    "train",
    "reinforcement learning: PPO, GRPO and their family",
    _options,
    run,
    [
        "train --model-name embedded --train-path prompts.jsonl --reward well_formed --num-steps 2 --max-new-tokens 8",
        "train --config run.yaml --algorithm grpo --group-size 4 --dry-run",
    ],
)
