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

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from config.errors import InvalidConfigurationError, RewardError
from rewards.calling import SEARCH, Caller, Heard, RewardTimeout, TrainerState, with_its_row
from rewards.checking import FLOAT32_MAX, checked_values
from rewards.registry import Reward, resolve
from rewards.scored_batch import ScoredBatch
from rewards.specification import Composition, check_composition, checked_weights, parts_of, unique_names

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
        self.names: list[str] = unique_names(self.rewards)
        self.weights: list[float] = checked_weights(weights, self.names)
        self.composition = composition
        check_composition(composition, self.names, self.weights, given=weights is not None)
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
        parts, own = parts_of(spec)
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
