"""Whatever is in a file: rows that trainers take, or one sentence. Never another exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.tokenizer_setup import byte_tokenizer, encode_pair
from config.data_config import DataConfig
from config.errors import ToolkitError
from data_loading.checking import check_file
from data_loading.loading import load_pairs, load_preferences, load_prompts
from data_loading.prepared_prompts import PreparedPrompts

TOKENIZER = TokenizerWrapper(byte_tokenizer())
LOADERS: tuple[Callable[..., Any], ...] = (load_prompts, load_pairs, load_preferences)
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # NumPy parses headers as Python
fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

texts = st.text(st.characters(exclude_categories=()), max_size=6)
numbers = st.one_of(st.integers(-(10**30), 10**30), st.floats(), st.booleans(), st.none())
messages = st.lists(st.dictionaries(st.sampled_from(["role", "content"]), texts), max_size=3)
values = st.recursive(
    st.one_of(texts, numbers, messages), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
columns = ["prompt", "completion", "chosen", "rejected", "messages", "text", "reward", "label", "completions"]
names = st.sampled_from([*columns, "rewards", "system", "answer"])
rows = st.dictionaries(st.one_of(names, names, texts), values, max_size=4)
lines = st.one_of(
    rows.map(json.dumps),
    rows.map(json.dumps).flatmap(lambda s: st.integers(0, len(s)).map(lambda cut: s[:cut])),
    texts,
    st.sampled_from(
        ["", "[", "{", "NaN", '{"prompt": 1e999}', "\x00", "\ufeff", '"', "[" * 2000, "{" * 2000]
    ),
)


def one_sentence(error: ToolkitError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1500


def outcome(path: Any) -> None:
    """Every loader and the check give rows or a sentence; the rows can be tokenised."""
    for load in LOADERS:
        for on_bad_row in ("error", "skip"):
            try:
                found = load(path, DataConfig(on_bad_row=on_bad_row))
                assert len(found) == found.report.used > 0
                for row in found:
                    _tokenise(load, row)
            except ToolkitError as error:
                one_sentence(error)
    if isinstance(path, Path):
        try:
            str(check_file(path))
        except ToolkitError as error:  # the file as a whole cannot be read
            one_sentence(error)


def _tokenise(load: Callable[..., Any], row: Any) -> None:
    if load is load_prompts:
        assert len(PreparedPrompts(TOKENIZER, [row], max_prompt_length=10**6)[0].ids) > 0
    elif load is load_pairs:
        assert all(encode_pair(TOKENIZER, row))
    else:
        for side in ("chosen", "rejected") if "chosen" in row else ("completion",):
            assert encode_pair(TOKENIZER, row, side)[1]
        assert np.isfinite(row.get("reward", 0.0))


@fuzz
@given(st.lists(lines, max_size=4), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_lines(tmp_path: Path, content: list[str], end: str, bom: bool) -> None:
    path = tmp_path / "rows.jsonl"
    data = end.join(content).encode("utf-8", "surrogatepass")
    path.write_bytes(b"\xef\xbb\xbf" * bom + data)
    outcome(path)


@fuzz
@given(st.lists(rows, min_size=1, max_size=3))
def test_rows_in_memory(content: list[Any]) -> None:
    outcome(content)


@fuzz
@given(st.lists(rows, max_size=3), st.integers(0, 400), st.text(max_size=2))
def test_arrays_cut_anywhere(tmp_path: Path, content: list[Any], cut: int, more: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content, indent=1)[:cut] + more, encoding="utf-8")
    outcome(path)


@fuzz
@given(st.binary(max_size=60), st.sampled_from([b"", b"prompt\n", b"prompt,completion\n", b"text,reward\n"]))
def test_csv_of_any_bytes(tmp_path: Path, data: bytes, header: bytes) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(header + data)
    outcome(path)


@fuzz
@given(st.binary(max_size=200), st.integers(0, 200), st.sampled_from(["prompts", "prompts_offsets"]))
def test_npy_with_bytes_overwritten(tmp_path: Path, data: bytes, position: int, part: str) -> None:
    np.save(tmp_path / "a_prompts.npy", np.arange(6, dtype=np.int32))
    np.save(tmp_path / "a_prompts_offsets.npy", np.array([0, 2, 6]))
    path = tmp_path / f"a_{part}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:position] + data + whole[position + len(data) :])
    try:
        found = load_prompts(tmp_path / "a")
        list(PreparedPrompts(TOKENIZER, found, max_prompt_length=9))
    except ToolkitError as error:
        one_sentence(error)


@fuzz
@given(st.binary(max_size=80), st.integers(0, 250))
def test_pickles_with_bytes_overwritten(tmp_path: Path, data: bytes, position: int) -> None:
    rows_of_ids = np.empty(2, dtype=object)
    rows_of_ids[:] = [[1, 2], [3]]
    path = tmp_path / "a_prompts.npy"
    np.save(path, rows_of_ids, allow_pickle=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:position] + data + whole[position + len(data) :])
    try:
        list(load_prompts(tmp_path / "a"))
    except ToolkitError as error:
        one_sentence(error)


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "' + b"x" * 100_000_000 + b'"}\n{"prompt": "a"}\n')
    with pytest.raises(ToolkitError, match=r"rows\.jsonl:1: a row of more than 64 MiB"):
        load_prompts(path)
    assert len(load_prompts(path, DataConfig(on_bad_row="skip"))) == 1
