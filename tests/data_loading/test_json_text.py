"""Strict JSON: what is accepted, what is refused and where."""

from __future__ import annotations

import datetime
import json

import pytest

from config.errors import DataLoadError
from data_loading.json_text import parse_object, to_json
from data_loading.records import BadRowError


def test_an_object_is_read_as_the_standard_library_reads_it() -> None:
    text = ' {"a": 1, "b": [1.5, null, true, "\\u00e9\\ud83d\\ude42"], "c": {"d": -2e3}}\t\r\n'
    assert parse_object(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1', r"not JSON at column 8 \(expecting ',' delimiter; the line ends there\)"),
        ("{'a': 1}", r"not JSON at column 2 .*; strings take double quotes"),
        ('{"a": 1} {"a": 2}', r"more text after the row at column 9"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "whole number of 5000 digits"),
        ('{"a": 1, "b": 2, "a": 3}', 'the field "a" is there twice'),
        ('{"a": {"b": 1, "b": 1}}', 'the field "b" is there twice'),
        ("[1]", "found a list"),
        ("3", "found a number"),
        ("true", "found true/false"),
        ('"text"', "found a text"),
        ("null", "found null"),
        ('{"a": "\x01"}', "invalid control character"),
        ('{"a": ' + "[" * 101 + "]" * 101 + "}", "more than 100 deep"),
        ('{"a": ' + "[" * 100_000, "more than 100 deep"),
    ],
)
def test_what_is_no_row_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(BadRowError, match=sentence) as caught:
        parse_object(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_deepest_nesting_that_is_read() -> None:
    """The object itself is one level, ninety-nine lists are the others."""
    assert parse_object('{"a": ' + "[" * 99 + "]" * 99 + "}")["a"] is not None
    wide = {"a": [[] for _ in range(500)]}  # many, not deep
    assert parse_object(json.dumps(wide)) == wide


def test_what_is_written_is_read_back() -> None:
    fields = {"a": "é🙂\n", "b": [1, None, {"c": 0.5}], "half": "\ud83d"}
    assert parse_object(to_json(fields, "row 1")) == fields
    assert to_json({"day": datetime.date(2024, 5, 6)}, "row 1") == '{"day": "2024-05-06"}'
    for value in (float("nan"), b"bytes", object()):
        with pytest.raises(DataLoadError, match=r"^row 1: cannot be written as JSON"):
            to_json({"a": value}, "row 1")


def test_a_field_given_twice_is_found_among_many_at_once() -> None:
    """Linear: 200,000 fields compared with each other would take minutes."""
    fields = ",".join(f'"k{i}":1' for i in range(200_000))
    with pytest.raises(BadRowError, match='the field "k199999" is there twice'):
        parse_object(f'{{{fields},"k199999":1}}')
