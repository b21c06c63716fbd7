"""Tokenise once: JSONL in, JSONL or memory-mapped NPY out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config.training_config import TrainingConfig


def preprocess(
    config: TrainingConfig, output_train_path: str | Path, output_val_path: str | Path | None = None
) -> Any:
    """Write the config's rows as JSONL (a path ending in .jsonl) or as NPY files with this prefix; str() of the result says what was written."""
    raise NotImplementedError
