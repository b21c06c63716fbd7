"""Rewards written as classes that judge one completion at a time:

    @RewardRegistry.register("politeness")
    class Politeness(BaseReward):
        def __init__(self, config):
            super().__init__(config)
            self.word = config.get("word", "please")

        def compute(self, context):
            self.validate_inputs(context)
            return {"reward": float(self.word in context.generated_text), "log": {"words": 1}}

``"log"`` is optional: it is written beside logged samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from config.errors import RewardError
from rewards.context import RewardContext
from rewards.row_reward import META_COLUMNS, REFERENCE_COLUMNS, Row, as_mapping, rows_of

_GIVEN = ("prompt_ids", "prompt_ending", "completion_ids", "terminated", "trainer_state")
_NOT_METADATA = (*META_COLUMNS, "test_cases", *_GIVEN)


class ComputeReward:
    """Anything with ``compute(context) -> {"reward": number, "log": …}`` (or a number), as a reward for a batch."""

    def __init__(self, judge: Any) -> None:
        self.inner = judge
        self.reward_name = getattr(judge, "reward_name", None) or type(judge).__name__

    def __call__(
        self,
        completions: Sequence[Any],
        prompts: Sequence[Any] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """One value per completion, from one call of ``compute`` each."""
        columns.pop("log_metric", None)
        scores, logs = [], []
        for number, row in enumerate(rows_of(prompts, completions, columns)):
            score, log = reward_in(self.inner.compute(context_of(row)), number)
            scores.append(score)
            logs.append(log)
        if log_extra is not None and any(log is not None for log in logs):
            log_extra(f"{self.reward_name} log", logs)
        return scores


class BaseReward(ABC):
    """Base of a reward class; its parameters arrive as one mapping.

    Attributes:
        config: the parameters of its entry in a config.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config: dict[str, Any] = dict(config or {})

    @abstractmethod
    def compute(self, context: RewardContext) -> dict[str, Any]:
        """``{"reward": a number or None, "log": anything}`` for one completion; the log may be left out."""

    def validate_inputs(self, context: RewardContext) -> None:
        """Refuse what is no context, or one without texts.

        Raises:
            ValueError: naming what is wrong. An empty completion is in order.
        """
        for name in ("generated_text", "prompt_text"):
            value = getattr(context, name, None)
            if not isinstance(value, str):
                raise ValueError(f"context.{name} is a {type(value).__name__}; a text is expected")

    def __call__(
        self,
        completions: Sequence[Any],
        prompts: Sequence[Any] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """One value per completion, as any reward gives it."""
        return ComputeReward(self)(completions, prompts, log_extra, **columns)


def context_of(row: Row) -> RewardContext:
    """A row as classes are told about it."""
    metadata = {k: v for k, v in row.columns.items() if k not in (*_NOT_METADATA, *REFERENCE_COLUMNS)}
    for column in META_COLUMNS:
        metadata |= as_mapping(row.columns.get(column))
    tests = row.field("test_cases") or ()
    state = row.columns.get("trainer_state")
    return RewardContext(
        generated_text=row.completion,
        prompt_text=row.prompt,
        reference_completion=row.reference(),
        test_cases=tests if isinstance(tests, (list, tuple)) else [tests],
        metadata=metadata,
        update_step=int(getattr(state, "global_step", 0) or 0),
    )


def reward_in(returned: Any, number: int) -> tuple[Any, Any]:
    """The reward and the log in what ``compute`` returned for row ``number``."""
    if not isinstance(returned, Mapping):
        return returned, None
    if "reward" not in returned:
        raise RewardError(
            f'compute returned a mapping without "reward" for row {number} (it has: '
            f'{", ".join(map(str, returned)) or "nothing"}); return {{"reward": number}}',
            row=number,
        )
    return returned["reward"], returned.get("log")
