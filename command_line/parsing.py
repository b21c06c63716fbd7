"""Option parsers whose complaints are one line, and what a command is.

``argparse`` with three habits of its own: ``--learning_rate`` is ``--learning-rate``, a mistyped option or word is
answered with the nearest that exists, and a help text ends with examples that can be pasted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from config.declaration import nearest


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples as they are written, options in two columns of a wide terminal's width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


class Parser(argparse.ArgumentParser):
    """See the module. ``examples``: whole command lines, printed at the end of the help."""

    def __init__(self, prog: str, description: str, examples: Sequence[str] = (), usage: str | None = None):
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        # As from Python 3.14 on: -1e-3 is a number and no option.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        #: Adds the options of the system that ``--from`` names.
        self.adopt: Callable[[Parser, str], None] | None = None

    def known_options(self) -> list[str]:
        """Every option that starts with two dashes."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def option(self, name: str) -> argparse.Action | None:
        """What an option does, by its name with the dashes; None if there is none."""
        return self._option_string_actions.get(name)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, with underscores in an option's name read as dashes."""
        args = sys.argv[1:] if args is None else list(args)
        if self.adopt is not None:
            after = [b for a, b in pairwise(args) if a == "--from"]
            joined = [one.partition("=")[2] for one in args if one.startswith("--from=")]
            adopt = self.adopt
            for system in [*after, *joined][:1]:
                adopt(self, system)
                self.adopt = None
        return super().parse_known_args([self._dashed(one) for one in args], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options, or the end of the program with a sentence that names the nearest option."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hints = (self._nearest_option(one) for one in unknown)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, hints), '')}")
        return options

    def error(self, message: str) -> NoReturn:
        """One line on standard error instead of argparse's list of all options; exit code 2."""
        self.exit(2, f"error: {message}\n       {self.prog} --help lists the options\n")

    def _dashed(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return argument
        dashed = name.replace("_", "-")
        return dashed + equals + value if dashed in self._option_string_actions else argument

    def _nearest_option(self, argument: str) -> str:
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            return ""
        return nearest("--" + name.lstrip("-").replace("_", "-"), self.known_options())


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """A ``type=`` for an option with few values: another one is refused with the nearest of them."""
    valid = tuple(choices)

    def check(text: str) -> str:
        if text not in valid:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(valid)}{nearest(text, valid)}")
        return text

    return check


def count(text: str) -> int:
    """A ``type=`` for whole numbers from 0 up."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"a whole number from 0 up is expected, found {text!r}")
    return int(text)


@dataclass(frozen=True)
class Command:
    """A word after ``main.py`` and what it does.

    Args:
        add_options: puts its options into a parser.
        run: carries it out; returns the exit code.
        examples: what follows ``python main.py``, as lines that run as they are.
    """

    name: str
    summary: str
    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    examples: Sequence[str] = field(default=())
    description: str = ""

    def parser(self, prog: str | None = None) -> Parser:
        """Its parser; ``prog`` is what the user typed to get here."""
        parser = Parser(
            prog or f"main.py {self.name}",
            self.description or self.summary,
            [f"python main.py {line}" for line in self.examples],
            usage="%(prog)s [OPTIONS]",
        )
        self.add_options(parser)
        return parser
