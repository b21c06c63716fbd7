"""What the report on a file says, counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.data_config import DataConfig
from config.errors import DataLoadError
from config.training_config import TrainingConfig
from data_loading.checking import CheckReport, FolderReport, check_file
from data_loading.histogram import histogram
from models.sft_model import LanguageModel

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows: list[Any] = [
        {"prompt": "one two", "completion": "a"},
        {"prompt": "One  two", "completion": "b c d", "n": 1},  # the prompt again
        {"prompt": "one two", "completion": "a"},  # the whole row again
        {"prompt": "three", "completion": "e"},
        {"prompt": "four"},
        "{",
    ]
    return write(tmp_path / "rows.jsonl", rows)


def test_everything_is_counted(path: Path) -> None:
    report = check_file(path)
    assert isinstance(report, CheckReport)
    assert (report.report.rows, report.report.used, report.report.skipped) == (6, 4, 2)
    assert report.report.schema == "prompt and completion"
    assert report.lengths["prompt"].tolist() == [2, 2, 2, 1]
    assert report.lengths["completion"].tolist() == [1, 3, 1, 1]
    assert report.columns == {"prompt": 4, "completion": 4, "n": 1}
    assert (report.repeated_prompts, report.repeated_rows) == (2, 1)
    assert not report.ok
    text = str(report)
    for line in (
        "  rows        6 (4 usable, 2 bad)",
        "  read by     load_pairs, load_prompts",
        "  prompt      1 to 2 words, mean 1.8, half up to 2, 95% up to 2",
        "    2  3 ████████████████████████████████████████",
        "  duplicates  2 rows repeating a prompt, 1 of them the whole row",
        f'  bad row     {path}:5: "completion" is missing (columns: prompt); the rows before it are: '
        "prompt and completion",
        f"  bad row     {path}:6: not JSON at column 2",
    ):
        assert line in text, line


def test_all_bad_rows_are_counted_and_twenty_shown(tmp_path: Path) -> None:
    report = check_file(write(tmp_path / "a.jsonl", [{"prompt": "a"}, *["{"] * 50]))
    text = str(report)
    assert text.count("bad row") == 20
    assert "… and 30 more" in text


def test_lengths_are_in_tokens_where_there_is_a_tokenizer(path: Path, tiny: LanguageModel) -> None:
    report = check_file(path, TrainingConfig(max_prompt_length=6), tokenizer=tiny.tokenizer)
    assert isinstance(report, CheckReport)
    assert report.lengths["prompt"].tolist() == [7, 8, 7, 5]  # bytes
    assert report.lengths["completion"].tolist() == [1, 5, 1, 1]
    assert "too long    3 rows with a prompt of more than 6 tokens" in str(report)
    chat = check_file(path, DataConfig(prompt_format="chat"), tokenizer=tiny.tokenizer)
    assert isinstance(chat, CheckReport)
    assert (chat.lengths["prompt"] > report.lengths["prompt"]).all()


def test_leaks_are_counted_against_another_file_and_within_a_folder(path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "valid.jsonl", [{"prompt": "THREE", "completion": "x"}])
    report = check_file(path, against=other)
    assert isinstance(report, CheckReport)
    assert report.leaks == {str(other): 1}
    assert f"  leaks       1 row with a prompt of {other}" in str(report)
    path.rename(tmp_path / "train.jsonl")
    folder = check_file(tmp_path)
    assert isinstance(folder, FolderReport)
    assert [file.report.rows for file in folder.files] == [6, 1]
    assert folder.files[1].leaks == {str(tmp_path / "train.jsonl"): 1}
    assert not folder.ok
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataLoadError, match=r"the folder has no train\.jsonl, valid\.jsonl or test\.jsonl; name a"
    ):
        check_file(tmp_path / "empty")


@pytest.mark.parametrize("data", ["", "\n", "[]"])
def test_an_empty_file_is_reported_and_not_ok(tmp_path: Path, data: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(data)
    report = check_file(path)
    assert not report.ok
    assert "0 (0 usable, 0 bad)" in str(report)


def test_a_good_file_is_ok(tmp_path: Path) -> None:
    assert check_file(write(tmp_path / "a.jsonl", [{"text": "a", "reward": "1"}])).ok


def test_a_check_in_words_needs_no_mlx(path: Path) -> None:
    code = f"import sys\nfrom data_loading.checking import check_file\ncheck_file({str(path)!r})\n"
    code += (
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'transformers', 'datasets')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_histogram_counts_every_value_once() -> None:
    values = np.array([0, 4, 5, 9, 49, 50, 99])
    lines = histogram(values)
    assert [line.split()[:2] for line in lines] == [
        ["0–9", "4"],
        ["10–19", "0"],
        ["20–29", "0"],
        ["30–39", "0"],
        ["40–49", "1"],
        ["50–59", "1"],
        ["60–69", "0"],
        ["70–79", "0"],
        ["80–89", "0"],
        ["90–99", "1"],
    ]
    assert [line.count("█") for line in lines] == [40, 0, 0, 0, 10, 10, 0, 0, 0, 10]
    assert histogram(np.array([7, 7])) == ["    7  2 " + "█" * 40]
    for low, high in ((0, 1), (3, 1003), (17, 99_999)):
        lines = histogram(np.arange(low, high + 1))
        assert sum(int(line.split()[1]) for line in lines) == high - low + 1
        assert len(lines) <= 11


def test_an_empty_tokenised_prompt_is_a_bad_row(tmp_path: Path) -> None:
    """Training refuses it, so a check says so."""
    np.save(tmp_path / "t_prompts.npy", np.array([7, 8], dtype=np.int32))
    np.save(tmp_path / "t_prompts_offsets.npy", np.array([0, 2, 2]))
    report = check_file(tmp_path / "t")
    assert not report.ok
    assert "2 (1 usable, 1 bad)" in str(report)
    assert "row 2: the prompt is empty" in str(report)
