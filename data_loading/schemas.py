"""What kinds of rows there are, by which columns they are told, and what each becomes for a trainer.

A schema is a name, the columns that a row needs for it, and one function per use. The first that fits a row
wins, so that those with more columns stand first; every further row of the file has to fit it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from config.data_config import DataConfig
from data_loading.json_text import kind_of
from data_loading.messages import answer_text, as_prompt, shared_start, split_chat
from data_loading.records import BadRowError

Kind = Literal["prompts", "pairs", "preferences"]
Fields = Mapping[str, Any]
Row = dict[str, Any]
#: A row of a file to the rows that it is for a trainer; most often one.
Convert = Callable[[Fields, DataConfig], list[Row]]

#: What every reward is offered besides the fields of the prompts' rows.
RESERVED_COLUMNS = frozenset(
    {
        "self",
        "prompts",
        "completions",
        "prompt_ids",
        "prompt_ending",
        "completion_ids",
        "terminated",
        "log_extra",
        "log_metric",
        "trainer_state",
    }
)

#: The columns that a file without any of the schemas is asked for.
SIMPLEST: Mapping[Kind | None, tuple[str, ...]] = {
    None: ("prompt",),
    "prompts": ("prompt",),
    "pairs": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
}
LOADERS: Mapping[Kind, str] = {
    "prompts": "load_prompts",
    "pairs": "load_pairs",
    "preferences": "load_preferences",
}
WANTED = {
    "prompts": "a prompt",
    "pairs": "a prompt and its completion",
    "preferences": "a chosen and a rejected answer, or an answer with its reward",
}


# Uses --------------------------------------------------------------------------------------------------


def _prompt_row(fields: Fields, config: DataConfig) -> list[Row]:
    """A prompt; the other fields are columns for the reward, under their own names."""
    row = {"prompt": as_prompt(fields[config.prompt_column], fields, config)}
    return [row | _columns(fields, config, config.prompt_column)]


def _chat_prompt(fields: Fields, config: DataConfig) -> list[Row]:
    """The chat up to its last question; an answer after it is the column ``completion``."""
    before, answer = split_chat(fields[config.messages_column])
    row: Row = {"prompt": as_prompt(before, fields, config)}
    if answer is not None:
        row["completion"] = answer
    return [row | _columns(fields, config, config.messages_column)]


def _columns(fields: Fields, config: DataConfig, consumed: str) -> Row:
    columns = {name: value for name, value in fields.items() if name not in (consumed, "system", "prompt")}
    if config.completion_column in fields:
        columns.setdefault("completion", fields[config.completion_column])
    taken = sorted(RESERVED_COLUMNS & columns.keys())
    if taken:
        raise BadRowError(
            f'the field "{taken[0]}" has the name of something that rewards are given anyway; rename it'
        )
    return columns


def _pair(fields: Fields, config: DataConfig) -> list[Row]:
    prompt = as_prompt(fields[config.prompt_column], fields, config)
    return [{"prompt": prompt, "completion": _answer(fields, config.completion_column)}]


def _chat_pair(fields: Fields, config: DataConfig) -> list[Row]:
    before, answer = split_chat(fields[config.messages_column])
    if answer is None:
        raise BadRowError("the chat must end with the assistant's message, which is what is learned")
    return [{"prompt": as_prompt(before, fields, config), "completion": answer}]


def _text(fields: Fields, config: DataConfig) -> list[Row]:
    return [{"text": _answer(fields, config.text_column)}]


def _preference(fields: Fields, config: DataConfig) -> list[Row]:
    chosen = fields[config.chosen_column]
    if (
        isinstance(chosen, (list, tuple)) and len(chosen) > 1
    ):  # whole chats beside a prompt that they begin with
        return _implicit_preference(fields, config)
    prompt = as_prompt(fields[config.prompt_column], fields, config)
    better, worse = (_answer(fields, name) for name in (config.chosen_column, config.rejected_column))
    row = _comparison(prompt, better, worse)
    return [
        row | {"margin": _number(fields["margin"], "margin")} if fields.get("margin") is not None else row
    ]


def _comparison(prompt: Any, chosen: str, rejected: str) -> Row:
    if chosen == rejected:
        raise BadRowError(
            "the better and the worse answer are the same, so there is nothing to learn from them"
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _implicit_preference(fields: Fields, config: DataConfig) -> list[Row]:
    prompt, chosen, rejected = shared_start(fields[config.chosen_column], fields[config.rejected_column])
    return [_comparison(as_prompt(prompt, fields, config), chosen, rejected)]


def _ranked(fields: Fields, config: DataConfig) -> list[Row]:
    """Every pair of answers of which one is better: best first, or by ``rewards``."""
    answers = _list(fields, "completions")
    texts = [answer_text(answer, "completions") for answer in answers]
    if "rewards" in fields:
        scores = [_number(value, "rewards") for value in _list(fields, "rewards")]
        if len(scores) != len(texts):
            raise BadRowError(
                f'"rewards" must have one entry per completion ({len(texts)}), found {len(scores)}'
            )
    else:
        scores = [-float(i) for i in range(len(texts))]
    prompt = as_prompt(fields[config.prompt_column], fields, config)
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    rows = [
        {"prompt": prompt, "chosen": texts[better], "rejected": texts[worse]}
        for better, worse in combinations(order, 2)
        if scores[better] > scores[worse]
    ]
    if not rows:
        raise BadRowError("at least two completions of different rank are needed to compare them")
    return rows


def _scored(fields: Fields, config: DataConfig) -> list[Row]:
    return [
        _pair(fields, config)[0] | {"reward": _number(fields[config.reward_column], config.reward_column)}
    ]


def _scored_text(fields: Fields, config: DataConfig) -> list[Row]:
    reward = _number(fields[config.reward_column], config.reward_column)
    return [{"prompt": "", "completion": _answer(fields, config.text_column), "reward": reward}]


def _labelled(fields: Fields, config: DataConfig) -> list[Row]:
    return [_pair(fields, config)[0] | {"reward": float(fields["label"])}]


def _refuse_labelled(fields: Fields, config: DataConfig) -> list[Row]:
    raise BadRowError(
        '"label" says that some of these completions are bad, and SFT would imitate them all; keep the good ones '
        "without the label, or use load_preferences"
    )


def _answer(fields: Fields, name: str) -> str:
    return answer_text(fields[name], name)


def _list(fields: Fields, name: str) -> Sequence[Any]:
    value = fields[name]
    if not isinstance(value, (list, tuple)):
        raise BadRowError(f'"{name}" must be a list, found {kind_of(value)}')
    return value


def _number(value: Any, name: str) -> float:
    """A finite number, or a text that is one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError(f'"{name}" must be a finite number, or a text that is one, found {value!r:.60}')
    return number


