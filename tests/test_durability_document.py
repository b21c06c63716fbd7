"""The fault table of docs/durability.md names tests that exist, one at least for each fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = (
    (ROOT / "docs" / "durability.md")
    .read_text(encoding="utf-8")
    .partition("## Faults")[2]
    .partition("\n## ")[0]
)
ROWS = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| ")][1:]
#: What a run has to survive.
FAULTS = (
    "kill -9", "full disk", "read-only", "cut", "bit flipped", "clock", "two runs", "SIGTERM during a save",
    "memory runs out", "hangs", "file of prompts", "tokenizer", "NaN", "no score", "all rewards", "empty", "cut short",
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("| ")[:40])
def test_the_test_of_a_fault_exists(row: list[str]) -> None:
    assert len(row) == 3
    named = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)(?:::(\w+))?`|`…::(\w+)`", row[2])
    assert named, f"no test: {row[0]}"
    file = ""
    for path, test, same_file in named:
        file = path or file
        found = [one for one in ROOT.glob("tests/**/test_*.py") if str(one).endswith("/" + file)]
        assert len(found) == 1, file
        if test or same_file:
            assert f"def {test or same_file}(" in found[0].read_text(encoding="utf-8"), test or same_file


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_row(fault: str) -> None:
    assert any(fault in row[0] for row in ROWS)
