"""``evaluate``: trained weights on validation prompts with their reward, and on benchmarks read from local files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.config_options import add_config_options, add_log_level, load
from command_line.explaining import resolved
from command_line.parsing import Command, Parser, one_of
from command_line.train import add_reward_option, take_rewards
from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig

if TYPE_CHECKING:
    from command_line.checkpoints import Checkpoint
    from models.policy_model import PolicyModel

BENCHMARKS = ("human_eval", "mbpp", "gsm8k", "arc", "perplexity")


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run folder, an adapter or a model"
    )
    parser.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        default=[],
        type=one_of(BENCHMARKS),
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)}; each needs its --benchmark-data",
    )
    parser.add_argument(
        "--benchmark-data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="the local file with the rows of a benchmark; nothing is downloaded; repeatable",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many rows of each benchmark")
    parser.add_argument(
        "--output-dir",
        default="eval_outputs",
        metavar="FOLDER",
        help="where results go (default eval_outputs)",
    )
    add_log_level(parser)
    add_reward_option(parser)
    add_config_options(parser, PPOConfig, leave_out=("output_dir",))


def run(options: argparse.Namespace) -> int:
    """Print the numbers and write them down with the answers they come from."""
    take_rewards(options)
    loaded = load(PPOConfig, options)
    from command_line.benchmarks import check_benchmarks
    from command_line.checkpoints import check_written_rewards, find_checkpoint
    from command_line.checks import check_model

    benchmarks = check_benchmarks(options.benchmark, options.benchmark_data, options.limit)
    checkpoint = find_checkpoint(options.checkpoint)
    if not loaded.config.rewards:
        check_written_rewards(checkpoint, checkpoint.config.get("rewards") or checkpoint.rewards)
    config, _ = resolved(loaded, _with_what_was_trained(loaded.config, checkpoint))
    check_model(config)
    rows = _validation_rows(config, needed=not benchmarks)
    rewards = _rewards(config, checkpoint) if rows is not None else None
    output = _output_file(options.output_dir, options.checkpoint)

    policy, reference = _models(config, checkpoint)
    results: dict[str, Any] = {"checkpoint": str(checkpoint.folder), "model": config.model_name}
    if rows is not None:
        results["validation"] = _validate(config, policy, reference, rewards, rows)
    for benchmark in benchmarks:
        results[benchmark.name] = benchmark.run(policy, config)
        _show(benchmark.name, results[benchmark.name])
    output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {output}")
    return 0


def _with_what_was_trained(given: PPOConfig, checkpoint: Checkpoint) -> PPOConfig:
    """Files and flags first, then what the run wrote down, then the defaults."""
    written = dict(checkpoint.config)
    if given.was_set("rewards"):
        written.pop("reward_weights", None)  # they are of the run's own rewards
    config = given.with_defaults(written)
    return config if checkpoint.is_adapter else config.replace(model_name=str(checkpoint.folder))


def _validation_rows(config: PPOConfig, *, needed: bool) -> Any:
    from data_loading.loading import load_data, load_prompts

    if config.val_path is not None:  # max_samples is about rows to train on
        return load_prompts(config.val_path, config.replace(max_samples=None), split="valid")
    rows = None
    if config.train_path is not None or config.dataset_name is not None:
        rows = load_data(config, "prompts").validation
    if rows is None and needed:
        raise InvalidConfigurationError(
            "val_path: no validation prompts are named; give --val-path FILE, or the --validation-fraction that the "
            "run was trained with, or a --benchmark"
        )
    return rows


def _rewards(config: PPOConfig, checkpoint: Checkpoint) -> Any:
    """What to judge by: the config's rewards, else those that the run wrote down; nothing is loaded yet."""
    from ppo_trainer.reward_sources import build_rewards

    if config.rewards:
        build_rewards(config.rewards, config)
        return config.rewards
    asked: Any = checkpoint.rewards or "well_formed"
    try:
        build_rewards(asked, config.replace(reward_weights=None))
    except InvalidConfigurationError as error:
        raise InvalidConfigurationError(
            f"rewards: the run was trained with {', '.join(checkpoint.rewards)}, of which one cannot be found by its "
            f"name; give it with --reward FILE.py:NAME ({error})"
        ) from error
    return asked


def _output_file(folder: str, checkpoint: str) -> Path:
    from monitoring.run_folder import writable_folder

    name = Path(checkpoint).expanduser().absolute().name
    path = writable_folder(folder, "--output-dir") / f"{name}.json"
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}.json")
    return path


def _models(config: PPOConfig, checkpoint: Checkpoint) -> tuple[PolicyModel, Any]:
    """The policy as trained, and the model that its training began with; None where that is not known."""
    from models.policy_model import PolicyModel
    from models.sft_model import load_language_model

    base = load_language_model(config)
    if not checkpoint.is_adapter:
        return PolicyModel(base, config), None
    reference = PolicyModel(base, config).frozen_copy()
    return PolicyModel(base, config.replace(adapter_path=str(checkpoint.folder))), reference


def _validate(
    config: PPOConfig, policy: PolicyModel, reference: Any, rewards: Any, rows: Any
) -> dict[str, Any]:
    from data_loading.prepared_prompts import PreparedPrompts
    from ppo_trainer.evaluator import Evaluator
    from ppo_trainer.generator import Generator
    from ppo_trainer.reward_sources import build_rewards

    prompts = PreparedPrompts(
        policy.tokenizer,
        rows,
        max_prompt_length=config.max_prompt_length,
        overflow=config.prompt_overflow,
        on_bad_row=config.on_bad_row,
    )
    if str(prompts.fitting):
        print(prompts.fitting)
    weights = config.reward_weights if config.rewards else None
    judges = build_rewards(rewards, config.replace(reward_weights=weights), policy.base)
    metrics = Evaluator(Generator(policy, config), judges, reference, config).evaluate(prompts)
    _show("validation", metrics)
    return metrics


def _show(name: str, metrics: dict[str, Any]) -> None:
    print(name)
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and key != "avg_reward":
            print(f"  {key:36s}{value:10.4g}")


EVALUATE = Command(
    "evaluate",
    "judge a run, an adapter or a model by its reward on validation prompts, and by benchmarks",
    _options,
    run,
    [
        "evaluate --config run.yaml --checkpoint runs/digits --val-path prompts.jsonl",
        "evaluate --checkpoint runs/digits --benchmark perplexity --benchmark-data perplexity=pairs.jsonl",
    ],
)
