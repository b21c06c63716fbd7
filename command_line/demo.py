"""``python main.py`` without a command: the demo, or the memory estimate of a run that is not started."""

from __future__ import annotations

import argparse

from command_line.parsing import Parser, count
from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig

#: Options of a dry run that are a number, and the field that each sets.
DRY_RUN_NUMBERS = {
    "--batch-size": "batch_size",
    "--group-size": "group_size",
    "--micro-batch-size": "micro_batch_size",
    "--prompt-length": "max_prompt_length",
    "--max-new-tokens": "max_new_tokens",
    "--optimizer-bits": "optimizer_bits",
    "--max-memory-gb": "max_memory_gb",
}


def build_parser(commands: str) -> Parser:
    """The options of the demo; ``commands`` is the list of commands that its help begins with."""
    parser = Parser(
        "main.py",
        "Train a language model from nothing by SFT, a learned reward model, PPO and GRPO, on this machine,\n"
        f"without a download: it learns to count upwards in even numbers.\n\n{commands}",
        [
            "python main.py --fast",
            "python main.py --dry-run --model embedded --algorithm grpo --batch-size 8 --group-size 8",
        ],
        usage="%(prog)s [OPTIONS]   or   %(prog)s COMMAND [OPTIONS]",
    )
    parser.add_argument(
        "--fast", action="store_true", help="every stage in about 20 seconds, learning a little"
    )
    parser.add_argument(
        "--seed", type=count, default=0, metavar="N", help="everything random follows from it (default 0)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="a new or empty folder (default runs/demo-DATE-TIME)"
    )
    dry = parser.add_argument_group(
        "dry run", "what memory a run takes and what machines it fits, by config.json"
    )
    dry.add_argument("--dry-run", action="store_true", help="print the estimate; no weight is loaded")
    dry.add_argument("--model", metavar="FOLDER_OR_NAME", help=_meaning("model_name"))
    dry.add_argument("--algorithm", metavar="NAME", help=_meaning("algorithm"))
    dry.add_argument("--full", action="store_true", help="train every weight in place of adapters")
    for option, field in DRY_RUN_NUMBERS.items():
        dry.add_argument(option, type=_number, metavar="N", dest=field, help=_meaning(field))
    return parser


def _meaning(field: str) -> str:
    text: str = PPOConfig.__dataclass_fields__[field].default.description
    return text.replace("%", "%%")


def _number(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number is expected, found {text!r}") from None


def run(options: argparse.Namespace) -> int:
    """The demo; 0 if both algorithms improved their reward. With ``--dry-run`` the estimate."""
    if options.dry_run:
        return dry_run(options)
    named = {"--model": options.model, "--algorithm": options.algorithm, "--full": options.full or None}
    named |= {option: getattr(options, field) for option, field in DRY_RUN_NUMBERS.items()}
    for option, value in named.items():
        if value is not None:
            raise InvalidConfigurationError(
                f"{option}: the demo has no use for it; add --dry-run for an estimate, or see main.py train --help"
            )
    from examples.sequential_digits import main as demo

    return demo(options.output, seed=options.seed, fast=options.fast)


def dry_run(options: argparse.Namespace) -> int:
    """Print what memory a run with these options takes."""
    from command_line.plan import memory_lines
    from ppo_trainer.algorithms import find_algorithm
    from ppo_trainer.resolution import resolve_config

    given = {field: getattr(options, field) for field in ("algorithm", *DRY_RUN_NUMBERS.values())}
    given |= {"model_name": options.model, "fine_tune_type": "full" if options.full else None}
    config = PPOConfig(**{field: value for field, value in given.items() if value is not None})
    print("\n".join(memory_lines(resolve_config(config, find_algorithm(config.algorithm)))))
    return 0
