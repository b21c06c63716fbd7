"""``data check``: what is in a file, before a run finds out."""

from __future__ import annotations

import argparse

from command_line.parsing import Command, Parser, one_of
from config.errors import InvalidConfigurationError

COLUMNS = (
    *("prompt", "completion", "chosen", "rejected", "reward", "messages", "text"),
    *("completions", "rewards", "steps", "labels"),
)


def _options(parser: Parser) -> None:
    parser.usage = "%(prog)s check FILE [OPTIONS]"
    parser.add_argument("action", type=one_of(["check"]), metavar="check", help="the one thing to do so far")
    parser.add_argument(
        "file", metavar="FILE", help="a .jsonl, .json, .csv, .parquet or .npy file or prefix, a folder"
    )
    parser.add_argument(
        "--against", metavar="FILE", help="count the prompts that are in this file, too (leaks)"
    )
    parser.add_argument("--model-name", metavar="NAME", help="count tokens with this model's tokenizer")
    for column in COLUMNS:
        parser.add_argument(
            f"--{column}-column", metavar="NAME", help=f"the column with the {column} (default {column})"
        )


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 where a row cannot be used."""
    from config.training_config import TrainingConfig
    from data_loading.checking import check_file

    named = {f"{column}_column": getattr(options, f"{column}_column") for column in COLUMNS}
    given = {name: value for name, value in named.items() if value is not None}
    if options.model_name == "":
        raise InvalidConfigurationError("--model-name: it is empty; name a model, or leave it out")
    config = TrainingConfig(**given, **({"model_name": options.model_name} if options.model_name else {}))
    tokenizer = None
    if options.model_name:
        from command_line.checks import check_model, load_tokenizer

        check_model(config)
        tokenizer = load_tokenizer(config)
    report = check_file(options.file, config, tokenizer=tokenizer, against=options.against)
    print(report)
    return 0 if report.ok else 1


DATA = Command(
    "data",
    "check a data file: counts, schema, lengths, duplicates, leaks, bad rows",
    _options,
    run,
    ["data check prompts.jsonl", "data check pairs.jsonl --against prompts.jsonl --model-name embedded"],
)
