"""docs/command_line.md names what there is, and all of it."""

from __future__ import annotations

import re
from pathlib import Path

from command_line.commands import COMMANDS
from command_line.evaluate import BENCHMARKS
from config.older.systems import SYSTEMS

TEXT = (Path(__file__).resolve().parents[2] / "docs/command_line.md").read_text(encoding="utf-8")


def test_every_command_has_its_line() -> None:
    table = TEXT.split("| command |")[1].split("\n\n")[0]
    assert [row.split()[0] for row in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)] == list(COMMANDS)


def test_every_option_that_is_named_exists() -> None:
    known = {option for command in COMMANDS.values() for option in command.parser().known_options()}
    known |= {"--" + name.replace("_", "-") for system in SYSTEMS.values() for name in system.settings}
    older = {"--batch_size", "--x", "--no-x", "--prompt-tuning", "--reward-model", "--train"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", TEXT))
    assert {name for name in named if name.replace("_", "-") not in known} <= older | {"--help"}


def test_systems_benchmarks_and_what_is_missing_are_named() -> None:
    assert set(re.findall(r"--from ([a-z0-9-]+)", TEXT)) == {
        name for name, system in SYSTEMS.items() if system.stage is None
    } - {"mlx-rl-trainer"}
    assert all(f"`{name}`" in TEXT for name in BENCHMARKS)
    assert all(f"`python {word}" in TEXT for word in ("talk_to_model.py", "fuse.py", "convert.py"))
