"""What goes wrong in reinforcement learning without an error, said in words when it happens.

Each sentence ends with its heading in docs/troubleshooting.md. It is said once; when the run has been well for some
steps and it happens again, it is said again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

KL_BLOW_UP = 10.0  # nats per completion …
KL_PER_TOKEN = 1.0  # … or per token: e times as likely, at every token
ENTROPY_SHARE = 0.1  # of the entropy of the run's first steps
IN_A_ROW = 5  # steps of a trouble that single steps may have by chance


class RunGuards:
    """A callback that watches every step's metrics; it changes nothing."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or logger.warning
        self._first_entropy: float | None = None
        self._last_reward: float | None = None
        self._in_a_row: dict[str, int] = {}
        self._said: dict[str, int] = {}  # what has been said, and for how many steps all has been well since

    def on_train_begin(self, trainer: Any) -> None:
        """A run that goes on is compared with its own first steps, not with those after its checkpoint."""
        path = Path(trainer.run_folder) / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                self._first_entropy = _number(record, "entropy") if isinstance(record, dict) else None
                if self._first_entropy is not None:
                    return

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Say what is wrong with this step."""
        self._watch("kl", _kl_blow_up(metrics), 1, step)
        self._watch("entropy", self._entropy_collapse(metrics), 1, step)
        saturation = self._saturation(metrics)
        self._watch("saturation", saturation, IN_A_ROW, step)
        self._watch("dead groups", None if saturation else _dead_groups(metrics), IN_A_ROW, step)
        self._watch("skipped", _skipped(metrics), 1, step)
        self._watch("truncation", _all_truncated(metrics), IN_A_ROW, step)
        self._watch("empty", _all_empty(metrics), IN_A_ROW, step)

    def _watch(self, name: str, sentence: str | None, patience: int, step: int) -> None:
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if sentence else 0
        if sentence is not None and self._in_a_row[name] >= patience and name not in self._said:
            self.say(f"step {step}: {sentence}")
            self._said[name] = 0
        elif name in self._said:
            self._said[name] = self._said[name] + 1 if sentence is None else 0
            if self._said[name] == IN_A_ROW:  # one good step among bad ones is no recovery
                del self._said[name]

    def _entropy_collapse(self, metrics: Mapping[str, Any]) -> str | None:
        entropy = _number(metrics, "entropy")
        if entropy is None:
            return None
        if self._first_entropy is None:
            self._first_entropy = entropy
        if entropy >= ENTROPY_SHARE * self._first_entropy:
            return None
        return (
            f"the policy's entropy is {entropy:.3g} nats per token and was {self._first_entropy:.3g} at first: it "
            "writes nearly the same answer every time and has little left to learn from (docs/troubleshooting.md, "
            '"Entropy collapse")'
        )

    def _saturation(self, metrics: Mapping[str, Any]) -> str | None:
        """Within the step, and as in the step before: a step may have one completion."""
        deviation, mean = _number(metrics, "reward_std"), _number(metrics, "reward")
        before, self._last_reward = self._last_reward, mean
        if deviation is None or mean is None or deviation > 1e-6:
            return None
        if before is not None and abs(mean - before) > 1e-6:
            return None
        return (
            f"every completion of the last {IN_A_ROW} steps has the same reward ({mean:.3g}): nothing tells a good one "
            'from a bad one (docs/troubleshooting.md, "Reward saturation")'
        )


def _kl_blow_up(metrics: Mapping[str, Any]) -> str | None:
    total, each = _number(metrics, "objective/kl"), _number(metrics, "objective/kl_per_token")
    if total is None or each is None or (total < KL_BLOW_UP or each < KL_PER_TOKEN):
        return None
    return (
        f"the KL to the reference is {total:.3g} nats per completion, {each:.3g} per token: the policy is leaving the "
        'model it began as (docs/troubleshooting.md, "KL blow-up")'
    )


def _dead_groups(metrics: Mapping[str, Any]) -> str | None:
    share = _number(metrics, "frac_reward_zero_std")
    if share is None or share < 0.9:
        return None
    return (
        f"in {share:.0%} of the groups all completions score alike, {IN_A_ROW} steps in a row: those groups teach "
        'nothing (docs/troubleshooting.md, "Dead groups")'
    )


def _skipped(metrics: Mapping[str, Any]) -> str | None:
    count = _number(metrics, "skipped_updates")
    if not count:
        return None
    return (
        f"{count:.0f} updates had a loss or gradient that is not finite and were skipped; weights and optimiser are as "
        'they were (docs/troubleshooting.md, "Skipped updates")'
    )


def _all_truncated(metrics: Mapping[str, Any]) -> str | None:
    share = _number(metrics, "completions/clipped_ratio")
    if share is None or share < 1:
        return None
    still = ", and nothing is learned from them" if metrics.get("num_updates") == 0 else ""
    return (
        f"no completion of the last {IN_A_ROW} steps has come to its end: all were cut at max_new_tokens{still} "
        '(docs/troubleshooting.md, "Nothing ends")'
    )


def _all_empty(metrics: Mapping[str, Any]) -> str | None:
    longest, cut = _number(metrics, "completions/max_length"), _number(metrics, "completions/clipped_ratio")
    if longest is None or longest > 1 or cut is None or cut > 0:
        return None
    return (
        f"every completion of the last {IN_A_ROW} steps is empty: its first token is the end token "
        '(docs/troubleshooting.md, "Empty answers")'
    )


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
