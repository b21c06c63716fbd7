"""From the words of a command line to a command, and from whatever happens to an exit code.

0: done, or stopped on request. 1: the run failed. 2: bad usage, an option or a config that cannot work. 130:
interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from checkpointing.stopping import RunStopped
from command_line import demo
from command_line.commands import COMMANDS, find_command, list_commands
from command_line.parsing import Parser
from config.errors import InvalidConfigurationError, ToolkitError


def build_parser() -> Parser:
    """The options of ``python main.py`` itself; nothing heavy is imported for ``--help``."""
    return demo.build_parser(list_commands())


def main(arguments: Sequence[str] | None = None) -> int:
    """``python main.py``: the demo, or the command that the first word names."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        return run_command(words[0], words[1:])
    if words and words[0] in ("-h", "--help"):
        words = ["--help"]
    return guarded(lambda: demo.run(build_parser().parse_args(words)))


def run_command(name: str, words: Sequence[str], prog: str | None = None) -> int:
    """One command with its options; ``prog`` is how its help calls it."""

    def work() -> int:
        command = find_command(name)
        return command.run(command.parser(prog).parse_args(words))

    return guarded(work)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of ``work``; every error that is the user's to mend is one sentence on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # γ on a terminal that has no γ is no reason to stop
    try:
        code = work()
        sys.stdout.flush()
        return code
    except RunStopped:
        return 0
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidConfigurationError) else 1
    except BrokenPipeError:  # `… | head` has seen enough; without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except MemoryError:  # of a run under way base_setup/out_of_memory.py says more
        print(
            "error: memory ran out; docs/memory.md has what a run takes and what lowers it", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


# The names that are installed ----------------------------------------------------------------------------


def _installed(command: str, prog: str) -> Callable[[], int]:
    def start() -> int:
        return run_command(command, sys.argv[1:], prog)

    return start


train = _installed("train", "mlx-train")
evaluate = _installed("evaluate", "mlx-evaluate")
preprocess = _installed("preprocess", "mlx-preprocess")
generate_config = _installed("generate-config", "mlx-generate-config")

__all__ = ["COMMANDS", "build_parser", "evaluate", "generate_config", "main", "preprocess", "train"]
