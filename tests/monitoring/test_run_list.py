"""``runs list`` of folders in which anything may stand."""

from __future__ import annotations

from pathlib import Path

import pytest

import main


@pytest.mark.parametrize(
    ("metrics", "config", "line"),
    [
        ('{"step": 7, "reward": 0.25}', '{"algorithm": "grpo"}', "grpo stopped 7 0.250 -"),
        ("", "[]", "? stopped 0 - -"),
        ('{"step": 1, "reward": "a"}', "{", "? stopped 1 - -"),
        ('{"step": 1, "reward": [1]}', '{"stage": "s\\u001b[2J"}', "s\\x1b[2J stopped 1 - -"),
        ("[" * 100_000 + '\n{"step": 2}', "[" * 100_000, "? stopped 2 - -"),
        (bytes(range(256)), b"\xff", "? stopped 0 - -"),
    ],
    ids=["sound", "empty", "a word", "a list", "deep", "bytes"],
)
def test_what_stands_in_a_run_folder_may_be_anything(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metrics: str | bytes,
    config: str | bytes,
    line: str,
) -> None:
    run = tmp_path / "one"
    run.mkdir()
    for name, content in (("metrics.jsonl", metrics), ("config.json", config)):
        (run / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert main.main(["runs", "list", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()[1]
    assert shown.split() == [str(run), *line.split()]
