"""``samples.jsonl`` and the table of completions: what the model actually writes.

A reward curve can rise for the wrong reason; five completions read by a person cannot hide it. What a
model writes is shown with care, because it may be anything: ``[/red]`` is markup to the terminal
library, ``\\x1b[2J`` clears the screen, a right-to-left override reverses the rest of the line.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from monitoring.metrics_file import JsonLines, plain

FIELDS = ("step", "prompt", "completion", "score", "components", "terminated", "n_tokens", "extra")
# Characters that change how the text around them is shown: directions, line and paragraph separators.
_DISRUPTIVE = set(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff"
)

Answer = str | tuple[str, float | None]


class SamplesFile(JsonLines):
    """Rollouts in full, one per line, with the fields ``FIELDS``."""

    def write(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append ``samples``: a field that is missing is null, what is not in ``FIELDS`` is left out."""
        for sample in samples:
            components = sample.get("components") or {}
            self.append(
                {
                    "step": plain(step),
                    "prompt": _text(sample.get("prompt")),
                    "completion": _text(sample.get("completion")),
                    "score": plain(sample.get("score")),
                    "components": {str(name): plain(value) for name, value in components.items()},
                    "terminated": plain(sample.get("terminated")),
                    "n_tokens": plain(sample.get("n_tokens")),
                    "extra": {str(name): plain(value) for name, value in (sample.get("extra") or {}).items()},
                }
            )


def before_after_table(
    rows: Sequence[Sequence[Answer]], titles: Sequence[str], *, longest: int = 160
) -> Table:
    """The same prompts answered by several models, side by side.

    A row holds a prompt, then per model a completion or ``(completion, score)``::

        before_after_table([["8", (" 9 1 3", 0.0), (" 10 12 14", 0.6)]], ["prompt", "before", "after PPO"])

    Texts are cut at ``longest`` characters, shown without markup, newlines as ⏎.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, show_lines=False, padding=(0, 2, 0, 0))
    for index, title in enumerate(titles):
        # The prompt column takes what it needs up to a fifth or so; the answers share the rest evenly.
        if index == 0:
            table.add_column(Text(printable(title)), max_width=18, overflow="fold")
        else:
            table.add_column(Text(printable(title)), ratio=1, overflow="fold")
    for row in rows:
        if len(row) != len(titles):
            raise ValueError(f"a row of {len(row)} cells does not fit {len(titles)} titles: {list(titles)}")
        table.add_row(*(_cell(answer, longest) for answer in row))
    return table


def printable(text: object) -> str:
    """``text`` on one line and harmless to a terminal.

    >>> printable("a\\nb\\tc \\x1b[2J")
    'a⏎b c \\\\x1b[2J'
    """
    shown = []
    for character in str(text).replace("\r\n", "\n"):
        if character == "\n":
            shown.append("⏎")
        elif character == "\t":
            shown.append(" ")
        elif character in _DISRUPTIVE or unicodedata.category(character) in ("Cc", "Cs"):
            shown.append(character.encode("unicode_escape").decode())
        else:
            shown.append(character)
    return "".join(shown)


def _cell(answer: Answer, longest: int) -> Text:
    if isinstance(answer, str):
        return Text(_cut(answer, longest))
    completion, score = answer
    cell = Text(_cut(completion, longest) or "(empty)", style="" if completion.strip() else "dim")
    if score is None or not math.isfinite(score):
        return cell.append("  (no score)", style="dim")
    return cell.append(f"  ({score:.2f})", style="bold")


def _cut(text: str, longest: int) -> str:
    shown = printable(text.strip(" "))
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
