"""docs/data.md: every example of it is read out of the document and used as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from config.data_config import DataConfig
from config.errors import DataLoadError
from data_loading.checking import check_file
from data_loading.loading import load_pairs, load_preferences, load_prompts, load_steps
from data_loading.schemas import SCHEMAS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
LOADERS: dict[str, Any] = {f.__name__: f for f in (load_prompts, load_pairs, load_preferences, load_steps)}
#: name, the paragraph after it, rows
EXAMPLES = re.findall(r"^\*\*(.+?)\*\*(.*?)```jsonl\n(.*?)```", DOCUMENT, re.DOTALL | re.MULTILINE)


def test_every_schema_has_its_example() -> None:
    assert [name for name, _, _ in EXAMPLES] == [schema.name for schema in SCHEMAS]


@pytest.mark.parametrize(("name", "prose", "rows"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_an_example_is_read_as_what_it_is_called_by_whom_it_says(
    tmp_path: Path, name: str, prose: str, rows: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    said = re.findall(r"`(load_\w+)`", prose)
    assert said
    report = check_file(path)
    assert report.ok, report
    assert f"schema      {name}" in str(report)
    for loader, load in LOADERS.items():
        if loader in said:
            assert load(path).report.schema == name
            assert load(path).report.rows == len(rows.splitlines())
        else:
            with pytest.raises(DataLoadError):
                load(path)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def test_a_new_user_can_train_on_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first lines of the document, as they stand there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text(blocks("json")[0])
    exec(compile(blocks("python")[0], "docs/data.md", "exec"), {"__name__": "user"})
    shown = capsys.readouterr().out
    assert "rows        2 (2 usable, 0 bad)" in shown
    assert "epoch 1/1" in shown


def test_the_report_in_the_document_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = '{"question": "1 + 1 = "}\n{"prompt": "2 + 2 ="\n'
    (tmp_path / "my.jsonl").write_text(blocks("json")[0] + bad)
    printed = next(block for block in blocks("") if block.startswith("my.jsonl"))
    assert str(check_file("my.jsonl")) == printed.rstrip("\n")


def test_every_option_is_in_the_document() -> None:
    from dataclasses import fields

    for one in fields(DataConfig):  # type: ignore[arg-type]
        if not one.name.endswith("_column") and not one.name.startswith("dataset_"):
            assert f"`{one.name}`" in DOCUMENT, one.name
