"""What the supervised stages share: drawing batches, walking over optimiser steps, validating, stopping early."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from base_setup.parameters import named_arrays
from config.supervised_config import SupervisedConfig
from training.model_trainer import StepReport

Row = TypeVar("Row")
Batch = TypeVar("Batch")
#: Called after each optimiser step with its number (from 1) and its metrics.
OnStep = Callable[[int, dict[str, float]], None]
VALIDATION = "validation/"


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
    size = size or max(len(rows), 1)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def step_metrics(report: StepReport, **more: float) -> dict[str, float]:
    """The metrics that every stage reports."""
    return {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate, **more}


def learn(
    module: nn.Module,
    config: SupervisedConfig,
    batches: Iterable[Batch],
    step: Callable[[Batch], dict[str, float]],
    *,
    on_step: OnStep | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Take ``step`` on each batch, in training mode, and validate on the way.

    Args:
        module: what trains; dropout is on during steps alone.
        validate: metrics on rows held out, ``loss`` among them. None: no validation, and no early stopping.
    Returns:
        The last step's metrics, and where there is validation its metrics (``validation/…``) of the weights that are
        kept: with early stopping those of the lowest validation loss, else the last.
    """
    metrics: dict[str, float] = {}
    stopper = _Stopper(module, config.early_stopping_patience)
    mx.random.seed(config.seed)  # dropout draws from MLX's global state
    for number, batch in enumerate(batches, start=1):
        module.train()  # adapter dropout is for this stage
        metrics = step(batch)
        module.eval()
        last = number == config.num_steps
        if validate is not None and (last or (config.eval_every and number % config.eval_every == 0)):
            found = validate()
            metrics |= {VALIDATION + name: value for name, value in found.items()}
            stopper.see(found)
        if on_step is not None:
            on_step(number, dict(metrics))
        if stopper.enough:
            break
    return metrics | {VALIDATION + name: value for name, value in stopper.keep_best().items()}


class _Stopper:
    """Remembers the best weights, and says when ``patience`` validations in a row were no better."""

    def __init__(self, module: nn.Module, patience: int | None) -> None:
        self.module, self.patience = module, patience
        self.best, self.metrics, self.worse = math.inf, dict[str, float](), 0
        self.weights: dict[str, mx.array] | None = None

    def see(self, found: dict[str, float]) -> None:
        """One validation's metrics."""
        if self.patience is None or found["loss"] < self.best:
            self.best, self.metrics, self.worse = found["loss"], found, 0
            if self.patience is not None:
                # References: an update replaces arrays, and never writes into them.
                self.weights = named_arrays(self.module.trainable_parameters())
        else:
            self.worse += 1

    @property
    def enough(self) -> bool:
        """Whether training should end here."""
        return self.patience is not None and self.worse >= self.patience

    def keep_best(self) -> dict[str, float]:
        """Put the best weights back; returns their metrics."""
        if self.weights is not None:
            self.module.update(tree_unflatten(list(self.weights.items())))
        return self.metrics
