"""How far a run is: the epoch, the batches of it, what its steps have said so far, and the epochs before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Of these an epoch's line has the last step's value, not the mean.
COUNTERS = ("step", "episode", "kl_coef", "lr")


class EpochMeans:
    """The means of an epoch's metrics, added up step by step; NaN (a step without any score) is left out."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.last: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """One step's metrics."""
        for name, value in metrics.items():
            missing = math.isnan(value)
            self.sums[name] = self.sums.get(name, 0.0) + (0.0 if missing else value)
            self.counts[name] = self.counts.get(name, 0) + (not missing)
        self.last = {name: metrics[name] for name in COUNTERS if name in metrics}

    def mean(self, name: str) -> float:
        """The mean so far; NaN where no step has had a number."""
        count = self.counts.get(name, 0)
        return self.sums[name] / count if count else float("nan")

    def metrics(self, epoch: int) -> dict[str, Any]:
        """The epoch's line; ``avg_reward`` is the mean reward."""
        means = {name: self.mean(name) for name in self.sums}
        return {**means, **self.last, "epoch": epoch, "avg_reward": self.mean("reward")}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sums": self.sums, "counts": self.counts, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.sums, self.counts, self.last = (dict(state[name]) for name in ("sums", "counts", "last"))


class Progress:
    """The position in one call of ``PPOTrainer.train``.

    Attributes:
        started: steps of the trainer before this call.
        epoch: passes that are complete. batches: of the pass under way.
        history: one entry per epoch.
    """

    def __init__(self, started: int) -> None:
        self.started = started
        self.epoch = self.batches = 0
        self.means = EpochMeans()
        self.history: list[dict[str, Any]] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        """One more batch."""
        self.batches += 1
        self.means.add(metrics)

    def end_epoch(self) -> dict[str, Any]:
        """Close the pass under way; returns its metrics."""
        self.history.append(self.means.metrics(self.epoch))
        self.epoch, self.batches, self.means = self.epoch + 1, 0, EpochMeans()
        return self.history[-1]

    def so_far(self) -> dict[str, Any]:
        """The metrics of the pass under way, or else of the last one."""
        return self.means.metrics(self.epoch) if self.batches else (self.history or [{}])[-1]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        position = {name: getattr(self, name) for name in ("started", "epoch", "batches")}
        return {**position, "means": self.means.state_dict(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.started, self.epoch, self.batches = (int(state[n]) for n in ("started", "epoch", "batches"))
        self.means.load_state_dict(state["means"])
        history: Sequence[Mapping[str, Any]] = state["history"]
        self.history = [dict(entry) for entry in history]
