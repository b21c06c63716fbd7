"""Several rewards, one score per completion: call them, check what comes back, add it up.

    weighted_sum           total_b = sum_i w_i r_i(b)                     over the rewards i that apply to row b
    sum                    the same with every weight 1
    weighted_mean_clip01   total_b = sum_i w_i r_i(b) / sum_i w_i         over the same, within [0, 1]

A reward says "I do not apply to this row" with ``None``. Such a component is NaN in the log and left
out of the row's sum; a row to which no reward applies has the total NaN, which the trainer leaves out
of every mean. An *accidental* NaN is an error here, because once it is in the batch nobody finds out
where it came from.

A reward that raises, returns something else than one number per row, or takes longer than ``timeout`` ends the run
with a sentence. With ``on_error="skip"`` its rows have the total NaN instead and are counted: which rows of a batch
they are is found by asking again row by row, and a reward that ran out of time loses the whole batch.
"""

from __future__ import annotations

import functools
import math
import numbers
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from config.errors import InvalidConfigurationError, RewardError
from rewards.calling import SEARCH, Caller, Heard, RewardTimeout, TrainerState, with_its_row
from rewards.checking import FLOAT32_MAX, checked_values
from rewards.registry import Reward, resolve
from rewards.scored_batch import ScoredBatch

Composition = Literal["weighted_sum", "weighted_mean_clip01", "sum"]
OnError = Literal["stop", "skip"]


