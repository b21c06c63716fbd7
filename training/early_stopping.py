"""Early stopping (Prechelt 1998): the weights of the lowest validation loss, and when to wait no longer for a lower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from base_setup.parameters import named_arrays


class EarlyStopping:
    """Remembers the best weights, and says when ``patience`` validations in a row were no better.

    ``patience`` None: training goes to its end, and its last weights stay.
    """

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

    # -- What a checkpoint keeps ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers; :meth:`state_arrays` has the best weights."""
        return {"best": self.best, "metrics": self.metrics, "worse": self.worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, after :meth:`load_state_arrays`.

        Where ``patience`` was set or dropped since, it begins anew: the weights of what was best are not there, or are
        not to be kept.
        """
        if (self.weights is None) != (self.patience is None):
            self.weights = None
            return
        self.best, self.worse = float(state["best"]), int(state["worse"])
        self.metrics = {name: float(value) for name, value in state["metrics"].items()}

    def state_arrays(self) -> dict[str, mx.array]:
        """The best weights by dotted path; empty where none are kept."""
        return dict(self.weights or {})

    def load_state_arrays(self, arrays: Mapping[str, mx.array]) -> None:
        """Go on where :meth:`state_arrays` was taken."""
        self.weights = dict(arrays) or None
