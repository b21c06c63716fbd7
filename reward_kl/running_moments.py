"""Mean and standard deviation of every score so far, for rewards of a scale that nobody knows beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import mlx.core as mx


class RunningMoments:
    """Moments of a stream of batches, merged exactly (Chan, Golub and LeVeque 1979); NaN rows do not count.

    Attributes:
        mean, std, count: over all scores so far; ``std`` with Bessel's correction, 0 for fewer than two.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Standard deviation of all scores so far."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, scores: mx.array) -> None:
        """Take in a batch ``(B,)``."""
        found = cast(list[float], scores.astype(mx.float32).tolist())
        batch = [score for score in found if not math.isnan(score)]
        if not batch:
            return
        n, mean = len(batch), math.fsum(batch) / len(batch)
        squares = math.fsum((score - mean) ** 2 for score in batch)
        total, distance = self.count + n, mean - self.mean
        self._squares += squares + distance * distance * self.count * n / total
        self.mean += distance * n / total
        self.count = total

    def scale(self, scores: mx.array, mode: Literal["std", "norm"]) -> mx.array:
        """``(B,)`` float32: divided by the deviation (``std``), after the mean is taken off (``norm``).

        Nothing is divided as long as all scores are the same.
        """
        divisor = self.std if self.std > 1e-8 else 1.0
        scores = scores.astype(mx.float32)
        return (scores - self.mean if mode == "norm" else scores) / divisor

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"count": float(self.count), "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.count, self.mean = int(state["count"]), float(state["mean"])
        self._squares = float(state["squares"])