def _named(config: DataConfig, needs: Sequence[str]) -> tuple[str, ...]:
    return tuple(getattr(config, f"{name}_column", name) for name in needs)


# The table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """One kind of row. ``needs`` are names of options of ``DataConfig`` without ``_column``, or names as they stand."""

    name: str
    needs: tuple[str, ...]
    uses: Mapping[Kind, Convert] = field(default_factory=dict)
    fits: Callable[[Fields], bool] = lambda fields: True

    def columns(self, config: DataConfig) -> tuple[str, ...]:
        """The columns it needs, by the names that they have in this file."""
        return _named(config, self.needs)

    def matches(self, fields: Fields, config: DataConfig) -> bool:
        """Whether a row is of this kind."""
        return all(fields.get(name) is not None for name in self.columns(config)) and self.fits(fields)


SCHEMAS = (
    Schema(
        "preference (prompt, chosen, rejected)",
        ("prompt", "chosen", "rejected"),
        {"preferences": _preference, "prompts": _prompt_row},
    ),
    Schema("preference (chosen, rejected)", ("chosen", "rejected"), {"preferences": _implicit_preference}),
    Schema("ranked answers (prompt, completions)", ("prompt", "completions"), {"preferences": _ranked}),
    Schema(
        "unpaired preference (prompt, completion, label)",
        ("prompt", "completion", "label"),
        {"preferences": _labelled, "prompts": _prompt_row, "pairs": _refuse_labelled},
        lambda fields: isinstance(fields["label"], bool),
    ),
    Schema(
        "scored answers (prompt, completion, reward)",
        ("prompt", "completion", "reward"),
        {"preferences": _scored, "pairs": _pair, "prompts": _prompt_row},
    ),
    Schema("scored text (text, reward)", ("text", "reward"), {"preferences": _scored_text, "pairs": _text}),
    Schema("prompt and completion", ("prompt", "completion"), {"pairs": _pair, "prompts": _prompt_row}),
    Schema("chat (messages)", ("messages",), {"pairs": _chat_pair, "prompts": _chat_prompt}),
    Schema("prompt", ("prompt",), {"prompts": _prompt_row}),
    Schema("text", ("text",), {"pairs": _text}),
)


