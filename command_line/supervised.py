"""``sft`` and ``reward-model``: the supervised stages, from a file of rows to weights that the next stage loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.config_options import add_config_options, add_run_options, load
from command_line.explaining import explained
from command_line.parsing import Command, Parser
from config.supervised_config import RewardModelConfig, SFTConfig

if TYPE_CHECKING:
    from models.sft_model import LanguageModel


def _sft_options(parser: Parser) -> None:
    add_run_options(parser)
    add_config_options(parser, SFTConfig)


def _reward_model_options(parser: Parser) -> None:
    add_run_options(parser)
    add_config_options(parser, RewardModelConfig)


def run_sft(options: argparse.Namespace) -> int:
    """Fine-tune on demonstrations; the run folder holds ``final`` (an adapter) or ``model`` (every weight)."""
    if ("reward_model", True) in options.overrides:  # sft.py of mlx-rlhf trains either, by this switch
        return run_reward_model(options)
    loaded = load(SFTConfig, options)
    if options.explain:
        print(explained(loaded))
        return 0
    return _Stage("sft", loaded.config, "pairs", {"loss": "loss"}).run(dry=options.dry_run)


def run_reward_model(options: argparse.Namespace) -> int:
    """Learn a reward from preferences; the run folder's ``final`` is what ``--reward learned:FOLDER`` names."""
    loaded = load(RewardModelConfig, options)
    if options.explain:
        print(explained(loaded))
        return 0
    shown = {"loss": "loss", "accuracy": "accuracy"}
    return _Stage("reward-model", loaded.config, "preferences", shown).run(dry=options.dry_run)


class _Stage:
    """One supervised run: data, plan, training, result."""

    def __init__(self, name: str, config: Any, kind: Any, shown: dict[str, str]) -> None:
        self.name = name
        self.config = config
        self.kind = kind
        self.shown = shown

    def run(self, *, dry: bool) -> int:
        """Everything that can be refused is refused before a weight is loaded."""
        from command_line.checks import check_model, check_output, read_rows
        from command_line.plan import supervised_plan
        from monitoring.console import StageConsole
        from monitoring.run_folder import default_folder, prepare_folder, write_json

        config, console = self.config, StageConsole()
        check_model(config)
        check_output(config.output_dir)
        data = read_rows(config, self.kind)
        plan = supervised_plan(self.name, config, data, dry=dry)
        if config.verbose or dry:
            print("\n".join(plan), flush=True)
        if dry:
            return 0
        folder = prepare_folder(config.output_dir or default_folder(self.name))
        write_json(folder / "config.json", {"config": config.as_dict(), "stage": self.name})
        trainer = self._trainer()
        from monitoring.step_log import StepLog

        with console.progress(config.num_steps, self.name) as progress:
            trainer.train(data.train, StepLog(folder / "metrics.jsonl", progress, self.shown))
        for line in self._judge(trainer, data.validation):
            console.note(line)
        for line in self._save(trainer, folder):
            console.note(line)
        return 0

    def _trainer(self) -> Any:
        from models.sft_model import load_language_model
        from training.reward_trainer import RewardTrainer
        from training.sft_trainer import SFTTrainer

        base: LanguageModel = load_language_model(self.config)
        return (SFTTrainer if self.kind == "pairs" else RewardTrainer)(base, self.config)

    def _judge(self, trainer: Any, rows: Any) -> list[str]:
        if rows is None:
            return []
        if self.kind == "pairs":
            return [f"validation loss {trainer.loss(rows):.4f} nats per token"]
        return [f"validation pairs in the right order: {trainer.accuracy(rows):.1%}"]

    def _save(self, trainer: Any, folder: Path) -> list[str]:
        """Write the result; returns what to type next."""
        from models.sft_model import save_language_model

        if self.kind == "preferences":
            trainer.reward_model.save(folder / "final")
            return [f"saved: {folder / 'final'}", f"use it: --reward learned:{folder / 'final'}"]
        if self.config.fine_tune_type == "full":
            save_language_model(trainer.language_model, folder / "model")
            return [f"saved: {folder / 'model'}", f"use it: --model-name {folder / 'model'}"]
        trainer.policy.save(folder / "final")
        name = self.config.model_name
        if trainer.policy.base.is_altered:  # it has no folder of its own, and an adapter alone is no model
            save_language_model(trainer.policy.base, folder / "final" / "base")
            name = str(folder / "final" / "base")
        use = f"--model-name {name} --adapter-path {folder / 'final'}"
        return [f"saved: {folder / 'final'}", f"use it: {use}"]


SFT = Command(
    "sft",
    "supervised fine-tuning on prompts with demonstrated answers",
    _sft_options,
    run_sft,
    [
        "sft --model-name embedded --train-path pairs.jsonl --num-steps 5 --learning-rate 1e-3",
        "sft --model-name embedded --train-path pairs.jsonl --fine-tune-type full --dry-run",
    ],
)
REWARD_MODEL = Command(
    "reward-model",
    "learn a reward model from pairs of answers, or from answers with scores",
    _reward_model_options,
    run_reward_model,
    [
        "reward-model --model-name embedded --train-path preferences.jsonl --num-steps 5 --batch-size 2",
        "reward-model --model-name embedded --train-path preferences.jsonl --validation-fraction 0.3 --dry-run",
    ],
)
