"""The exceptions that a user may see, each carrying one sentence that can be acted on.

They live in the lowest package so that every layer can raise them. ``main.py`` prints the sentence
and exits; a script catches ``ToolkitError`` to catch them all. A Python traceback that is none of
these is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable


class ToolkitError(Exception):
    """Base of every error that this project raises on purpose."""


class InvalidConfigurationError(ToolkitError, ValueError):
    """An option has a value that cannot work; the message names the field, the value and the range.

    ``problems`` has a (field, sentence) for each mistake where they are known apart, the field "" where several
    are at odds.
    """

    def __init__(self, message: str, problems: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class ModelLoadError(ToolkitError):
    """A model, tokenizer or adapter could not be found, read or built."""


class DataLoadError(ToolkitError, ValueError):
    """Prompts or training rows cannot be used; the message names the file and line, or the row."""


class CheckpointError(ToolkitError):
    """Something could not be saved or restored; the message names the path."""


class TrainingRuntimeError(ToolkitError):
    """A run cannot go on. What it had earned before is on disk; the message says where."""


class RewardError(TrainingRuntimeError):
    """A reward misbehaved; the message names the reward, the row and the value.

    ``row`` is the number of the row, where one is to blame.
    """

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
