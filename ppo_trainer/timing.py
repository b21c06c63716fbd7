"""How long the stages of a step take, and how many tokens a second that is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from experience_buffer.data_structures import Rollout


class Clock:
    """Seconds between laps; laps of one name add up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def speed(rollouts: Sequence[Rollout], laps: Mapping[str, float]) -> dict[str, float]:
    """Tokens of the batch that is learned from, per second of the whole step and of each of its stages."""
    n_tokens = sum(len(r.completion_ids) for r in rollouts)
    speed = {
        f"tokens_per_second/{name.removeprefix('time/')}": n_tokens / max(seconds, 1e-9)
        for name, seconds in laps.items()
    }
    return {
        "num_tokens": n_tokens,
        "tokens_per_second": n_tokens / max(sum(laps.values()), 1e-9),
        **speed,
    }
