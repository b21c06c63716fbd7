"""What the terminal shows: a heading per stage, one line of progress, curves and tables of text.

    console = StageConsole()
    console.stage("SFT", "the model learns what a sequence looks like")
    with console.progress(total=400, label="SFT") as bar:
        for step in range(1, 401):
            ...
            bar.update(step, f"loss {loss:.3f}")
    console.curve("reward", rewards)

On a terminal the progress is one live line. In a log file or a pipe it is a plain line every tenth of
the way. Output must never end a run: a reader that went away (``| head``), an encoding without ⏎, a
window of 40 columns or ``NO_COLOR`` change what is shown and nothing else.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from monitoring.samples import printable

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.:-=+*#"
REFRESH_SECONDS = 0.1
# One column for one column, so that tables stay aligned. Everything else that cannot be encoded is "?".
_LOOKALIKES = str.maketrans(
    {"…": "~", "⏎": "/", "·": "-", "→": ">", "—": "-", "–": "-", "━": "=", "─": "-", "’": "'", "−": "-"}
    | dict(zip(BLOCKS, PLAIN_BLOCKS, strict=True))
)


class StageConsole:
    """Everything that a run prints goes through one of these."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = _PatientStream(stream)
        self.rich = Console(file=self.stream, highlight=False, soft_wrap=False)  # type: ignore[arg-type]

    @property
    def live(self) -> bool:
        """Is there a terminal on which a line can be rewritten?"""
        return self.rich.is_terminal and not self.rich.is_dumb_terminal

    def stage(self, name: str, text: str = "") -> None:
        """Start a stage of the pipeline: ``stage("SFT", "the model learns the format")``."""
        heading = Text.assemble((printable(name), "bold"), "  " if text else "", printable(text))
        self.rich.print()
        self.rich.print(heading)

    def note(self, text: str) -> None:
        """One line of plain text, indented under its stage; brackets in it are brackets."""
        self.rich.print(Text("  " + printable(text)), soft_wrap=not self.live)

    def show(self, renderable: RenderableType) -> None:
        """A table, or anything else that rich can print."""
        self.rich.print(renderable)

    def curve(self, label: str, values: Sequence[float], width: int = 40) -> None:
        """A sparkline with its first and last value, such as ``reward ▁▂▄▇█ 0.12 → 0.83``."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return self.note(f"{label}: no values")
        width = max(4, min(width, self.rich.width - len(label) - 24))
        line = sparkline(values, width, encoding=self.stream.encoding)
        self.note(f"{label} {line} {_number(finite[0])} → {_number(finite[-1])}")

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Progress]:
        """Show how far a stage is; ``update`` the yielded object after each step."""
        progress = Progress(self, total, label)
        try:
            yield progress
        finally:
            progress.close()

    def summary_table(self, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
        """Print one line per mapping; the columns are the keys in the order in which they turn up."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if not columns:
            return
        table = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            title=Text(printable(title)) if title else None,
            title_justify="left",
        )
        for column in columns:
            numeric = all(_is_number(row[column]) for row in rows if row.get(column) is not None)
            table.add_column(Text(printable(column)), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_number(row.get(column))) for column in columns))
        self.rich.print()
        self.rich.print(table)


class Progress:
    """One line of progress, live or in tenths. ``StageConsole.progress`` makes it."""

    def __init__(self, console: StageConsole, total: int, label: str) -> None:
        self.console, self.total, self.label = console, max(int(total), 1), printable(label)
        self.step, self.text = 0, ""
        self._start = time.monotonic()
        self._drawn = -math.inf  # when the live line was last drawn
        self._tenths = 0  # how many tenths have been reported
        self._reported = -1  # the step that was last reported
        self._live = Live(console=console.rich, auto_refresh=False) if console.live else None
        if self._live is not None:
            self._live.start()

    def update(self, step: int, metrics_text: str = "") -> None:
        """``step`` of ``total`` steps are done; ``metrics_text`` is a word on how it goes."""
        self.step, self.text = int(step), printable(metrics_text)
        if self._live is not None:
            now = time.monotonic()
            if now - self._drawn >= REFRESH_SECONDS:
                self._drawn = now
                self._live.update(self._live_line(), refresh=True)
            return
        tenths = 10 * self.step // self.total
        if tenths > self._tenths:
            self._tenths = tenths
            self._report()

    def close(self) -> None:
        """Show the last state and let it stand."""
        if self._live is not None:
            self._live.update(self._live_line(), refresh=True)
            self._live.stop()
        elif self.step != self._reported and self.step > 0:
            self._report()

    def _report(self) -> None:
        self._reported = self.step
        parts = [f"  {self.label} {self.step}/{self.total}", self.text, f"({_clock(self._elapsed)})"]
        self.console.rich.print(Text("  ".join(part for part in parts if part)), soft_wrap=True)

    def _live_line(self) -> Text:
        """``label ━━━━──── 120/400  0:12<0:28  loss 0.31``; a narrow window has no bar, then no clock."""
        width = self.console.rich.width - 1
        count = f"{self.step:>{len(str(self.total))}}/{self.total}"
        clock = _clock(self._elapsed)
        if 0 < self.step < self.total:
            clock += "<" + _clock(self._elapsed * (self.total - self.step) / self.step)
        needed = len(self.label) + len(count) + len(self.text) + 8
        parts: list[tuple[str, str]] = [(f"  {self.label} ", "")]
        if needed + len(clock) + 12 <= width:
            length = min(20, width - needed - len(clock))
            done = round(length * min(self.step / self.total, 1.0))
            parts += [("━" * done, "green"), ("─" * (length - done), "dim"), (" ", "")]
        parts.append((count, ""))
        if needed + len(clock) <= width:
            parts.append((f"  {clock}", "dim"))
        parts.append((f"  {self.text}", ""))
        line = Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
        line.truncate(width, overflow="ellipsis")
        return line

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._start


