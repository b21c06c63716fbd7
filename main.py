"""The command line. Without arguments: the demo, from a freshly made model to PPO and GRPO in two minutes.

python main.py [--fast] [--seed N] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from config.errors import ToolkitError


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
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 up is expected, found {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done. 1: the run failed. 2: bad usage. 130: interrupted."""
    options = build_parser().parse_args(arguments)
    try:
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
