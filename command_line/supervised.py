"""``sft`` and ``reward-model``: the supervised stages, from a file of rows to weights that the next stage loads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing.resuming import run_folder_of
from checkpointing.stopping import RunStopped
from command_line.config_options import add_config_options, add_run_options, load
from command_line.explaining import explained
from command_line.parsing import Command, Parser
from command_line.resuming import check_resume, take_run_config
from config.errors import InvalidConfigurationError
from config.supervised_config import RewardModelConfig, SFTConfig

Lines = list[str]


@dataclass(frozen=True)
class Stage:
    """One supervised stage as a command.

    Args:
        kind: of the rows (``data_loading.schemas.Kind``). shown: metric → label on the progress line.
        trainer: (base model, config) → trainer. judge: (trainer, its last metrics, rows held out, run folder) → what
            to say of it. save: (trainer, run folder) → where the result is and what to type next. check: (config,
            rows) → refuses rows that this config cannot learn from, before a weight is loaded. for_rows: (config) → the
            stage that learns from the rows it names, where that is another one.
    """

    name: str
    config: type[Any]
    kind: Any
    shown: dict[str, str]
    trainer: Callable[[Any, Any], Any]
    judge: Callable[[Any, dict[str, Any], Any, Path], Lines]
    save: Callable[[Any, Path], Lines]
    check: Callable[[Any, Any], None] = lambda config, rows: None
    for_rows: Callable[[Any], Stage] | None = None

    def add_options(self, parser: Parser) -> None:
        """Those of a run, and of the config."""
        add_run_options(parser)
        add_config_options(parser, self.config)

    def run(self, options: argparse.Namespace) -> int:
        """Data, plan, training, result; everything that can be refused is refused before a weight is loaded."""
        take_run_config(options, self.config)
        loaded = load(self.config, options)
        if options.explain:
            print(explained(loaded))
            return 0
        stage = self if self.for_rows is None else self.for_rows(loaded.config)
        return stage._run(loaded.config, dry=options.dry_run)

    def _run(self, config: Any, *, dry: bool) -> int:
        from command_line.checks import check_model, check_output, read_rows
        from command_line.plan import supervised_plan
        from monitoring.console import StageConsole
        from monitoring.run_folder import default_folder

        console = StageConsole()
        check_model(config)
        check_resume(config)
        check_output(config.output_dir, goes_on=config.resume is not None)
        data = read_rows(config, self.kind)
        if config.early_stopping_patience is not None and data.validation is None:
            raise InvalidConfigurationError(
                "early_stopping_patience: there are no validation rows to stop by; give val_path, or set "
                "validation_fraction"
            )
        for rows in (data.train, data.validation):
            if rows is not None:
                self.check(config, rows)
        plan = supervised_plan(self.name, config, data, dry=dry)
        if config.verbose or dry:
            print("\n".join(plan), flush=True)
        if dry:
            return 0
        if config.output_dir is None:
            going_on = config.resume is not None
            folder = run_folder_of(config.resume) if going_on else default_folder(self.name)
            config = config.replace(output_dir=str(folder))
        from base_setup.parameters import describe_trainable
        from models.sft_model import load_language_model
        from monitoring.step_log import StageProgress

        trainer = self.trainer(load_language_model(config), config)
        if config.verbose:
            print(describe_trainable(trainer.module), flush=True)
        for line in getattr(trainer, "notes", []):
            console.note(line)
        with console.progress(config.num_steps, self.name) as progress:
            shown = StageProgress(progress, self.shown)
            metrics = trainer.train(data.train, shown, validation=data.validation)
        if "stopped" in metrics:
            raise RunStopped  # it has said where it is saved
        folder = Path(metrics["run_folder"])
        lines = [] if data.validation is None else self.judge(trainer, metrics, data.validation, folder)
        for line in [*lines, *self.save(trainer, folder)]:
            console.note(line)
        return 0


def save_policy(trainer: Any, folder: Path) -> Lines:
    """Write ``final`` (an adapter) or ``model`` (every weight)."""
    from models.sft_model import save_language_model

    if trainer.config.fine_tune_type == "full":
        save_language_model(trainer.language_model, folder / "model")
        return [f"saved: {folder / 'model'}", f"use it: --model-name {folder / 'model'}"]
    trainer.policy.save(folder / "final")
    name = trainer.config.model_name
    if trainer.policy.base.is_altered:  # it has no folder of its own, and an adapter alone is no model
        save_language_model(trainer.policy.base, folder / "final" / "base")
        name = str(folder / "final" / "base")
    use = f"--model-name {name} --adapter-path {folder / 'final'}"
    return [f"saved: {folder / 'final'}", f"use it: {use}"]


# The stages ----------------------------------------------------------------------------------------------


def _sft_trainer(base: Any, config: Any) -> Any:
    from training.sft_trainer import SFTTrainer

    return SFTTrainer(base, config)


def _check_sft(config: Any, rows: Any) -> None:
    from command_line.checks import check_packing

    check_packing(config)


def _judge_sft(trainer: Any, metrics: dict[str, float], rows: Any, folder: Path) -> Lines:
    loss, perplexity = metrics["validation/loss"], metrics["validation/perplexity"]
    return [f"validation loss {loss:.4f} nats per token, perplexity {perplexity:.4g}"]


def _reward_trainer(base: Any, config: Any) -> Any:
    from training.reward_trainer import RewardTrainer

    return RewardTrainer(base, config)


def _judge_reward_model(trainer: Any, metrics: dict[str, float], rows: Any, folder: Path) -> Lines:
    report = trainer.report(rows)
    report.save(folder)
    first = f"validation pairs in the right order: {report.accuracy:.1%}"
    return [first, *str(report).split("\n\n")[0].splitlines()[2:], f"report: {folder / 'reward_report.txt'}"]


def _save_reward_model(trainer: Any, folder: Path) -> Lines:
    trainer.reward_model.save(folder / "final")
    return [f"saved: {folder / 'final'}", f"use it: --reward learned:{folder / 'final'}"]


def _check_reward_model(config: Any, rows: Any) -> None:
    from command_line.checks import check_comparisons

    if name := _first_changed(config, "step_separator", "step_reward"):
        raise InvalidConfigurationError(
            f"{name}: {rows.report.name} has whole answers ({rows.report.schema}), no steps with labels; leave it out"
        )
    check_comparisons(rows)


def _first_changed(config: Any, *names: str) -> str | None:
    """The first of these options that is not at its default. A run that goes on, or a file, may name all of them."""
    options = type(config).__dataclass_fields__
    return next((name for name in names if getattr(config, name) != options[name].default.default), None)


def _process_trainer(base: Any, config: Any) -> Any:
    from training.process_reward_trainer import ProcessRewardTrainer

    return ProcessRewardTrainer(base, config)


def _judge_steps(trainer: Any, metrics: dict[str, float], rows: Any, folder: Path) -> Lines:
    loss, accuracy = metrics["validation/loss"], metrics["validation/accuracy"]
    return [f"validation loss {loss:.4f} (0.6931 is a coin toss), {accuracy:.1%} of the steps judged rightly"]


def _save_process_model(trainer: Any, folder: Path) -> Lines:
    trainer.model.save(folder / "final")
    return [
        f"saved: {folder / 'final'}, a process reward model; an answer scores the {trainer.model.step_reward} of its "
        "steps",
        f"use it: --reward learned:{folder / 'final'}",
    ]


def _check_process_model(config: Any, rows: Any) -> None:
    if name := _first_changed(config, "pairing", "list_size", "margin_scale", "centering"):
        raise InvalidConfigurationError(
            f"{name}: {rows.report.name} has steps with labels, which are not compared; leave it out"
        )


def _by_rows(config: Any) -> Stage:
    """Steps where the file has them, else whole answers."""
    from data_loading.loading import has_steps

    named = config.train_path is not None or config.dataset_name is not None
    return PROCESS_REWARD_STAGE if named and has_steps(config) else REWARD_MODEL_STAGE


SFT_STAGE = Stage(
    "sft", SFTConfig, "pairs", {"loss": "loss"}, _sft_trainer, _judge_sft, save_policy, _check_sft
)
REWARD_MODEL_STAGE = Stage(
    "reward-model",
    RewardModelConfig,
    "preferences",
    {"loss": "loss", "accuracy": "accuracy"},
    _reward_trainer,
    _judge_reward_model,
    _save_reward_model,
    _check_reward_model,
    _by_rows,
)
PROCESS_REWARD_STAGE = Stage(
    "reward-model",
    RewardModelConfig,
    "steps",
    {"loss": "loss", "accuracy": "accuracy"},
    _process_trainer,
    _judge_steps,
    _save_process_model,
    _check_process_model,
)


def run_sft(options: argparse.Namespace) -> int:
    """Fine-tune on demonstrations."""
    if ("reward_model", True) in options.overrides:  # sft.py of mlx-rlhf trains either, by this switch
        return REWARD_MODEL_STAGE.run(options)
    return SFT_STAGE.run(options)


SFT = Command(
    "sft",
    "supervised fine-tuning on prompts with demonstrated answers",
    SFT_STAGE.add_options,
    run_sft,
    [
        "sft --model-name embedded --train-path pairs.jsonl --num-steps 5 --learning-rate 1e-3",
        "sft --model-name embedded --train-path pairs.jsonl --fine-tune-type full --dry-run",
    ],
)
REWARD_MODEL = Command(
    "reward-model",
    "learn a reward model from pairs or lists of answers, from answers with scores, or from steps with labels",
    REWARD_MODEL_STAGE.add_options,
    REWARD_MODEL_STAGE.run,
    [
        "reward-model --model-name embedded --train-path preferences.jsonl --num-steps 5 --batch-size 2",
        "reward-model --model-name embedded --train-path preferences.jsonl --validation-fraction 0.3 --dry-run",
    ],
)
