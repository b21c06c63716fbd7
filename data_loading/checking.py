"""What is in a data file: counts, schema, lengths, duplicates, leaks, and every bad row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config.data_config import DataConfig


def check_file(
    path: str | Path,
    config: DataConfig | None = None,
    *,
    tokenizer: Any = None,
    against: str | Path | None = None,
) -> Any:
    """A report on ``path``; ``str(report)`` is the text, ``report.ok`` whether every row can be used. ``against``: leaks to this file."""
    raise NotImplementedError
