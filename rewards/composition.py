"""Several rewards, one score per completion: call them, check what comes back, add it up.

    total_b = sum_i  weight_i * reward_i(b)      over the rewards i that apply to row b

A reward says "I do not apply to this row" with ``None``. Such a component is NaN in the log and left
out of the row's sum; a row to which no reward applies has the total NaN, which the trainer leaves out
of every mean. An *accidental* NaN is an error here, because once it is in the batch nobody finds out
where it came from.

The calling convention is that of TRL, so that a reward written for it runs here unmodified: everything
is passed by keyword, and a function receives exactly the keywords that its signature names (all of
them if it has ``**kwargs``). Besides ``prompts``, ``completions`` and the columns of the data set, the
trainer offers ``prompt_ids``, ``completion_ids`` and ``terminated``.

What this file leaves out: time limits. A reward that runs code from a model must bring its own.
"""

from __future__ import annotations

import asyncio
import decimal
import functools
import inspect
import math
import numbers
import os
import sysconfig
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from config.errors import InvalidConfigurationError, RewardError
from rewards.registry import Reward, resolve

FLOAT32_MAX = float(np.finfo(np.float32).max)
_LIBRARY_FOLDERS = tuple(
    sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")
)


class ScoredBatch(NamedTuple):
    """What the rewards said about a batch of B completions, in float32."""

    total: np.ndarray  # (B,)  weighted sum; NaN where no reward applies
    components: dict[str, np.ndarray]  # (B,) each, unweighted; NaN where the reward does not apply


def joined(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """Batches one after the other, as one."""
    return ScoredBatch(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([part.components[name] for part in parts]) for name in parts[0].components},
    )