def sparkline(values: Sequence[float], width: int = 40, *, encoding: str | None = None) -> str:
    """A curve in one line of text, lowest value to highest; NaN is a gap.

    More values than ``width`` are averaged in equal stretches. If ``encoding`` (that of the standard
    output, unless given) has no block characters, the line is made of ``_.:-=+*#``.

    >>> sparkline([0, 1, 2, 3], encoding="utf-8"), sparkline([0, 1, 2, 3], encoding="ascii")
    ('▁▃▆█', '_:+#')
    """
    points = np.asarray([math.nan if value is None else value for value in values], dtype=np.float64)
    points[~np.isfinite(points)] = np.nan
    if width < 1 or points.size == 0:
        return ""
    if points.size > width:
        stretches = np.array_split(points, width)
        points = np.array([_mean(stretch) for stretch in stretches])
    blocks = (
        BLOCKS if _can_encode(BLOCKS, encoding or getattr(sys.stdout, "encoding", None)) else PLAIN_BLOCKS
    )
    finite = points[~np.isnan(points)]
    if finite.size == 0:
        return " " * points.size
    low, high = float(finite.min()), float(finite.max())
    if high <= low:  # a flat curve is drawn at half height
        return "".join(" " if math.isnan(point) else blocks[3] for point in points)
    # Halve before subtracting: high - low may be too large for a float.
    heights = (points / 2 - low / 2) / (high / 2 - low / 2)  # in [0, 1]
    return "".join(" " if math.isnan(height) else blocks[round(height * 7)] for height in heights)


class _PatientStream:
    """A text stream that shows what it can and keeps quiet about the rest.

    What the encoding lacks is replaced by a look-alike. Once the reader has gone, writing does nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._gone = False

    @property
    def _target(self) -> TextIO | None:
        # Looked up each time, as print does, so that output can be redirected after the console was made.
        # While a line is live, rich puts a proxy in its place that writes to us: step behind it.
        stream = self._stream if self._stream is not None else sys.stdout
        return getattr(stream, "rich_proxied_file", stream)

    @property
    def encoding(self) -> str:
        return getattr(self._target, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if not self._gone and self._target is not None:
            try:
                self._target.write(_encodable(text, self.encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if not self._gone and self._target is not None:
            try:
                self._target.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def isatty(self) -> bool:
        try:
            return self._target is not None and self._target.isatty()
        except ValueError:  # closed
            return False

    def fileno(self) -> int:
        if self._target is None:
            raise OSError("there is no standard output")
        return self._target.fileno()

    def _give_up(self, error: Exception) -> None:
        self._gone = True
        if isinstance(error, BrokenPipeError):
            # Python flushes the standard output once more when it ends and would complain there. What is
            # still in its buffer may as well go to nowhere.
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            except (OSError, ValueError):
                pass


def _encodable(text: str, encoding: str) -> str:
    if _can_encode(text, encoding):
        return text
    shown = [
        character if _can_encode(character, encoding) else character.translate(_LOOKALIKES)
        for character in text
    ]
    return "".join(shown).encode(encoding, errors="replace").decode(encoding)


def _can_encode(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _mean(stretch: np.ndarray) -> float:
    finite = stretch[~np.isnan(stretch)]
    return float(finite.mean()) if finite.size else math.nan


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _number(value: object) -> str:
    """At most four significant digits; a missing value is a dash."""
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return "-"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.4g}"
    return printable(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
