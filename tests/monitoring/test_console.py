"""The terminal in good and bad days: a pipe, a real terminal, ASCII, 40 columns, a reader that left."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from monitoring.console import BLOCKS, PLAIN_BLOCKS, StageConsole, sparkline
from monitoring.samples import before_after_table, printable

ROOT = Path(__file__).parents[2]
NASTY = " 9 [/red] [bold]1\n3\x1b[2J\x07 \u202e好"

SHOW_EVERYTHING = f"""
from monitoring.console import StageConsole
from monitoring.samples import before_after_table
console = StageConsole()
console.stage("SFT", "the model learns [/red] what a sequence looks like … → ⏎")
with console.progress(total=50, label="SFT") as bar:
    for step in range(1, 51):
        if step == 25:
            print("a print of somebody else")
        bar.update(step, f"loss {{1 / step:.3f}} [/x]")
console.curve("reward", [0.1, float("nan"), 0.5, 0.9])
table = before_after_table(
    [["8", ({NASTY!r}, 0.0), (" 10 12 14", 0.6)], ["120", ("", None), ("1 " * 400, 0.1)]],
    ["prompt", "before", "after PPO"],
)
console.show(table)
console.summary_table([{{"stage": "SFT", "loss": 0.123456}}, {{"stage": "PPO", "kl": None}}], "End")
"""


def environment(**extra: str) -> dict[str, str]:
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    return kept | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8", "TERM": "xterm-256color"} | extra


def run_in_a_pipe(code: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**extra), capture_output=True, timeout=60
    )


def run_in_a_terminal(code: str, **extra: str) -> tuple[int, str, str]:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(**extra),
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    shown = b""
    deadline = threading.Timer(60, process.kill)  # a run that hangs fails instead of hanging us
    deadline.start()
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # Linux says so when the other side is closed
        pass
    _, errors = process.communicate()
    deadline.cancel()
    os.close(ours)
    return process.returncode, shown.decode("utf-8", errors="replace"), errors.decode()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("columns", ["80", "40"])
def test_in_a_pipe_there_are_plain_lines_and_no_control_characters(encoding: str, columns: str) -> None:
    done = run_in_a_pipe(SHOW_EVERYTHING, PYTHONIOENCODING=encoding, COLUMNS=columns)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert not [character for character in text if ord(character) < 32 and character != "\n"]
    lines = [line for line in text.splitlines() if line.startswith("  SFT ")]
    assert len(lines) == 10  # one line each tenth of the way
    assert lines[0].startswith("  SFT 5/50  loss 0.200 [/x]  (")
    assert lines[-1].startswith("  SFT 50/50  loss 0.020 [/x]  (")
    assert "\\x1b[2J" in text.replace("\n", "") or columns == "40"
    assert ("▁" in text) == (encoding == "utf-8")


@pytest.mark.parametrize("columns", ["80", "40"])
def test_on_a_terminal_there_is_one_live_line_that_fits(columns: str) -> None:
    code, shown, errors = run_in_a_terminal(SHOW_EVERYTHING, COLUMNS=columns)
    assert (code, errors) == (0, "")
    assert "\r" in shown
    assert " 50/50" in shown
    assert "a print of somebody else" in shown
    assert "\x1b[2J" not in shown.replace("\\x1b[2J", "")  # the model does not clear the screen


def test_a_terminal_without_colour() -> None:
    code, shown, errors = run_in_a_terminal(SHOW_EVERYTHING, NO_COLOR="1", COLUMNS="80")
    assert (code, errors) == (0, "")
    assert "\x1b[32m" not in shown
    assert "\x1b[32m" in run_in_a_terminal(SHOW_EVERYTHING, COLUMNS="80")[1]


def test_a_dumb_or_ascii_terminal() -> None:
    code, shown, errors = run_in_a_terminal(SHOW_EVERYTHING, TERM="dumb", COLUMNS="80")
    assert (code, errors) == (0, "")
    assert "\x1b[" not in shown.replace("\\x1b[", "")
    code, shown, errors = run_in_a_terminal(SHOW_EVERYTHING, PYTHONIOENCODING="ascii", COLUMNS="40")
    assert (code, errors) == (0, "")
    assert shown.isascii()


def test_a_reader_that_leaves_ends_nothing() -> None:
    # More than a pipe holds, so that the writer does notice. What matters goes to stderr afterwards.
    code = (
        "import sys\n"
        "from monitoring.console import StageConsole\n"
        "console = StageConsole()\n"
        "with console.progress(total=10, label='SFT') as bar:\n"
        "    for step in range(1, 11):\n"
        "        console.note('x' * 100_000)\n"
        "        bar.update(step)\n"
        "print('a plain print')\n"
        "print('went on to the end', file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert errors == b"went on to the end\n"


def test_a_closed_stream_ends_nothing() -> None:
    stream = io.StringIO()
    console = StageConsole(stream)
    stream.close()
    console.stage("SFT", "nobody reads this")
    with console.progress(2, "SFT") as bar:
        bar.update(2)


def test_the_last_step_is_reported_when_a_stage_ends_early() -> None:
    stream = io.StringIO()
    with StageConsole(stream).progress(1000, "PPO") as bar:
        for step in range(1, 108):
            bar.update(step)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["100/1000", "107/1000"]


def test_a_failure_inside_a_stage_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), StageConsole(io.StringIO()).progress(0, "PPO"):
        raise ZeroDivisionError


# Sparklines ------------------------------------------------------------------------------------------


def test_a_sparkline_goes_from_the_lowest_to_the_highest_block() -> None:
    assert sparkline(range(8), encoding="utf-8") == BLOCKS
    assert sparkline(range(7, -1, -1), encoding="utf-8") == BLOCKS[::-1]
    assert sparkline(range(8), encoding="ascii") == PLAIN_BLOCKS
    assert sparkline(range(8), encoding="latin-1") == PLAIN_BLOCKS


def test_a_long_curve_is_averaged_in_stretches() -> None:
    # Stretches of four: means 0, 1, …, 7.
    values = [stretch + wobble for stretch in range(8) for wobble in (-0.5, 0.5, -0.25, 0.25)]
    assert sparkline(values, width=8, encoding="utf-8") == BLOCKS


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([2.0, 2.0], "▄▄"),
        ([math.nan, math.inf], "  "),
        ([0.0, math.nan, 1.0], "▁ █"),
        ([-1e308, 1e308], "▁█"),
    ],
)
def test_curves_that_are_hardly_curves(values: list[float], shown: str) -> None:
    assert sparkline(values, encoding="utf-8") == shown


# Tables ----------------------------------------------------------------------------------------------


def rendered(table: object, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def test_completions_are_shown_side_by_side_and_safely() -> None:
    table = before_after_table(
        [["8", (NASTY, 0.0), (" 10 12 14 16 18", 1.0), ("", None)]],
        ["prompt", "before", "after PPO", "after [GRPO]"],
    )
    shown = rendered(table, 80)
    assert all(cell_len(line) <= 80 for line in shown.splitlines())
    words = " ".join(shown.split())
    for expected in (
        "9 [/red]",
        "⏎3",
        "\\x1b[2J\\x07",
        "(0.00)",
        "(1.00)",
        "(empty)",
        "(no score)",
        "[GRPO]",
    ):
        assert expected in words
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_a_table_fits_40_columns_and_long_texts_are_cut() -> None:
    table = before_after_table([["8", ("word " * 1000, 0.5)]], ["prompt", "before"], longest=50)
    shown = rendered(table, 40)
    assert all(cell_len(line) <= 40 for line in shown.splitlines())
    assert "…" in shown
    assert len(shown.splitlines()) < 8


def test_a_row_must_fit_the_titles() -> None:
    with pytest.raises(ValueError, match="2 cells does not fit 3 titles"):
        before_after_table([["8", "9"]], ["prompt", "before", "after"])


def test_printable_text_is_one_harmless_line() -> None:
    assert printable("a\nb\r\nc\td") == "a⏎b⏎c d"
    assert printable("\x00\x7f\x9b\ud800\u2028") == r"\x00\x7f\x9b\ud800\u2028"
    assert printable("é好👩‍🚀") == "é好👩‍🚀"  # the joiner inside an emoji stays


def test_the_summary_has_every_column_and_a_dash_for_what_is_missing() -> None:
    stream = io.StringIO()
    StageConsole(stream).summary_table(
        [{"stage": "SFT", "loss": 0.123456}, {"stage": "PPO", "reward": 0.9, "steps": 200}], "Result"
    )
    lines = [line.split() for line in stream.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["Result"]
    assert lines[1] == ["stage", "loss", "reward", "steps"]
    assert lines[3:] == [["SFT", "0.1235", "-", "-"], ["PPO", "-", "0.9", "200"]]