class RewardSet:
    """Rewards with their weights and the names under which they are logged.

    >>> rewards = RewardSet.build({"well_formed": 0.5, "sequential_digits": 1.0})
    >>> rewards.names
    ['well_formed', 'sequential_digits']
    >>> rewards.score(["8"], [" 10 12 14 16 18"]).components["sequential_digits"]
    array([1.], dtype=float32)

    Attributes:
        state: what rewards that ask for ``trainer_state`` are given; the trainer keeps it up to date.
    """

    def __init__(
        self,
        rewards: Iterable[Reward],
        weights: Sequence[float] | None = None,
        *,
        composition: Composition = "weighted_sum",
        timeout: float | None = None,
        on_error: OnError = "stop",
    ) -> None:
        self.rewards: list[Reward] = list(rewards)
        if not self.rewards:
            raise InvalidConfigurationError(
                'No reward was given: name at least one, for example reward = "well_formed".'
            )
        for reward in self.rewards:
            if not callable(reward):
                raise InvalidConfigurationError(
                    f"A reward is a {type(reward).__name__} ({reward!r}), which cannot be called; "
                    f"RewardSet.build turns names into callables."
                )
        self.names: list[str] = _unique_names(self.rewards)
        self.weights: list[float] = _checked_weights(weights, self.names)
        self.composition = composition
        _check_composition(composition, self.names, self.weights, given=weights is not None)
        self.timeout = timeout
        self.on_error = on_error
        self.state = TrainerState()
        self._remarked: set[str] = set()

    @classmethod
    def build(
        cls,
        spec: object,
        weights: Sequence[float] | None = None,
        *,
        composition: Composition | None = None,
        timeout: float | None = None,
        on_error: OnError | None = None,
        resolver: Callable[[Any], Reward] = resolve,
    ) -> RewardSet:
        """From one reward, a list of rewards, or a mapping reward → weight.

        A reward is whatever ``registry.resolve`` understands: a callable, a registered name,
        ``"package.module:function"``, ``"file.py:function"``, or an entry ``{"name": one of these strings,
        "weight": 0.5, "config": {its parameters}}``, of which only the name is needed. What is left out keeps its
        default, or what a ``RewardSet`` already has. ``resolver`` stands in for ``registry.resolve``.
        """
        if isinstance(spec, RewardSet):
            rewards = [resolver(reward) for reward in spec.rewards]
            same = all(new is old for new, old in zip(rewards, spec.rewards, strict=True))
            if same and (weights, composition, timeout, on_error) == (None, None, None, None):
                return spec
            return cls(
                rewards,
                spec.weights if weights is None else weights,
                composition=composition or spec.composition,
                timeout=spec.timeout if timeout is None else timeout,
                on_error=on_error or spec.on_error,
            )
        parts, own = _parts(spec)
        if own is not None and weights is not None:
            raise InvalidConfigurationError(
                "Reward weights were given twice, in the mapping and beside it; keep one of the two."
            )
        return cls(
            [resolver(part) for part in parts],
            weights if own is None else own,
            composition=composition or "weighted_sum",
            timeout=timeout,
            on_error=on_error or "stop",
        )

    def __len__(self) -> int:
        return len(self.rewards)

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> ScoredBatch:
        """Call every reward on the batch and add up what they say; ``async`` rewards wait together.

        Raises:
            RewardError: naming the reward, and the row where one is to blame; with ``on_error="skip"`` only where
                a reward asks for a column that is not there.
        """
        rows = len(completions)
        offered = {"prompts": prompts, "completions": completions, **columns}
        for column, values in offered.items():
            if isinstance(values, (list, tuple)) and len(values) != rows:
                raise RewardError(
                    f"The rewards were offered {len(values)} {column} for {rows} completions; "
                    f"every column needs one entry per completion."
                )
        heard = Heard(rows)
        caller = Caller(offered, heard, self.state, self.timeout)
        rewards = dict(zip(self.names, self.rewards, strict=True))
        returned = caller.call_all(rewards, stop=self.on_error == "stop")
        components: dict[str, np.ndarray] = {}
        failed = np.zeros(rows, dtype=bool)
        for name, said in returned.items():
            components[name], lost = self._settled(name, said, rewards[name], caller)
            failed |= lost
        total = self._composed(components, rows)
        total[failed] = np.nan
        self._remark_on_silence(components, offered)
        return ScoredBatch(total, components, failed, heard.extra or None, heard.measured or None)

    # -- Failures -------------------------------------------------------------------------------------

    def _settled(
        self, name: str, returned: Any, reward: Reward, caller: Caller
    ) -> tuple[np.ndarray, np.ndarray]:
        """A reward's values and the rows on which it failed, ``(B,)`` each; without ``skip`` an error instead."""
        rows = caller.rows
        lost = np.zeros(rows, dtype=bool)
        try:
            if isinstance(returned, RewardError):
                raise returned
            values, unusable = checked_values(name, returned, rows)
        except RewardError as error:
            if self.on_error == "stop":
                raise self._with_its_row(error, name, reward, caller) from error.__cause__
            self._remark(f"{name} failed", f"{error} Its rows are skipped.")
            return self._row_by_row(name, reward, error, caller)
        if unusable and self.on_error == "stop":
            raise next(iter(unusable.values()))
        for row, problem in unusable.items():
            self._remark(f"{name} failed", f"{problem} The row is skipped.")
            lost[row] = True
        return values, lost

    def _row_by_row(
        self, name: str, reward: Reward, error: RewardError, caller: Caller
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values of the rows on which the reward does not fail alone; all are lost if time is what it lacks."""
        rows = caller.rows
        values, lost = np.full(rows, np.nan, dtype=np.float32), np.ones(rows, dtype=bool)
        if isinstance(error, RewardTimeout):
            return values, lost
        for row in range(rows):
            said = caller.call_row(name, reward, row)
            if isinstance(said, RewardTimeout):
                break
            try:
                found, unusable = checked_values(name, said, 1)
            except RewardError:
                continue
            if not isinstance(said, RewardError) and not unusable:
                values[row], lost[row] = found[0], False
        if not lost.any():  # it fails on the batch alone: what it says of single rows may mean something else
            return np.full(rows, np.nan, dtype=np.float32), np.ones(rows, dtype=bool)
        return values, lost

    def _with_its_row(self, error: RewardError, name: str, reward: Reward, caller: Caller) -> RewardError:
        """The error, naming the row that is to blame where that can be found within ``SEARCH`` seconds."""
        raised = error.__cause__ is not None and error.row is None
        if not raised or isinstance(error, RewardTimeout) or caller.rows < 2:
            return error
        end = time.monotonic() + SEARCH
        for row in range(caller.rows):
            if isinstance(caller.call_row(name, reward, row), RewardError):
                return with_its_row(error, row, caller.offered["completions"])
            if time.monotonic() > end:
                break
        return error

    def _remark_on_silence(self, components: Mapping[str, np.ndarray], offered: Mapping[str, Any]) -> None:
        for name, values in components.items():
            if values.size and np.isnan(values).all() and f"{name} failed" not in self._remarked:
                self._remark(
                    f"{name} silent",
                    f"Reward {name!r} applied to none of {values.size} completions; there are the columns "
                    f"{', '.join(sorted(offered))}. Said once.",
                )

    def _remark(self, key: str, sentence: str) -> None:
        """Say something once per set and kind."""
        if key not in self._remarked:
            self._remarked.add(key)
            print(f"reward: {sentence}", file=sys.stderr, flush=True)

    # -- Adding up ------------------------------------------------------------------------------------

    def _composed(self, components: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        table = np.stack([components[name] for name in self.names]).astype(np.float64)  # (rewards, B)
        applies = ~np.isnan(table)
        weights = np.array(self.weights)[:, None]
        total = np.where(applies, table * weights, 0.0).sum(axis=0)
        if self.composition == "weighted_mean_clip01":
            mass = np.where(applies, weights, 0.0).sum(axis=0)
            total = np.clip(total / np.where(mass > 0, mass, 1.0), 0.0, 1.0)
            applies = applies & (weights > 0)
        total = np.where(applies.any(axis=0), total, np.nan)
        too_large = np.flatnonzero(np.abs(total) > FLOAT32_MAX)
        if too_large.size:
            row = int(too_large[0])
            raise RewardError(
                f"The weighted sum of the rewards {', '.join(self.names)} is {total[row]:.3g} for row {row}, "
                f"which float32 cannot hold; use smaller weights or rewards near 1.",
                row=row,
            )
        return total.astype(np.float32)  # (B,)


# What sets are made of ---------------------------------------------------------------------------------


def _parts(spec: object) -> tuple[list[Any], list[float] | None]:
    """What a specification names, for ``resolve``, and the weights that are written in it; None = none is."""
    if spec is None:
        return [], None
    if _is_entry(spec):
        spec = [spec]
    if isinstance(spec, Mapping):
        return list(spec), list(spec.values())
    if isinstance(spec, str) or callable(spec) or not isinstance(spec, Iterable):
        return [spec], None
    parts = list(spec)
    for part in parts:
        if isinstance(part, Mapping) and not _is_entry(part):
            raise InvalidConfigurationError(
                f"The reward {dict(part)!r} has no name; an entry is "
                '{"name": …, "weight": …, "config": {…}}, of which only the name is needed.'
            )
    if not any(_is_entry(part) and part.get("weight") is not None for part in parts):
        return parts, None
    return parts, [part.get("weight", 1.0) if _is_entry(part) else 1.0 for part in parts]


def _is_entry(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("name"), str)


def _check_composition(
    composition: str, names: Sequence[str], weights: Sequence[float], *, given: bool
) -> None:
    if composition not in get_args(Composition):
        raise InvalidConfigurationError(
            f"reward_composition: {composition!r} is none of {', '.join(get_args(Composition))}."
        )
    if composition == "sum" and given and any(weight != 1 for weight in weights):
        raise InvalidConfigurationError(
            "reward_composition: a sum has no weights, but there are "
            f"{', '.join(f'{n} {w:g}' for n, w in zip(names, weights, strict=True))}; leave them out, or "
            'use "weighted_sum".'
        )
    if composition == "weighted_mean_clip01" and (min(weights) < 0 or sum(weights) == 0):
        raise InvalidConfigurationError(
            "reward_composition: the weights of a weighted mean are at least 0 and not all 0, but there are "
            f"{', '.join(f'{n} {w:g}' for n, w in zip(names, weights, strict=True))}."
        )


def _checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    weights = list(weights)
    if len(weights) != len(names):
        raise InvalidConfigurationError(
            f"{len(weights)} reward weights were given for {len(names)} rewards ({', '.join(names)}); "
            f"give one weight per reward, or none for a weight of 1 each."
        )
    weight: Any
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise InvalidConfigurationError(
                f"The weight of reward {name!r} is {weight!r}; expected a finite number, negative to punish."
            )
    return [float(weight) for weight in weights]


# Naming ----------------------------------------------------------------------------------------------


def _unique_names(rewards: Sequence[Reward]) -> list[str]:
    """The names under which the components are logged; the second ``length`` is ``length_2``."""
    taken: list[str] = []
    for reward in rewards:
        base = _name_of(reward)
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.append(name)
    return taken


def _name_of(reward: Reward) -> str:
    plain: Callable[..., Any] = reward
    while isinstance(plain, functools.partial) and not hasattr(plain, "reward_name"):
        plain = plain.func
    name = getattr(plain, "reward_name", None) or getattr(plain, "__name__", None) or type(plain).__name__
    # It becomes a part of metric names such as rewards/NAME/mean.
    return str(name).strip("<>").replace("/", "_")
