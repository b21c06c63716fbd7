"""Parsers: dashes and underscores, nearest names, one line of complaint."""

from __future__ import annotations

import argparse

import pytest

from command_line.parsing import Parser, count, one_of


def parser() -> Parser:
    made = Parser("prog", "what it does", ["prog --learning-rate 1"])
    made.add_argument("--learning-rate")
    made.add_argument("--template", type=one_of(["minimal", "standard"]))
    made.add_argument("--steps", type=count)
    made.add_argument("rest", nargs="*")
    return made


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_underscores_in_an_option_are_dashes_and_in_its_value_are_not() -> None:
    assert parser().parse_args(["--learning_rate", "a_b"]).learning_rate == "a_b"
    assert parser().parse_args(["--learning_rate=a_b"]).learning_rate == "a_b"
    assert parser().parse_args(["x_y"]).rest == ["x_y"]


def test_a_mistyped_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    complaint = refused(capsys, "--learning_rat", "1")
    assert 'unrecognized arguments: --learning_rat; did you mean "--learning-rate"?' in complaint
    assert "prog --help lists the options" in complaint
    assert len(complaint.splitlines()) == 2


def test_an_option_like_no_other_names_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in refused(capsys, "--qqqqqqqq")


def test_an_abbreviation_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'did you mean "--template"?' in refused(capsys, "--templ", "minimal")


def test_one_of_a_few_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser().parse_args(["--template", "minimal"]).template == "minimal"
    complaint = refused(capsys, "--template", "minmal")
    assert "'minmal' is none of minimal, standard; did you mean \"minimal\"?" in complaint


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "", "²", "1" * 30])
def test_a_count_is_a_whole_number(text: str) -> None:
    assert count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number from 0 up is expected"):
        count(text)


def test_the_help_ends_with_the_examples() -> None:
    assert parser().format_help().endswith("examples:\n  prog --learning-rate 1\n")
