"""``preprocess``: rows to JSONL, or to token files that training maps into memory."""

from __future__ import annotations

import argparse

from command_line.config_options import add_config_options, add_log_level, load
from command_line.parsing import Command, Parser, one_of
from config.ppo_config import PPOConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from config.training_config import TrainingConfig

#: What rows are for, and the config of the stage that reads them: its files are read without a word on the others.
KINDS: dict[str, type[TrainingConfig]] = {
    "prompts": PPOConfig,
    "pairs": SFTConfig,
    "preferences": RewardModelConfig,
    "steps": RewardModelConfig,
}


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--output-train-path",
        required=True,
        metavar="PATH",
        help="a file ending in .jsonl or .json, or the prefix of .npy files",
    )
    parser.add_argument("--output-val-path", metavar="PATH", help="the same for the validation rows")
    parser.add_argument(
        "--kind",
        type=one_of(KINDS),
        default="prompts",
        metavar="KIND",
        help="what the rows are for: prompts (train; keeps every column), pairs (sft), preferences or steps "
        "(reward-model, JSONL alone); default prompts",
    )
    add_log_level(parser)
    add_config_options(parser, TrainingConfig)


def run(options: argparse.Namespace) -> int:
    """Write the files and say what is in them."""
    config = load(KINDS[options.kind], options).config
    from command_line.checks import check_model, load_tokenizer
    from data_loading.preprocessing import preprocess

    check_model(config)
    tokenizer = load_tokenizer(config)
    train, validation = options.output_train_path, options.output_val_path
    print(preprocess(config, train, validation, tokenizer=tokenizer, kind=options.kind))
    return 0


PREPROCESS = Command(
    "preprocess",
    "write a config's rows as JSONL, or tokenised once as NPY",
    _options,
    run,
    [
        "preprocess --config run.yaml --output-train-path clean.jsonl",
        "preprocess --model-name embedded --train-path pairs.jsonl --output-train-path tokens/train",
    ],
)
