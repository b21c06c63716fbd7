"""Mean and standard deviation of every score so far, for rewards of a scale that nobody knows beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast, get_args

import mlx.core as mx

Scaling = Literal["std", "norm"]


class RunningMoments:
    r"""Moments of a stream of batches, merged without going back to old scores; NaN rows do not count.

    With M the sum of squared distances from the mean, a batch b joins what there was by
    (Chan, Golub and LeVeque 1979)

    .. math::
        M \leftarrow M + M_b + d^2 \frac{n\, n_b}{n + n_b}, \qquad
        \mu \leftarrow \mu + d \frac{n_b}{n + n_b}, \qquad d = \mu_b - \mu

    All on the host and in float64, so equal float32 scores have a deviation of exactly 0.

    Attributes:
        mean, std, count: over all scores so far; ``std`` with Bessel's correction, 0 for fewer than two.
    """

    epsilon = 1e-8  # next to the deviation; below float32's resolution for any ordinary score

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Standard deviation of all scores so far."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, scores: mx.array) -> None:
        """Take in a batch ``(B,)``; an infinite score is refused, for no later one could outweigh it."""
        if scores.ndim != 1:
            raise ValueError(f"scores must be (B,), but they are {scores.shape}.")
        found = cast(list[float], scores.astype(mx.float32).tolist())
        batch = [score for score in found if not math.isnan(score)]
        if any(math.isinf(score) for score in batch):
            raise ValueError("Running moments cannot take in an infinite score.")
        if not batch:
            return
        n, mean = len(batch), math.fsum(batch) / len(batch)
        squares = math.fsum((score - mean) ** 2 for score in batch)
        total, distance = self.count + n, mean - self.mean
        self._squares += squares + distance * distance * self.count * n / total
        self.mean += distance * n / total
        self.count = total

    def scale(self, scores: mx.array, mode: Scaling) -> mx.array:
        """``(B,)`` float32: divided by the deviation (``std``), after the mean is taken off (``norm``).

        As long as all scores are the same nothing is divided. NaN stays NaN. A batch counts among the scores that
        it is scaled by if ``update`` comes first, as in TRL's former PPO trainer.
        """
        if mode not in get_args(Scaling):
            raise ValueError(f"mode must be 'std' or 'norm', but it is {mode!r}.")
        divisor = self.std + self.epsilon if self.std > 0 else 1.0
        scores = scores.astype(mx.float32)
        return (scores - self.mean if mode == "norm" else scores) / divisor

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"count": float(self.count), "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.count, self.mean = int(state["count"]), float(state["mean"])
        self._squares = float(state["squares"])
