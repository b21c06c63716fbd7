"""How rewards are called: TRL's convention, all of them together, within a time limit.

Everything is passed by keyword, and a function receives exactly the keywords that its signature names (all of them
if it has ``**kwargs``). Besides ``prompts``, ``completions`` and the columns of the data set these are the
``SERVICES`` of TRL: ``log_extra(column, values)`` writes a column beside logged samples, ``log_metric(name, value)``
reports a number, ``trainer_state.global_step`` is the step of the run.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sysconfig
import time
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from config.errors import RewardError, ToolkitError
from rewards.registry import Reward
from rewards.text_utils import shortened, text_of
from rewards.time_limit import TimeIsUp, call_within

_LIBRARY_FOLDERS = tuple(
    sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")
)
SEARCH = 30.0  # seconds that may go into finding the row on which a reward fails


class RewardTimeout(RewardError):
    """A reward took longer than ``reward_timeout``."""


@dataclass
class TrainerState:
    """What rewards can know about the run."""

    global_step: int = 0


@dataclass
class Heard:
    """What rewards said beside their scores, in one batch of ``rows``."""

    rows: int
    extra: dict[str, list[Any]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep a column of further facts, one per completion."""
        values = list(values)
        if len(values) != self.rows:
            raise ValueError(f"log_extra({column!r}): {len(values)} values for {self.rows} completions")
        self.extra[str(column)] = values

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number to be reported with the step."""
        self.measured[str(name)] = float(value)


SERVICES = ("log_extra", "log_metric", "trainer_state")


class Caller:
    """Calls one set of rewards on one batch.

    Args:
        offered: ``prompts``, ``completions`` and the columns, one entry per row.
        timeout: seconds per reward; None is no limit.
    """

    def __init__(
        self, offered: Mapping[str, Any], heard: Heard, state: TrainerState, timeout: float | None
    ) -> None:
        self.offered = offered
        self.rows = heard.rows
        self.state = state
        self.services = {
            "log_extra": heard.log_extra,
            "log_metric": heard.log_metric,
            "trainer_state": state,
        }
        self.timeout = timeout

    def call_all(self, rewards: Mapping[str, Reward], *, stop: bool) -> dict[str, Any]:
        """What each reward returned, or the ``RewardError`` that it ended in; ``async`` rewards wait together.

        With ``stop`` nothing is called after one that fails, and only that one is returned.

        Raises:
            RewardError: for a signature that asks for what is not there.
        """
        returned: dict[str, Any] = {}
        try:
            for name, reward in rewards.items():
                returned[name] = self._call(name, reward, self.offered)
                if stop and isinstance(returned[name], RewardError):
                    _close(returned)
                    return {name: returned[name]}
        except BaseException:
            _close(returned)
            raise
        waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
        if waiting:
            returned.update(zip(waiting, self._wait_for_all(waiting), strict=True))
        return {name: returned[name] for name in rewards}

    def call_row(self, name: str, reward: Reward, row: int) -> Any:
        """What a reward says about one row alone, or the ``RewardError`` that it ends in."""
        alone = {
            key: [values[row]] if isinstance(values, (list, tuple)) else values
            for key, values in self.offered.items()
        }
        # What it logs has one entry now, and is not kept beside what it logs of the batch.
        caller = Caller(alone, Heard(1), self.state, self.timeout)
        said = caller._call(name, reward, alone)
        if inspect.isawaitable(said):
            said = caller._wait_for_all({name: said})[0]
        return said

    def _call(self, name: str, reward: Reward, offered: Mapping[str, Any]) -> Any:
        keywords = self._accepted(name, reward, offered)
        # Each reward gets its own lists: one that sorts or pops them must not change what the others see.
        keywords = {key: list(value) if isinstance(value, list) else value for key, value in keywords.items()}
        try:
            return call_within(self.timeout, lambda: reward(**keywords))
        except TimeIsUp:
            return self._timed_out(name)
        except (Exception, SystemExit) as error:  # exit() in a grader must not look like the end of a run
            return self._failed(name, error)

    def _accepted(self, name: str, reward: Reward, offered: Mapping[str, Any]) -> dict[str, Any]:
        """The part of what there is that the signature of ``reward`` asks for."""
        everything = {**offered, **self.services}
        if isinstance(reward, functools.partial):  # what its config sets, no column of that name replaces
            everything = {key: value for key, value in everything.items() if key not in reward.keywords}
        try:
            parameters = list(inspect.signature(reward).parameters.values())
        except (TypeError, ValueError):  # some C functions have no signature: let them have everything
            return everything
        for parameter in parameters:
            needed = parameter.default is parameter.empty
            if needed and parameter.kind is parameter.POSITIONAL_ONLY:
                raise RewardError(
                    f"Reward {name!r} takes {parameter.name!r} by position only, but rewards are called by "
                    f"keyword: remove the / from its signature, or wrap it in a function of "
                    f"(prompts, completions, **columns)."
                )
            by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if needed and by_name and parameter.name not in everything:
                raise RewardError(
                    f"Reward {name!r} asks for the column {parameter.name!r}, which is not there; there are "
                    f"{', '.join(sorted(offered))}: add it to the data set or give the parameter a default value."
                )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return everything
        return {p.name: everything[p.name] for p in parameters if p.name in everything}

    def _wait_for_all(self, waiting: Mapping[str, Awaitable[Any]]) -> list[Any]:
        async def one(name: str, answer: Awaitable[Any]) -> Any:
            begin = time.monotonic()
            try:
                return await asyncio.wait_for(answer, self.timeout)
            except TimeoutError as error:  # of the limit, or one that the reward raised itself before it
                over = self.timeout is not None and time.monotonic() - begin >= self.timeout
                return self._timed_out(name) if over else self._failed(name, error)
            except (Exception, SystemExit) as error:
                return self._failed(name, error)

        async def together() -> list[Any]:
            return list(await asyncio.gather(*(one(name, answer) for name, answer in waiting.items())))

        def run() -> list[Any]:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return asyncio.run(together())
            # A notebook runs its cells inside a loop already, and loops do not nest: one in another thread.
            with ThreadPoolExecutor(max_workers=1) as pool:
                return pool.submit(asyncio.run, together()).result()

        try:
            # A coroutine that never awaits holds up the loop itself; the loop's own limit cannot see that.
            return call_within(None if self.timeout is None else self.timeout + 1.0, run)
        except TimeIsUp:
            return [self._timed_out(name) for name in waiting]

    def _timed_out(self, name: str) -> RewardTimeout:
        return RewardTimeout(
            f"Reward {name!r} took longer than reward_timeout = {self.timeout:g} s for {self.rows} completions; "
            f"expected an answer by then: look for a loop or a server that never ends, or raise reward_timeout."
        )

    def _failed(self, name: str, error: BaseException) -> RewardError:
        sentence = self._what_was_raised(name, error)
        failed = RewardError(sentence, row=getattr(error, "row", None))
        failed.__cause__ = error
        return failed

    def _what_was_raised(self, name: str, error: BaseException) -> str:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in _OURS]
        own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARY_FOLDERS, "<frozen"))]
        where = next((f" at {frame.filename}:{frame.lineno}" for frame in reversed(own or frames)), "")
        if isinstance(error, ToolkitError):  # a sentence already, with its own advice
            return f"Reward {name!r}: {error}"
        return (
            f"Reward {name!r} raised {type(error).__name__}: {error}{where} while scoring {self.rows} completions; "
            f"expected one number per completion: mend it there, or return None for rows that it cannot judge."
        )


_OURS = (__file__, call_within.__code__.co_filename)


def _close(returned: Mapping[str, Any]) -> None:
    for value in returned.values():
        if inspect.iscoroutine(value):
            value.close()  # or Python complains, after our sentence, that it was never awaited


def with_its_row(error: RewardError, row: int, completions: Sequence[Any]) -> RewardError:
    """The same error, naming the row that is to blame and what is in it."""
    text = shortened(text_of(completions[row]))
    found = type(error)(f"{error} It fails on row {row} alone, whose completion is {text}.", row=row)
    found.__cause__ = error.__cause__
    return found
