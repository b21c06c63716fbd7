"""What the rewards said about a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class ScoredBatch(NamedTuple):
    """What the rewards said about a batch of B completions, in float32."""

    total: np.ndarray  # (B,)  the composition; NaN where no reward applies, or one failed
    components: dict[str, np.ndarray]  # (B,) each, unweighted; NaN where the reward does not apply
    failed: np.ndarray | None = None  # (B,) bool: a reward failed there; None = nowhere
    extra: Mapping[str, Sequence[Any]] | None = None  # B entries each, what rewards tell about the rows
    measured: Mapping[str, float] | None = None  # what rewards measured of the batch

    def rows(self, indices: Sequence[int]) -> ScoredBatch:
        """What was said about some of the rows."""
        pick = list(indices)
        return self._replace(
            total=self.total[pick],
            components={name: values[pick] for name, values in self.components.items()},
            failed=None if self.failed is None else self.failed[pick],
            extra={name: [values[i] for i in pick] for name, values in (self.extra or {}).items()} or None,
        )


def joined(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """Batches one after the other, as one; of what was measured, the mean."""
    columns = dict.fromkeys(name for part in parts for name in part.extra or {})
    measured: dict[str, list[float]] = {}
    for part in parts:
        for name, value in (part.measured or {}).items():
            measured.setdefault(name, []).append(value)
    no_failure = [np.zeros(len(part.total), dtype=bool) for part in parts]
    return ScoredBatch(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([part.components[name] for part in parts]) for name in parts[0].components},
        np.concatenate(
            [
                none if part.failed is None else part.failed
                for part, none in zip(parts, no_failure, strict=True)
            ]
        ),
        {
            name: [v for part in parts for v in (part.extra or {}).get(name, [None] * len(part.total))]
            for name in columns
        },
        {name: float(np.mean(values)) for name, values in measured.items()},
    )
