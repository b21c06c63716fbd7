"""What the supervised stages share: drawing batches and walking over optimiser steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from training.model_trainer import StepReport

Row = TypeVar("Row")
#: Called after each optimiser step with its number (from 1) and its metrics.
OnStep = Callable[[int, dict[str, float]], None]


def place_of(rows: Sequence[Any], index: int, name: str) -> str:
    """Where a row stands: its file and line where the rows know it, else its number."""
    place: str = rows.place(index) if hasattr(rows, "place") else f"{name}[{index}]"
    return place


def shuffled_batches(
    rows: Sequence[Row], size: int, steps: int, seed: int, *, shuffle: bool = True
) -> Iterator[list[Row]]:
    """``steps`` batches of ``size`` rows: epoch after epoch, each in a fresh order, no row twice in one pass.

    Without ``shuffle`` every epoch has the rows' own order.
    """
    generator = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(size, len(rows)):
            queue += (generator.permutation(len(rows)) if shuffle else np.arange(len(rows))).tolist()
        taken, queue = queue[:size], queue[size:]
        yield [rows[i] for i in taken]


def split(rows: Sequence[Row], size: int | None) -> list[Sequence[Row]]:
    """Consecutive micro-batches of at most ``size`` rows."""
    size = size or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def step_metrics(report: StepReport, **more: float) -> dict[str, float]:
    """The metrics that every stage reports."""
    return {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate, **more}
