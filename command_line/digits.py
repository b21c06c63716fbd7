"""``generate-digit-data``: the files of the digit task, with the flags that its first system had."""

from __future__ import annotations

import argparse
from pathlib import Path

from command_line.parsing import Command, Parser
from config.errors import InvalidConfigurationError


def _options(parser: Parser) -> None:
    from examples.digits_data import add_options

    parser.usage = None
    add_options(parser).add_argument(
        "--stages",
        action="store_true",
        help="a file for each stage of docs/digits.md in place of the three; takes --seed and --folder alone",
    )


def run(options: argparse.Namespace) -> int:
    """Write the files and name them."""
    from examples.digits_data import write

    for path in (_write_stages if options.stages else write)(options).values():
        print(path)
    return 0


def _write_stages(options: argparse.Namespace) -> dict[str, Path]:
    from examples.digits_data import DRAWING
    from examples.digits_stages import write_stages

    for name, default in DRAWING.items():
        if getattr(options, name) != default:
            raise InvalidConfigurationError(
                f"--{name.replace('_', '-')}: --stages draws its files as docs/digits.md says; leave it out"
            )
    return write_stages(options.folder, options.seed)


DIGITS = Command(
    "generate-digit-data",
    "write train, valid and test files of growing or falling numbers",
    _options,
    run,
    [
        "generate-digit-data --increasing --multiple-of 2 --num-samples 150 --noise 0",
        "generate-digit-data -d -n 20 --noise 0.2 --folder digits",
    ],
)
