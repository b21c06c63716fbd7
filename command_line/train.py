"""``train``: reinforcement learning from a config, a file of prompts and rewards by name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from command_line.config_options import add_config_options, add_override, add_run_options, load
from command_line.explaining import explained, resolved
from command_line.parsing import Command, Parser
from config.ppo_config import PPOConfig


class _Reward(argparse.Action):
    """``--reward NAME[=WEIGHT]``; all of them together are the config's ``rewards``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        name, equals, weight = values.rpartition("=")
        try:
            entry = {"name": name, "weight": float(weight)} if equals else {"name": values}
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
    add_run_options(parser)
    add_reward_option(parser)
    add_config_options(parser, PPOConfig)


def run(options: argparse.Namespace) -> int:
    """Check everything, say what will happen, train, say where the result is."""
    take_rewards(options)
    loaded = load(PPOConfig, options)
    if options.explain:
        print(explained(loaded))
        return 0
    return train(resolved(loaded.config)[0], dry=options.dry_run)


def train(config: PPOConfig, *, dry: bool) -> int:
    """One run of a resolved config."""
    from command_line.plan import check_model, check_output, read_rows, training_plan
    from ppo_trainer.reference import check_reference_path
    from rewards.composition import RewardSet

    check_model(config)
    check_reference_path(config)
    check_output(config.output_dir)
    rewards = RewardSet.build(config.rewards or "well_formed", config.reward_weights)
    data = read_rows(config, "prompts")
    plan = training_plan(config, data, rewards, dry)
    if config.verbose or dry:
        print("\n".join(plan), flush=True)
    if dry:
        return 0
    from monitoring.console import StageConsole
    from monitoring.step_log import StepProgress
    from ppo_trainer.ppo_trainer import PPOTrainer

    console = StageConsole()
    trainer = PPOTrainer(config.replace(verbose=False))
    if data.validation is not None:
        _report(console, "before", trainer.evaluate(data.validation))
    total = config.num_epochs * -(-len(data.train) // config.batch_size)
    with console.progress(total, config.algorithm) as progress:
        result = trainer.train(data.train, num_epochs=config.num_epochs, callbacks=[StepProgress(progress)])
    if data.validation is not None:
        _report(console, "after", trainer.evaluate(data.validation))
    folder = result["run_folder"]
    console.note(
        f"reward {result['avg_reward']:.3f} in the last epoch; metrics, samples and weights are in {folder}"
    )
    console.note(f"judge it: python main.py evaluate --checkpoint {folder} --val-path FILE")
    return 0


def _report(console: Any, when: str, metrics: Mapping[str, Any]) -> None:
    parts = [f"validation {when}: reward {metrics['avg_reward']:.3f}"]
    if "objective/kl" in metrics:
        parts.append(f"kl {metrics['objective/kl']:.3g}")
    parts.append(f"length {metrics['completions/mean_length']:.3g}")
    console.note("  ".join(parts))


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
