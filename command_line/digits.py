"""``generate-digit-data``: the files of the digit task, with the flags that its first system had."""

from __future__ import annotations

import argparse

from command_line.parsing import Command, Parser


def _options(parser: Parser) -> None:
    from examples.digits_data import add_options

    parser.usage = None
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Write the three files and name them."""
    from examples.digits_data import write

    for path in write(options).values():
        print(path)
    return 0


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
