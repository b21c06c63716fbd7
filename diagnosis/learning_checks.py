"""What some steps do: weights that train move, the reference stays, and rewards have something to teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from base_setup.parameters import named_arrays
from diagnosis.findings import Finding, judged
from models.policy_model import FrozenPolicy
from rewards.scored_batch import ScoredBatch


def check_weights_move(
    module: nn.Module, before: Mapping[str, mx.array], steps: Mapping[str, float]
) -> Finding:
    """Every array that trains has moved since ``before`` and is finite.

    Args:
        before: the trainable arrays as they were, at least two updates ago (a fresh adapter's first factor stands
            still in the first one).
        steps: how many updates there were: ``made``, and of them ``skipped`` and ``rejected``.
    """
    moved = {
        name: _distance(x, before[name]) for name, x in named_arrays(module.trainable_parameters()).items()
    }
    taken = steps["made"] - steps["skipped"] - steps["rejected"]
    still = [name for name, distance in moved.items() if not distance > 0]
    largest = max(moved.values(), default=0.0)
    seen = (
        f"{len(moved) - len(still)} of {len(moved)} arrays moved, by {largest:.2g} at most, in {taken:.0f} of "
        f"{steps['made']:.0f} updates"
    )
    if steps["skipped"]:
        return Finding(
            "weights move",
            "fault",
            f"{seen}; {steps['skipped']:.0f} were skipped because loss or gradient was not finite",
            "lower learning_rate, look for rewards of enormous size, and for NaN in the checkpoint",
        )
    if still or not np.isfinite(largest):
        seen = f"{seen}; {still[0]} did not" if still else f"{seen}; they are not finite now"
    return judged(
        "weights move",
        bool(moved) and not still and bool(np.isfinite(largest)),
        seen,
        "a step smaller than the spacing of the weights' numbers is no step: raise learning_rate; an array that never "
        "moves has no gradient, or an optimiser that does not know it",
    )


def _distance(now: mx.array, before: mx.array) -> float:
    return float(mx.max(mx.abs(now.astype(mx.float32) - before.astype(mx.float32))))


def check_critic_moves(module: nn.Module, before: Mapping[str, mx.array]) -> Finding:
    """A separate value network has learned something, and is finite.

    Its head starts at 0, so that what is below it begins to move an update later, and a fresh adapter's first factor
    another one later: that some arrays stand still after a few updates is no fault.
    """
    moved = {
        name: _distance(x, before[name]) for name, x in named_arrays(module.trainable_parameters()).items()
    }
    count, largest = sum(distance > 0 for distance in moved.values()), max(moved.values(), default=0.0)
    return judged(
        "critic moves",
        count > 0 and all(np.isfinite(distance) for distance in moved.values()),
        f"{count} of {len(moved)} arrays moved, by {largest:.2g} at most",
        "the value network stays as it was made: look at value_learning_rate, and at whether it is frozen",
    )


class ReferenceState(NamedTuple):
    """What a reference was at some moment: its arrays, and what it said about a batch."""

    arrays: dict[str, mx.array]
    logprobs: np.ndarray  # (B, T) float32

    @classmethod
    def of(
        cls, reference: FrozenPolicy, tokens: mx.array, mask: mx.array, temperature: float
    ) -> ReferenceState:
        """Taken now; holding arrays costs nothing until somebody replaces them."""
        logprobs = np.array(reference.logprobs(tokens, mask, temperature))
        return cls(named_arrays(reference.model.parameters()), logprobs)


def check_reference(before: ReferenceState, after: ReferenceState) -> Finding:
    """Neither an array of the reference nor a logprob of it has changed, to the last bit."""
    changed = [
        name
        for name, x in after.arrays.items()
        if name not in before.arrays
        or (x is not before.arrays[name] and not bool(mx.array_equal(x, before.arrays[name])))
    ]
    difference = float(np.abs(before.logprobs - after.logprobs).max())
    seen = f"{len(changed)} of {len(after.arrays)} arrays changed, its logprobs by {difference:.2g} at most"
    return judged(
        "reference stays",
        not changed and before.logprobs.tobytes() == after.logprobs.tobytes(),
        f"{seen}; {changed[0]} the first" if changed else seen,
        "the reference learns with the policy, so the KL holds nothing: give one of its own "
        "(policy.frozen_copy(), or reference_path)",
    )


def check_rewards(scored: ScoredBatch, groups: Sequence[int], *, shortened: str = "") -> Finding:
    """Rewards are numbers, and tell the completions of a prompt apart.

    Args:
        groups: the prompt of each row. Where every group has one member, rows are compared with one another.
        shortened: what the doctor sampled less of than the run will, in words; dead groups are then no fault.
    """
    name, total = "reward", scored.total
    numbers = total[np.isfinite(total)]
    failed = int(np.sum(scored.failed)) if scored.failed is not None else 0
    n_bad = len(total) - len(numbers)
    if not len(numbers):
        return Finding(
            name,
            "fault",
            f"none of {len(total)} completions got a score ({failed} because a reward failed)",
            "try it on a text of your own: python main.py rewards try NAME --prompt … --completion …",
        )
    whole = len(set(groups)) == len(groups)
    members = np.zeros(len(groups)) if whole else np.asarray(groups)
    spreads = [_spread(total[members == group]) for group in dict.fromkeys(members.tolist())]
    dead = sum(spread == 0 for spread in spreads)
    seen = (
        f"{numbers.mean():.3g} on average, from {numbers.min():.3g} to {numbers.max():.3g}; "
        + ("" if whole else f"{dead} of {len(spreads)} groups without spread, ")
        + f"mean deviation {'' if whole else 'within groups '}{np.mean(spreads):.3g}"
    )
    if n_bad:
        seen += f"; {n_bad} of {len(total)} completions without a score, {failed} because a reward failed"
    advice = (
        "completions with equal scores teach nothing: raise group_size or temperature, look at samples, or choose a "
        "reward with steps in between"
    )
    if dead == len(spreads):
        if shortened:
            return Finding(name, "warning", f"{seen} ({shortened})", advice)
        return Finding(name, "fault", seen, advice)
    if failed:
        return Finding(name, "warning", seen, "see why it fails: on_reward_error = stop says so")
    return judged(name, 2 * dead <= len(spreads), seen, advice, otherwise="warning")


def _spread(scores: np.ndarray) -> float:
    numbers = scores[np.isfinite(scores)]
    return float(numbers.std()) if len(numbers) else 0.0
