"""The command line. Without arguments: the demo, from a freshly made model to PPO and GRPO in two minutes.

python main.py [--fast] [--seed N] [--output FOLDER]
python main.py --dry-run [--model FOLDER_OR_NAME] [--algorithm NAME] …
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from config.errors import ToolkitError
from config.ppo_config import PPOConfig


def build_parser() -> argparse.ArgumentParser:
    """The options; nothing heavy is imported for ``--help``."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description=(
            "Train a language model from nothing by SFT, a learned reward model, PPO and GRPO, on this machine, "
            "without a download: it learns to count upwards in even numbers."
        ),
        epilog="Training a model of your own takes a few lines of Python: see README.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fast", action="store_true", help="every stage in about 20 seconds, learning a little"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="everything random follows from it (default 0)")
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


def _meaning(field: str) -> str:
    text: str = PPOConfig.__dataclass_fields__[field].default.description
    return text.replace("%", "%%")


def _number(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number is expected, found {text!r}") from None


def dry_run(options: argparse.Namespace) -> int:
    """Print what memory a run with these options takes."""
    from base_setup.memory_estimate import describe, read_config
    from models.sft_model import EMBEDDED, build_embedded
    from ppo_trainer.algorithms import find_algorithm
    from ppo_trainer.resolution import resolve_config

    given = {field: getattr(options, field) for field in ("algorithm", *DRY_RUN_NUMBERS.values())}
    given |= {"model_name": options.model, "fine_tune_type": "full" if options.full else None}
    config = PPOConfig(**{field: value for field, value in given.items() if value is not None})
    algorithm = find_algorithm(config.algorithm)
    config = resolve_config(config, algorithm)
    if config.model_name == EMBEDDED:
        model = build_embedded(config.embedded_model, config.seed).config
    else:
        model = read_config(config.model_name)
    print("\n".join(describe(model, config, critic=algorithm.needs_critic)))
    return 0


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 up is expected, found {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done. 1: the run failed. 2: bad usage. 130: interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        if options.dry_run:
            return dry_run(options)
        from examples.sequential_digits import main as demo

        return demo(options.output, seed=options.seed, fast=options.fast)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
