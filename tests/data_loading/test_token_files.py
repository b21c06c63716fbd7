"""Pre-tokenised files: written, mapped, refused when damaged, and the older system's read without running them."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.tokenizer_setup import byte_tokenizer, encode, encode_prompt, fingerprint
from config.data_config import DataConfig
from config.errors import DataLoadError, InvalidConfigurationError
from config.training_config import TrainingConfig
from data_loading.loading import load_pairs, load_preferences, load_prompts
from data_loading.prepared_prompts import PreparedPrompts
from data_loading.preprocessing import preprocess
from data_loading.token_files import Ragged
from data_loading.token_rows import TokenRows
from data_loading.token_writer import TokenWriter

TOKENIZER = TokenizerWrapper(byte_tokenizer())
ROWS: list[dict[str, Any]] = [
    {"prompt": "ab", "completion": "c", "n": 1},
    {"prompt": [{"role": "user", "content": "é🙂"}], "completion": "dd", "n": {"x": [None, "ß"]}},
    {"prompt": "longer", "completion": "e", "n": "\ud83d"},
]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with TokenWriter(tmp_path / "in" / "train", {"fingerprint": fingerprint(TOKENIZER)}) as writer:
        for row in ROWS:
            writer.add(
                encode_prompt(TOKENIZER, row["prompt"]), encode(TOKENIZER, row["completion"]), {"n": row["n"]}
            )
    return str(tmp_path / "in" / "train")


def prepared(rows: Any, **options: Any) -> PreparedPrompts:
    return PreparedPrompts(TOKENIZER, rows, **{"max_prompt_length": 99, **options})


def test_what_is_written_is_what_is_mapped(prefix: str) -> None:
    """The flat layout itself, by hand: two bytes, a templated chat, six bytes."""
    flat, offsets = np.load(f"{prefix}_prompts.npy"), np.load(f"{prefix}_prompts_offsets.npy")
    chat = len(encode_prompt(TOKENIZER, ROWS[1]["prompt"]))
    assert offsets.tolist() == [0, 2, 2 + chat, 2 + chat + 6]
    assert (flat.dtype, offsets.dtype) == (np.int32, np.int64)
    assert TOKENIZER.decode(flat[:2].tolist()) == "ab"
    assert np.load(f"{prefix}_completions_offsets.npy").tolist() == [0, 1, 3, 4]
    rows = load_prompts(prefix)
    assert isinstance(rows, TokenRows)
    assert isinstance(rows[0]["prompt_ids"], np.memmap)
    assert [row["n"] for row in rows] == [row["n"] for row in ROWS]
    assert rows.prompt_lengths.tolist() == [2, chat, 6]
    assert list(load_prompts(f"{prefix}_prompts.npy")[-1]) == ["prompt_ids", "completion_ids", "n"]
    assert [row["n"] for row in rows[::2]] == [1, "\ud83d"]


def test_prompts_have_the_ids_and_columns_that_the_text_has(prefix: str) -> None:
    from_text, from_tokens = prepared(ROWS[:2]), prepared(load_prompts(prefix)[:2])
    assert [p.ids for p in from_text] == [p.ids for p in from_tokens]
    assert [p.columns for p in from_text] == [p.columns for p in from_tokens]
    assert from_tokens[0].text == "ab"


def test_too_long_prompts_are_found_without_reading_them(prefix: str) -> None:
    rows = load_prompts(prefix)
    with pytest.raises(DataLoadError, match=r"_prompts.npy, row 2: \d+ tokens, but max_prompt_length is 5"):
        prepared(rows, max_prompt_length=5)
    dropped = prepared(rows, max_prompt_length=5, overflow="drop")
    assert [p.index for p in dropped] == [0]
    assert dropped.fitting.dropped == 2
    assert (
        len(prepared(rows[::2], max_prompt_length=6, overflow="drop")) == 2
    )  # six tokens are not more than six
    cut = prepared(rows, max_prompt_length=5, overflow="keep_end")
    assert (TOKENIZER.decode(list(cut[2].ids)), cut[2].text) == ("onger", "longer")  # a reward reads it whole
    assert (
        str(cut.fitting)
        == "2 of 3 prompts have more than 5 tokens (max_prompt_length): their last 5 were kept"
    )


def test_another_tokenizer_is_refused(prefix: str) -> None:
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "bot")  # type: ignore[union-attr]
    with pytest.raises(
        DataLoadError, match=r"_tokenizer.json: these ids were made by the tokenizer of another model"
    ):
        PreparedPrompts(TokenizerWrapper(other), load_prompts(prefix), max_prompt_length=99)
    assert fingerprint(TOKENIZER) == fingerprint(TokenizerWrapper(byte_tokenizer()))
    bigger = byte_tokenizer()
    bigger.add_tokens(["<new>"])
    assert fingerprint(TokenizerWrapper(bigger)) != fingerprint(TOKENIZER)


def test_ids_outside_the_vocabulary_never_reach_the_model(prefix: str) -> None:
    ids = np.load(f"{prefix}_prompts.npy", mmap_mode="r+")
    ids[0] = 1_000_000
    ids.flush()
    with pytest.raises(
        DataLoadError, match="row 1: token ids from 0 to 258 are expected, found 65 to 1000000"
    ):
        prepared(load_prompts(prefix))[0]
    Path(f"{prefix}_tokenizer.json").unlink()
    with pytest.raises(DataLoadError, match=r"ids from 0 to 258 are expected, found .* to 1000000"):
        prepared(load_prompts(prefix))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("prompts", b"", "not an NPY file"),
        ("prompts", b"\x93NUMPY\x01\x00", "not an NPY file"),
        ("prompts", np.zeros(3, dtype=np.float32), "a flat array of int32 is expected, found float32"),
        (
            "prompts",
            np.zeros((3, 2), dtype=np.int32),
            "a flat array of int32 is expected, found int32 of shape",
        ),
        ("prompts", np.zeros(3, dtype=np.int32), "offsets from 0 to 3, never falling, are expected"),
        ("prompts_offsets", np.array([0, 5, 2, 6]), "never falling"),
        ("completions_offsets", np.array([0, 1, 4]), "3 rows are expected, as in train_prompts.npy, found 2"),
        ("columns", np.zeros(3, dtype=np.uint8), "offsets from 0 to 3"),
    ],
)
def test_damaged_parts_are_named(prefix: str, name: str, data: Any, sentence: str) -> None:
    path = Path(f"{prefix}_{name}.npy")
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        np.save(path, data)
    with pytest.raises(DataLoadError, match=sentence) as caught:
        load_prompts(prefix)
    assert str(caught.value).startswith(prefix)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(prefix: str) -> None:
    path = Path(f"{prefix}_prompts.npy")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataLoadError, match=r"_prompts.npy: not an NPY file that can be mapped"):
        load_prompts(prefix)


def test_damaged_columns_are_named_by_row(prefix: str) -> None:
    data = np.load(f"{prefix}_columns.npy", mmap_mode="r+")
    data[0] = ord("#")
    data.flush()
    rows = load_prompts(prefix)
    with pytest.raises(DataLoadError, match="row 1: its columns are no JSON object"):
        rows[0]
    assert rows[1]["n"] == ROWS[1]["n"]
    Path(f"{prefix}_tokenizer.json").write_text("{}")
    with pytest.raises(DataLoadError, match='the tokenizer\'s "fingerprint" is missing'):
        load_prompts(prefix)


def test_options_for_texts_are_refused_for_tokens(prefix: str) -> None:
    with pytest.raises(
        InvalidConfigurationError, match=r"filter_keywords: .* give filter_keywords to preprocess"
    ):
        load_prompts(prefix, DataConfig(filter_keywords=["a"]))
    with pytest.raises(InvalidConfigurationError, match="system_prompt"):
        load_prompts(prefix, DataConfig(system_prompt="a"))
    with pytest.raises(DataLoadError, match="preferences are read from texts"):
        load_preferences(prefix)
    Path(f"{prefix}_completions.npy").unlink()
    with pytest.raises(DataLoadError, match=r"_completions.npy: not there, and pairs need completions"):
        load_pairs(prefix)


# The older system's files ---------------------------------------------------------------------------------


def object_array(rows: list[Any]) -> np.ndarray:
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


@pytest.mark.parametrize(
    "rows",
    [
        object_array([np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32)]),
        object_array([[1, 2], [3]]),
        object_array([np.array([1, 2], dtype=np.int64), [3]]),
    ],
)
def test_object_arrays_of_the_older_system_are_read(tmp_path: Path, rows: np.ndarray) -> None:
    for part in ("prompts", "completions"):
        np.save(tmp_path / f"old_{part}.npy", rows, allow_pickle=True)
    found = load_pairs(tmp_path / "old")
    assert [row["prompt_ids"].tolist() for row in found] == [[1, 2], [3]]
    assert [row["completion_ids"].tolist() for row in found] == [[1, 2], [3]]


def test_rows_of_one_length_are_a_plain_array(tmp_path: Path) -> None:
    np.save(tmp_path / "old_prompts.npy", np.array([[1, 2], [3, 4]], dtype=np.int32))
    assert [row["prompt_ids"].tolist() for row in load_prompts(tmp_path / "old")] == [[1, 2], [3, 4]]


MARKER = Path(tempfile.gettempdir()) / f"made-by-a-pickle-{os.getpid()}"


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (MARKER,))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (object_array([Evil(), [1]]), "only NumPy arrays are read"),
        (object_array([eval, [1]]), "only NumPy arrays are read"),
        (object_array([["a"], [1]]), "row 1: a list of token ids is expected"),
        (object_array([[1], 2.5]), "row 2: a list of token ids is expected"),
        (object_array([[1], [[2], [3, 4]]]), "row 2: a list of token ids is expected"),
        (object_array([[1], [-1]]), r"row 2: token ids from 0 to 2\^31"),
        (np.array([1.5, 2.5]), "row 1: a list of token ids is expected"),
    ],
)
def test_a_pickle_that_is_no_array_is_never_run(tmp_path: Path, rows: np.ndarray, sentence: str) -> None:
    np.save(tmp_path / "old_prompts.npy", rows, allow_pickle=True)
    with pytest.raises(DataLoadError, match=sentence):
        load_prompts(tmp_path / "old")
    made = MARKER.exists()
    MARKER.unlink(missing_ok=True)
    assert not made


def test_a_pickle_in_place_of_the_array_is_not_run_either(tmp_path: Path) -> None:
    header = tmp_path / "old_prompts.npy"
    np.save(header, object_array([[1]]), allow_pickle=True)
    start = header.read_bytes().index(b"\n") + 1
    header.write_bytes(header.read_bytes()[:start] + pickle.dumps(Evil()))
    with pytest.raises(DataLoadError, match="only NumPy arrays are read"):
        load_prompts(tmp_path / "old")
    header.write_bytes(header.read_bytes()[:start] + pickle.dumps([1, 2]))
    with pytest.raises(DataLoadError, match="an array of rows of token ids is expected"):
        load_prompts(tmp_path / "old")


# Preprocess ----------------------------------------------------------------------------------------------


def texts(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "completion": "c{i}", "k": {i}}}\n' for i in range(20)))
    return path


def test_preprocess_writes_what_load_data_selects(tmp_path: Path) -> None:
    config = TrainingConfig(train_path=str(texts(tmp_path)), validation_fraction=0.25, filter_keywords=["P7"])
    done = preprocess(config, tmp_path / "out" / "train", tmp_path / "out" / "val.jsonl", tokenizer=TOKENIZER)
    assert [written.rows for written in done.outputs] == [14, 5]
    assert done.outputs[0].tokens == sum(
        2 * len(f"p{row['k']}") for row in load_prompts(tmp_path / "out" / "train")
    )
    assert "1 left out by filter_keywords" in str(done)
    train, val = load_prompts(tmp_path / "out" / "train"), load_prompts(tmp_path / "out" / "val.jsonl")
    assert {row["k"] for row in train} | {row["k"] for row in val} == set(range(20)) - {7}
    assert not {row["k"] for row in train} & {row["k"] for row in val}
    assert all(row["completion"] == f"c{row['k']}" for row in val)
    prompts = prepared(train)
    assert all(
        p.text == f"p{p.columns['k']}" and p.columns["completion"] == f"c{p.columns['k']}" for p in prompts
    )


def test_pairs_and_texts_are_tokenised_for_sft(tmp_path: Path) -> None:
    preprocess(
        TrainingConfig(train_path=str(texts(tmp_path))), tmp_path / "p", tokenizer=TOKENIZER, kind="pairs"
    )
    row = load_pairs(tmp_path / "p")[3]
    assert (
        TOKENIZER.decode(row["prompt_ids"].tolist()),
        TOKENIZER.decode(row["completion_ids"].tolist()),
    ) == (
        "p3",
        "c3",
    )
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n')
    config = TrainingConfig(train_path=str(tmp_path / "t.jsonl"))
    preprocess(config, tmp_path / "t", tokenizer=TOKENIZER, kind="pairs")
    row = load_pairs(tmp_path / "t")[0]
    assert [len(row["prompt_ids"]), len(row["completion_ids"])] == [1, 2]


def test_preprocess_refuses_in_a_sentence_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    config = TrainingConfig(train_path=str(texts(tmp_path)), max_prompt_length=2)
    with pytest.raises(DataLoadError, match=r"rows.jsonl:11: 3 tokens, but max_prompt_length is 2"):
        preprocess(config, tmp_path / "out" / "x", tokenizer=TOKENIZER)
    assert list((tmp_path / "out").iterdir()) == []
    done = preprocess(config.replace(prompt_overflow="drop"), tmp_path / "x", tokenizer=TOKENIZER)
    assert done.outputs[0].rows == 10
    assert "10 of 20 prompts have more than 2 tokens (max_prompt_length): they were left out" in done.notes
    with pytest.raises(DataLoadError, match="output_val_path: there are no validation rows"):
        preprocess(config, tmp_path / "x", tmp_path / "y", tokenizer=TOKENIZER)
    with pytest.raises(DataLoadError, match="cannot be written"):
        preprocess(config, texts(tmp_path) / "x.jsonl", tokenizer=TOKENIZER)
    with pytest.raises(DataLoadError, match="the rows are tokenised already"):
        preprocess(TrainingConfig(train_path=str(tmp_path / "x")), tmp_path / "z", tokenizer=TOKENIZER)


def test_parts_of_an_earlier_run_do_not_stay_behind(prefix: str) -> None:
    with TokenWriter(prefix, {"fingerprint": fingerprint(TOKENIZER)}) as writer:
        writer.add([1], None, {})
    rows = load_prompts(prefix)
    assert [dict(row) for row in rows] == [{"prompt_ids": rows[0]["prompt_ids"]}]
    assert not Path(f"{prefix}_columns_offsets.npy").exists()


def test_ragged_rows_by_hand() -> None:
    ragged = Ragged.of([[1, 2], [], [3]], np.int32)
    assert ragged.values.tolist() == [1, 2, 3]
    assert ragged.offsets.tolist() == [0, 2, 2, 3]
    assert ragged.lengths.tolist() == [2, 0, 1]
    assert [row.tolist() for row in ragged] == [[1, 2], [], [3]]


def test_both_outputs_of_preprocess_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    config = TrainingConfig(train_path=str(tmp_path / "a.jsonl"), validation_fraction=0.5)
    for other in (tmp_path / "o.jsonl", tmp_path / "x" / ".." / "o.jsonl"):
        with pytest.raises(InvalidConfigurationError, match=r"output_val_path: .* would take its place"):
            preprocess(config, tmp_path / "o.jsonl", other, tokenizer=TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_text_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a"], "x": [float("nan")]}).to_parquet(str(tmp_path / "a.parquet"))
    config = TrainingConfig(train_path=str(tmp_path / "a.parquet"))
    with pytest.raises(DataLoadError, match="cannot be written as JSON"):
        preprocess(config, tmp_path / "o.jsonl", tokenizer=TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def written(path: Path, prompts: list[list[int]]) -> str:
    with TokenWriter(path, {"fingerprint": fingerprint(TOKENIZER)}) as writer:
        for prompt in prompts:
            writer.add(prompt, [1], {})
    return str(path)


def test_the_fingerprint_is_of_all_lengths_and_of_256_rows(tmp_path: Path) -> None:
    """Of 1000 rows, rows 0 and 999 are among the 256 that are spread evenly (999/255 = 3.92 apart), row 1 is not."""

    def print_of(name: str, *changes: tuple[int, list[int]]) -> str:
        rows = [[5, 6] for _ in range(1000)]
        for index, ids in changes:
            rows[index] = ids
        return prepared(load_prompts(written(tmp_path / name / "train", rows))).fingerprint

    plain = print_of("plain")
    assert print_of("same") == plain
    assert print_of("first", (0, [5, 7])) != plain
    assert print_of("last", (999, [5, 7])) != plain
    assert print_of("between", (1, [5, 7])) == plain  # what is not read is not compared (docs/durability.md)
    assert print_of("longer", (1, [5, 6, 7])) != plain
    assert print_of("order", (0, [6, 5])) != plain
