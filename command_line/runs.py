"""``runs list``: what runs there are, how far each is, and what it can go on from."""

from __future__ import annotations

import argparse
from pathlib import Path

from command_line.parsing import Command, Parser
from config.errors import DataLoadError


def _options(parser: Parser) -> None:
    parser.add_argument("what", choices=["list"], help="list: a line for each run")
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="FOLDER", help="where they are (default runs)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from checkpointing.store import CheckpointStore
    from monitoring.run_list import list_runs
    from monitoring.samples import printable

    folder = Path(options.folder).expanduser()
    if not folder.is_dir() and options.folder != "runs":
        raise DataLoadError(f'there is no folder "{options.folder}"; give one that holds runs')
    runs = list_runs(folder)
    if not runs:
        print(f"no run in {folder}")
        return 0
    rows = [("run", "method", "state", "step", "reward", "newest checkpoint")]
    for line in runs:
        stored = CheckpointStore(line.folder).complete()
        reward = "-" if line.reward is None else f"{line.reward:.3f}"
        newest = stored[-1].path.name if stored else "-"
        rows.append((printable(line.folder), line.stage, line.state, str(line.step), reward, newest))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


RUNS = Command(
    "runs",
    "the runs in a folder: how far, and what each can go on from",
    _options,
    run,
    ["runs list", "runs list ."],
)