def find_schema(fields: Fields, config: DataConfig, kind: Kind | None) -> Schema:
    """The first schema that a row fits and that has the use ``kind`` (None: any).

    Raises:
        BadRowError: naming the columns found and what to do.
    """
    fitting = [schema for schema in SCHEMAS if schema.matches(fields, config)]
    usable = [schema for schema in fitting if kind is None or kind in schema.uses]
    if usable:
        return usable[0]
    there = f"columns: {', '.join(map(str, fields)) or 'none'}"
    wanted = WANTED[kind] if kind is not None else "a prompt, a chat, a text or a pair of answers"
    null = [name for name in _named(config, SIMPLEST[kind]) if name in fields and fields[name] is None]
    if null:
        raise BadRowError(f'"{null[0]}" is null; {wanted} is expected')
    hint = _rename(fields, config, kind)
    if fitting and not hint:
        read_by = " or ".join(LOADERS[use] for use in fitting[0].uses)
        raise BadRowError(
            f"{wanted} is expected, found {fitting[0].name} ({there:.200}); that is read by {read_by}"
        )
    nearest_to = [s for s in SCHEMAS if s.needs == SIMPLEST[kind]] + [s for s in SCHEMAS if kind in s.uses]
    hint = hint or "rename the columns of the file, or name them in the config (prompt_column and others)"
    raise BadRowError(f"{missing(fields, config, nearest_to)} ({there:.200}); {hint}")


def missing(fields: Fields, config: DataConfig, schemas: Sequence[Schema]) -> str:
    """Which column is not there, or null, of the schema that comes nearest to fitting."""
    near = max(schemas, key=lambda schema: _present(schema, fields, config) / len(schema.needs))
    name = next((c for c in near.columns(config) if fields.get(c) is None), near.columns(config)[-1])
    return f'"{name}" is {"null" if name in fields else "missing"}'


def _present(schema: Schema, fields: Fields, config: DataConfig) -> int:
    return sum(fields.get(name) is not None for name in schema.columns(config))


#: What other collections call the same column.
SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "completion": ("answer", "response", "output", "solution", "target"),
    "messages": ("conversations", "conversation", "dialog", "chat"),
    "chosen": ("preferred", "better", "win"),
    "rejected": ("dispreferred", "worse", "lose"),
    "reward": ("score", "rating"),
    "text": ("content", "document"),
}


def _rename(fields: Fields, config: DataConfig, kind: Kind | None) -> str:
    """Which options would name columns that are there for those that are not; empty where none looks like it."""
    hints = []
    for name in SIMPLEST[kind]:
        column = getattr(config, f"{name}_column")
        other = next((n for n in SYNONYMS[name] if n in fields), None)
        if column not in fields and other is not None:
            hints.append(f'{name}_column="{other}"')
    return "try " + ", ".join(hints) if hints else ""
