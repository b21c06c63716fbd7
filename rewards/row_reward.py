"""What the rewards of this package have in common: they judge row by row, and can say why.

A subclass declares its parameters as a config does (name, type, default, meaning), and one method:

    @register("brevity")
    @declared
    class Brevity(RowReward):
        reward_name: ClassVar[str] = "brevity"
        range: ClassVar[tuple[float, float]] = (0.0, 1.0)
        limit: PositiveInt = option(default=10, meaning="Words that cost nothing.")

        def judge(self, row: Row) -> Judgement:
            n = count_words(row.completion)
            return Judgement(min(1.0, self.limit / max(n, 1)), {"words": n})

``Brevity(limit=20)`` is then a reward like any other, and a config says
``{"name": "brevity", "weight": 0.5, "config": {"limit": 20}}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from config.declaration import Declaration
from config.errors import RewardError
from rewards.tags import TagSet
from rewards.text_utils import prompt_text_of, shortened, text_of

#: Columns in which a data set may keep the right answer, in the order in which they are looked for.
REFERENCE_COLUMNS = (
    "answer",
    "reference",
    "reference_completion",
    "solution",
    "completion",
    "target",
    "ground_truth",
)
#: Columns that hold a mapping of further fields.
META_COLUMNS = ("meta", "metadata")


class Judgement(NamedTuple):
    """A score, or None where the reward does not apply to the row, and what it is made of."""

    score: float | None
    why: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One completion with what its data set says about it."""

    prompt: str
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # one value of each column

    def field(self, name: str, default: Any = None) -> Any:
        """A column, or a field of the mapping in the column ``meta`` or ``metadata``."""
        if self.columns.get(name) is not None:
            return self.columns[name]
        for column in META_COLUMNS:
            meta = as_mapping(self.columns.get(column))
            if meta.get(name) is not None:
                return meta[name]
        return default

    def reference(self, column: str | None = None) -> str | None:
        """The right answer: from ``column``, or from the first of ``REFERENCE_COLUMNS`` that has one; else None."""
        for name in (column,) if column else REFERENCE_COLUMNS:
            value = self.field(name)
            if isinstance(value, (list, tuple)) and not any(isinstance(part, Mapping) for part in value):
                value = ", ".join(map(str, value))
            if value is not None and text_of(value).strip():
                return text_of(value)
        return None

    def tagged(self, tags: TagSet) -> str:
        """The completion, with the opening tag in front that its prompt ends with (as some templates have it)."""
        opened = tags.opened_by(str(self.columns.get("prompt_ending") or self.prompt))
        return tags.think_start + self.completion if opened else self.completion

    def answer(self, tags: TagSet, *, first: bool = False) -> str:
        """What follows the thinking, as ``TagSet.after_thinking`` has it."""
        return tags.after_thinking(self.tagged(tags), first=first)


class RowReward(Declaration):
    """A reward that judges each completion by itself.

    Attributes:
        reward_name: what it is called in metrics.
        range: least and greatest score with the parameters' defaults.
    """

    reward_name: ClassVar[str]
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Called once where the reward is named: what it needs and does not find is said before a run.

        Raises:
            InvalidConfigurationError: in a sentence.
        """

    def judge_all(self, rows: Sequence[Row]) -> list[Judgement]:
        """Score a batch; a reward that is faster for many at once overrides it."""
        judgements = []
        for number, row in enumerate(rows):
            try:
                judgements.append(self.judge(row))
            except RewardError as error:
                raise RewardError(f"{error} (row {number})", row=number) from error
        return judgements

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] = (), **columns: Any
    ) -> list[float | None]:
        """One score per completion, None where the reward does not apply."""
        return [j.score for j in self.judge_all(list(rows_of(prompts, completions, columns)))]


def rows_of(
    prompts: Sequence[Any] | None, completions: Sequence[Any], columns: Mapping[str, Any]
) -> Iterator[Row]:
    """The rows of a batch, columns given as keyword lists; what is no list counts for every row."""
    columns = {name: values for name, values in columns.items() if name not in ("log_extra", "log_metric")}
    for number, completion in enumerate(completions):
        own = {
            name: values[number] if isinstance(values, (list, tuple)) else values
            for name, values in columns.items()
            if not isinstance(values, (list, tuple)) or number < len(values)
        }
        prompt = prompt_text_of(prompts[number]) if prompts is not None and number < len(prompts) else ""
        yield Row(prompt, text_of(completion), own)


def as_mapping(meta: Any) -> Mapping[str, Any]:
    """The fields in a column ``meta``, which a table of strings keeps as JSON; none where it is something else."""
    if isinstance(meta, str) and meta.lstrip().startswith("{"):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            return {}
    return meta if isinstance(meta, Mapping) else {}


def not_applicable(reason: str) -> Judgement:
    """No score: the row is left out of this reward."""
    return Judgement(None, {"does not apply": reason})


def no_reference(column: str | None = None) -> Judgement:
    """No score, because the row has no right answer to compare with."""
    wanted = f"the column {column!r}" if column else f"a column such as {', '.join(REFERENCE_COLUMNS[:4])}"
    return not_applicable(f"no reference: {wanted} is missing or empty")


def limited(score: float, low: float = 0.0, high: float = 1.0) -> float:
    """``score`` within [low, high]."""
    return low if math.isnan(score) else min(max(score, low), high)


def quoted(text: str | None) -> str:
    """A text as a breakdown shows it."""
    return "(none)" if text is None else shortened(text)
