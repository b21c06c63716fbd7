"""Files of every kind: the same rows come out, and mistakes are named by file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_loading.json_files
from config.data_config import DataConfig
from config.errors import DataLoadError
from data_loading.loading import HubDataset, load_pairs, load_prompts
from data_loading.rows import Rows

ROWS = [{"prompt": "a b", "completion": "c"}, {"prompt": "é\nf", "completion": 'g "h", i'}]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def writing(data: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return writing


def lines(rows: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def test_every_format_gives_the_same_rows(write: Write, tmp_path: Path) -> None:
    from datasets import Dataset

    table = Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    csv = 'prompt,completion\na b,c\n"é\nf","g ""h"", i"\n'
    sources: list[Any] = [
        write(lines(ROWS)),
        write(lines(ROWS), "lines.json"),
        write(json.dumps(ROWS, indent=2), "list.json"),
        write(csv, "rows.csv"),
        write(csv.replace(",", "\t").replace('""h""\t', '""h"",'), "rows.tsv"),
        tmp_path / "rows.parquet",
        table,
        ROWS,
    ]
    for source in sources:
        rows = load_pairs(source)
        assert list(rows) == ROWS, source
        assert rows[-1] == ROWS[1]
        assert list(rows[1:]) == ROWS[1:]
        assert rows.report.rows == rows.report.used == 2


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n\n", "\n \t\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_marks_are_no_mistakes(write: Write, end: str, bom: bytes) -> None:
    path = write(bom + lines(ROWS, end).encode())
    assert list(load_pairs(path)) == ROWS
    assert list(load_pairs(write(path.read_bytes().rstrip()))) == ROWS  # no line end at the end
    array = write(
        bom + f"[{end}{json.dumps(ROWS[0])},{end}{json.dumps(ROWS[1])}{end}]{end}".encode(), "a.json"
    )
    assert list(load_pairs(array)) == ROWS
    csv = write(bom + f"prompt,completion{end}a,b{end}".encode(), "a.csv")
    if " " not in end:  # a blank in a line of CSV is a cell
        assert list(load_pairs(csv)) == [{"prompt": "a", "completion": "b"}]


def test_places_are_lines(write: Write) -> None:
    path = write("\n" + lines(ROWS, "\n\n"))
    assert [load_pairs(path).place(i) for i in range(2)] == [f"{path}:2", f"{path}:4"]
    path = write('[\n{"prompt": "a"},\n\n{"prompt":\n"b"}, {"prompt": "c"}]', "a.json")
    assert [load_prompts(path).place(i) for i in range(3)] == [f"{path}:{n}" for n in (2, 4, 5)]
    path = write('prompt\n"a\nb"\n\nc\n', "a.csv")
    assert [load_prompts(path).place(i) for i in range(2)] == [f"{path}:2", f"{path}:5"]


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", b"", ": there are no rows"),
        ("a.jsonl", b"\n \n\n", ": there are no rows"),
        ("a.json", b"[]", ": there are no rows"),
        ("a.csv", b"", ": there are no rows"),
        ("a.csv", b"prompt\n", ": there are no rows"),
        ("a.jsonl", GOOD + b'{"prompt": "b"', ":2: not JSON at column 15"),
        ("a.jsonl", GOOD + b"\n" + b'{"prompt": "\xe9"}', r":3: not UTF-8 at column 13 \(byte 0xe9\)"),
        ("a.jsonl", GOOD + b'{"prompt": "\0"}', ":2: a nul byte at column 13"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), ": .* found UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08", ": .* found a gzip archive"),
        ("a.jsonl", b"PAR1abc", r": .* let its name end in \.parquet"),
        ("a.jsonl", GOOD + b'"text"', ":2: an object .* found a text"),
        (
            "a.json",
            b'[{"prompt": "a"},\n{"prompt" "b"}]',
            ":2: in the row that begins here, not JSON at column 11",
        ),
        ("a.json", b'[{"prompt": "a"}\n{"prompt": "b"}]', ":2: a comma or ] is expected after a row"),
        ("a.json", b'[{"prompt": "a"},\n\n', ":3: .* the line ends there"),
        ("a.json", b'[{"prompt": "a"}', ":1: a comma or ] is expected after a row, found the end"),
        ("a.json", b'[{"prompt": "a"}]\n]', ": more text after the list|:1: more text after the list"),
        ("a.json", b'[{"prompt": "\xe9"}]', ": not UTF-8"),
        ("a.json", b"[\n3]", ":2: an object .* found a number"),
        ("a.csv", b"prompt,b\na,b\nc\n", r":3: 2 cells are expected \(prompt, b\), found 1"),
        ("a.csv", b"prompt,b\na,b,c\n", ":2: 2 cells are expected .* found 3"),
        ("a.csv", b'prompt\n"a\n', r":2: not CSV \(unexpected end of data\)"),
        ("a.csv", b"prompt\n\xe9\n", ":2: nul bytes, or not UTF-8"),
        ("a.csv", b"pr\xe9\nb\n", ":1: nul bytes, or not UTF-8"),
        ("a.csv", b"prompt\na\0\n", ":2: nul bytes"),
        ("a.csv", b"prompt;completion\na;b\n", ":1: commas between the columns are expected"),
        ("a.csv", b"prompt,prompt\na,b\n", ":1: the first line must name the columns, each differently"),
        ("a.parquet", b"PAR1" + b"\0" * 40, ": the Parquet file is damaged"),
        ("a.parquet", GOOD, ": a Parquet file is expected"),
        ("a.txt", GOOD, r": files ending in \.jsonl, .* are read"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_line(
    write: Write, name: str, data: bytes, sentence: str
) -> None:
    path = write(data, name)
    with pytest.raises(DataLoadError, match=f"^{path}{sentence}") as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("openai/gsm8k", "there is no such file; .* given by dataset_name"),
        ("nul\0.jsonl", "cannot be read|there is no such file"),
        ("x" * 5000, "cannot be read"),
        ("~nobody-of-this-name/a.jsonl", "cannot be read"),
        (3, "a path, a HubDataset or a list of rows is expected, found int"),
        ([], "rows: there are no rows"),
        ([{"prompt": "a"}, 3], r"rows\[1\]: a text, a chat or a mapping is expected, found a number"),
        ([{"prompt": "a"}, {"prompt": "\ud83d"}], r'rows\[1\]: "prompt" has half a character'),
    ],
)
def test_a_source_that_is_none_is_named(source: Any, sentence: str) -> None:
    with pytest.raises(DataLoadError, match=sentence):
        load_prompts(source)


def test_bad_rows_are_skipped_and_counted_when_asked(write: Write) -> None:
    path = write(GOOD + b'{"prompt": 3}\n' + b"\xff\n" * 30 + b'{"prompt": "b"}\n')
    rows = load_prompts(path, DataConfig(on_bad_row="skip"))
    assert isinstance(rows, Rows)
    assert list(rows) == [{"prompt": "a"}, {"prompt": "b"}]
    report = rows.report
    assert (report.rows, report.used, report.skipped) == (33, 2, 31)
    assert rows.bad_places() == [f"{path}:{line}" for line in range(2, 33)]
    assert len(report.problems) == 20
    assert str(report).splitlines()[0] == f"{path}: 2 rows (prompt), 31 bad and skipped"
    assert str(report).splitlines()[-1] == "  … and 11 more"
    assert rows.place(1) == f"{path}:33"
    with pytest.raises(DataLoadError, match="none of 1 rows can be used; first: "):
        load_prompts(write(b"{"), DataConfig(on_bad_row="skip"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_without_end_is_refused_without_being_held(
    write: Write, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("json_files", "csv_files", "records"):
        monkeypatch.setattr(f"data_loading.{module}.LONGEST_LINE", 100)
    first = b"prompt\n" if name == "a.csv" else b""
    row = b"b\n" if name == "a.csv" else GOOD
    path = write(first + row + b"x" * 3_000_000 + b"\n" + row, name)
    with pytest.raises(DataLoadError, match=f":{2 + bool(first)}: a row of more than"):
        load_prompts(path)
    rows = load_prompts(path, DataConfig(on_bad_row="skip"))
    assert len(rows) == 2
    assert rows[1] == rows[0]  # what comes after it is found again


def test_a_file_that_changes_under_the_run_is_noticed(write: Write) -> None:
    rows = load_prompts(write(GOOD * 2))
    with open(rows.place(0).rpartition(":")[0], "r+b") as file:
        file.write(b"#")
    assert rows[1] == {"prompt": "a"}
    with pytest.raises(DataLoadError, match=":1: the file has changed since it was checked"):
        rows[0]


def test_a_replaced_file_is_read_as_it_was(write: Write, tmp_path: Path) -> None:
    """An editor writes a new file and renames it; the rows of the old one are still there."""
    rows = load_prompts(write(GOOD))
    os.replace(write(b'{"prompt": "new"}\n', "b.jsonl"), tmp_path / "rows.jsonl")
    assert rows[0] == {"prompt": "a"}


def test_the_text_is_not_held(write: Write) -> None:
    rows = load_prompts(write(GOOD * 1000))
    source = rows._source  # type: ignore[union-attr]
    assert isinstance(source, data_loading.json_files.JsonLines)
    held = [value for value in vars(source).values() if isinstance(value, (str, bytes, list, dict))]
    assert sum(map(len, held)) < 1000


def test_a_data_set_by_name_is_found_in_a_folder(write: Write, tmp_path: Path) -> None:
    write(lines(ROWS), "train.jsonl")
    write(lines(ROWS[1:]), "test.jsonl")
    rows = load_pairs(HubDataset(str(tmp_path), split="test"))
    assert list(rows) == ROWS[1:]
    assert rows.place(0) == f"{tmp_path}, split test, row 1"
    with pytest.raises(
        DataLoadError, match=r"dataset_name: .* could not be loaded .*the splits are: train, test"
    ):
        load_pairs(HubDataset(str(tmp_path), split="dev"))


def test_a_data_set_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataLoadError, match='dataset_name: "nobody/nothing-of-this-name" could not be loaded'
    ) as caught:
        load_pairs(HubDataset("nobody/nothing-of-this-name"))
    assert "\n" not in str(caught.value)
    assert "local file" in str(caught.value)


def test_a_folder_is_its_split(write: Write, tmp_path: Path) -> None:
    write(lines(ROWS), "train.jsonl")
    write(lines(ROWS[:1]), "valid.jsonl")
    assert len(load_pairs(tmp_path)) == 2
    assert len(load_pairs(tmp_path, split="valid")) == 1
    with pytest.raises(DataLoadError, match=r"has no test\.jsonl \(it holds train\.jsonl, valid\.jsonl\)"):
        load_pairs(tmp_path, split="test")