class RewardSet:
    """Rewards with their weights and the names under which they are logged.

    >>> rewards = RewardSet.build({"well_formed": 0.5, "sequential_digits": 1.0})
    >>> rewards.names
    ['well_formed', 'sequential_digits']
    >>> rewards.score(["8"], [" 10 12 14 16 18"]).components["sequential_digits"]
    array([1.], dtype=float32)
    """

    def __init__(self, rewards: Iterable[Reward], weights: Sequence[float] | None = None) -> None:
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

    @classmethod
    def build(cls, spec: object, weights: Sequence[float] | None = None) -> RewardSet:
        """From one reward, a list of rewards, or a mapping reward → weight.

        A reward is whatever ``registry.resolve`` understands: a callable, a registered name,
        ``"package.module:function"`` or ``"file.py:function"``.
        """
        if isinstance(spec, RewardSet):
            return spec if weights is None else cls(spec.rewards, weights)
        if spec is None:
            return cls([])
        if isinstance(spec, Mapping):
            if weights is not None:
                raise InvalidConfigurationError(
                    "Reward weights were given twice, in the mapping and beside it; keep one of the two."
                )
            return cls([resolve(key) for key in spec], list(spec.values()))
        if isinstance(spec, str) or callable(spec):
            return cls([resolve(spec)], weights)
        if isinstance(spec, Iterable):
            return cls([resolve(one) for one in spec], weights)
        return cls([resolve(spec)], weights)  # raises the sentence for things that cannot be called

    def __len__(self) -> int:
        return len(self.rewards)

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> ScoredBatch:
        """Call every reward on the batch and add up what they say; ``async`` rewards wait together."""
        rows = len(completions)
        offered = {"prompts": prompts, "completions": completions, **columns}
        for column, values in offered.items():
            if isinstance(values, (list, tuple)) and len(values) != rows:
                raise RewardError(
                    f"The rewards were offered {len(values)} {column} for {rows} completions; "
                    f"every column needs one entry per completion."
                )

        returned: dict[str, Any] = {}
        try:
            for name, reward in zip(self.names, self.rewards, strict=True):
                returned[name] = _call(name, reward, offered, rows)
        except RewardError:
            for value in returned.values():
                if inspect.iscoroutine(value):
                    value.close()  # or Python complains, after our sentence, that it was never awaited
            raise
        waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
        if waiting:
            returned.update(zip(waiting, _wait_for_all(waiting, rows), strict=True))

        components = {name: _checked_values(name, value, rows) for name, value in returned.items()}
        return ScoredBatch(self._weighted_sum(components, rows), components)

    def _weighted_sum(self, components: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        table = np.stack([components[name] for name in self.names]).astype(np.float64)  # (rewards, B)
        applies = ~np.isnan(table)
        weighted = np.where(applies, table * np.array(self.weights)[:, None], 0.0)
        total = np.where(applies.any(axis=0), weighted.sum(axis=0), np.nan)
        too_large = np.flatnonzero(np.abs(total) > FLOAT32_MAX)
        if too_large.size:
            row = int(too_large[0])
            raise RewardError(
                f"The weighted sum of the rewards {', '.join(self.names)} is {total[row]:.3g} for row {row}, "
                f"which float32 cannot hold; use smaller weights or rewards near 1."
            )
        return total.astype(np.float32)  # (B,)


# Calling ---------------------------------------------------------------------------------------------


def _call(name: str, reward: Reward, offered: Mapping[str, Any], rows: int) -> Any:
    keywords = _accepted(name, reward, offered)
    # Each reward gets its own lists: one that sorts or pops them must not change what the others see.
    keywords = {key: list(value) if isinstance(value, list) else value for key, value in keywords.items()}
    try:
        return reward(**keywords)
    except (Exception, SystemExit) as error:  # exit() in a grader must not look like the end of a run
        raise RewardError(_what_was_raised(name, error, rows)) from error


def _accepted(name: str, reward: Reward, offered: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``offered`` that the signature of ``reward`` asks for."""
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):  # some C functions have no signature: let them have everything
        return dict(offered)
    for parameter in parameters:
        needed = parameter.default is parameter.empty
        if needed and parameter.kind is parameter.POSITIONAL_ONLY:
            raise RewardError(
                f"Reward {name!r} takes {parameter.name!r} by position only, but rewards are called by "
                f"keyword: remove the / from its signature, or wrap it in a function of "
                f"(prompts, completions, **columns)."
            )
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if needed and named and parameter.name not in offered:
            raise RewardError(
                f"Reward {name!r} asks for the column {parameter.name!r}, which is not there; there are "
                f"{', '.join(sorted(offered))}: add it to the data set or give the parameter a default value."
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    return {parameter.name: offered[parameter.name] for parameter in parameters if parameter.name in offered}


def _wait_for_all(waiting: Mapping[str, Awaitable[Any]], rows: int) -> list[Any]:
    async def one(name: str, answer: Awaitable[Any]) -> Any:
        try:
            return await answer
        except (Exception, SystemExit) as error:
            raise RewardError(_what_was_raised(name, error, rows)) from error

    async def together() -> list[Any]:
        return list(await asyncio.gather(*(one(name, answer) for name, answer in waiting.items())))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(together())
    # A notebook runs its cells inside a loop already, and loops do not nest: use one in another thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, together()).result()


def _what_was_raised(name: str, error: BaseException, rows: int) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARY_FOLDERS, "<frozen"))]
    where = next((f" at {frame.filename}:{frame.lineno}" for frame in reversed(own or frames)), "")
    return (
        f"Reward {name!r} raised {type(error).__name__}: {error}{where} while scoring {rows} completions; "
        f"expected one number per completion: mend it there, or return None for rows that it cannot judge."
    )


# Checking --------------------------------------------------------------------------------------------


def _checked_values(name: str, returned: Any, rows: int) -> np.ndarray:
    """One finite number or NaN ("does not apply") per row, or a sentence that says what came instead."""
    if returned is None:
        raise RewardError(
            f"Reward {name!r} returned None for the whole batch; expected a list of {rows} numbers: "
            f"is a `return` missing at its end?"
        )
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"Reward {name!r} returned {_shown(returned)}; expected a list of {rows} numbers, "
            f"one per completion: collect them in a list and return that."
        )
    if len(values) != rows:
        raise RewardError(
            f"Reward {name!r} returned {len(values)} values for {rows} completions; expected exactly one "
            f"per completion, in their order: return None where it does not apply, and leave no row out."
        )
    numbers_ = [_checked_number(name, row, value) for row, value in enumerate(values)]
    return np.array(numbers_, dtype=np.float32)  # (B,)


def _checked_number(name: str, row: int, value: Any) -> float:
    if value is None:
        return math.nan
    shape = getattr(value, "shape", None)
    if shape == () and hasattr(value, "item"):  # a NumPy, MLX or torch scalar
        value = value.item()
    if not isinstance(value, (numbers.Real, decimal.Decimal)):
        advice = "return a number, for example float(...) of it"
        if isinstance(value, (list, tuple)) or shape:
            advice = "add its parts up to one number, or make several rewards of them"
        raise RewardError(
            f"Reward {name!r} returned {_shown(value)} for row {row}; "
            f"expected a finite number or None: {advice}."
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if math.isnan(number):
        raise RewardError(
            f"Reward {name!r} returned nan for row {row}; expected a finite number: "
            f"look for 0/0 or the mean of nothing, and return None where the reward does not apply."
        )
    if abs(number) > FLOAT32_MAX:
        raise RewardError(
            f"Reward {name!r} returned {number:g} for row {row}; expected a number that float32 can hold: "
            f"look for a division by zero or log(0), and clip the reward to a range such as [-10, 10]."
        )
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"


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
