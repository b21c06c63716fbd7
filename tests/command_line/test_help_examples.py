"""The examples at the end of each help, read out of it and run as they stand."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line.commands import COMMANDS


def examples(name: str) -> list[str]:
    return [
        line.strip() for line in COMMANDS[name].parser().format_help().split("examples:\n")[1].splitlines()
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_run_as_they_stand(
    name: str, workplace: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("evaluate", "fuse"):  # of a run that there is
        trained = command("train", "--config", "run.yaml", "--output-dir", "runs/digits")
        assert trained.code == 0, trained.err
    assert len(examples(name)) == 2
    for example in examples(name):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nclear\nq\n"))
        words = shlex.split(example)
        assert words[:2] == ["python", "main.py"]
        done = command(*words[2:])
        assert done.code == 0, (example, done.err)
        assert done.out, example
        assert done.err == "", example
