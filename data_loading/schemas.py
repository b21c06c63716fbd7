"""What kinds of rows there are, by which columns they are told, and what each becomes for a trainer.

A schema is a name, the columns that a row needs for it, and one function per use. The first that fits a row
wins, so that those with more columns stand first; every further row of the file has to fit it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from config.data_config import DataConfig
from data_loading import row_uses as use
from data_loading.records import BadRowError
from data_loading.row_uses import RESERVED_COLUMNS, Fields, Row

__all__ = ["RESERVED_COLUMNS", "SCHEMAS", "Kind", "Row", "Schema", "find_schema", "missing"]

Kind = Literal["prompts", "pairs", "preferences", "steps"]
#: A row of a file to the rows that it is for a trainer; most often one.
Convert = Callable[[Fields, DataConfig], list[Row]]

#: The columns that a file without any of the schemas is asked for.
SIMPLEST: Mapping[Kind | None, tuple[str, ...]] = {
    None: ("prompt",),
    "prompts": ("prompt",),
    "pairs": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "steps": ("prompt", "steps", "labels"),
}
LOADERS: Mapping[Kind, str] = {
    "prompts": "load_prompts",
    "pairs": "load_pairs",
    "preferences": "load_preferences",
    "steps": "load_steps",
}
WANTED = {
    "prompts": "a prompt",
    "pairs": "a prompt and its completion",
    "preferences": "a chosen and a rejected answer, or an answer with its reward",
    "steps": "an answer in steps with their labels",
}


def _named(config: DataConfig, needs: Sequence[str]) -> tuple[str, ...]:
    return tuple(getattr(config, f"{name}_column", name) for name in needs)


# The table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """One kind of row. ``needs`` are names of options of ``DataConfig`` without ``_column``, or names as they stand."""

    name: str
    needs: tuple[str, ...]
    uses: Mapping[Kind, Convert] = field(default_factory=dict)
    fits: Callable[[Fields, DataConfig], bool] = lambda fields, config: True

    def columns(self, config: DataConfig) -> tuple[str, ...]:
        """The columns it needs, by the names that they have in this file."""
        return _named(config, self.needs)

    def matches(self, fields: Fields, config: DataConfig) -> bool:
        """Whether a row is of this kind."""
        return all(fields.get(name) is not None for name in self.columns(config)) and self.fits(
            fields, config
        )


SCHEMAS = (
    Schema(
        "preference (prompt, chosen, rejected)",
        ("prompt", "chosen", "rejected"),
        {"preferences": use.preference, "prompts": use.prompt_row},
    ),
    Schema("preference (chosen, rejected)", ("chosen", "rejected"), {"preferences": use.implicit_preference}),
    Schema(
        "stepwise supervision (prompt, steps, labels)",
        ("prompt", "steps", "labels"),
        {"steps": use.stepwise, "prompts": use.prompt_row},
    ),
    Schema(
        "stepwise supervision (prompt, completions, labels)",
        ("prompt", "completions", "labels"),
        {"steps": use.stepwise_completions},
    ),
    Schema(
        "ranked answers (prompt, completions)",
        ("prompt", "completions"),
        {"preferences": use.ranked},
        lambda fields, config: fields.get(config.labels_column) is None,
    ),
    Schema(
        "unpaired preference (prompt, completion, label)",
        ("prompt", "completion", "label"),
        {"preferences": use.labelled, "prompts": use.prompt_row, "pairs": use.refuse_labelled},
        lambda fields, config: use.as_label(fields["label"]) is not None,
    ),
    Schema(
        "scored answers (prompt, completion, reward)",
        ("prompt", "completion", "reward"),
        {"preferences": use.scored, "pairs": use.pair, "prompts": use.prompt_row},
    ),
    Schema(
        "scored text (text, reward)", ("text", "reward"), {"preferences": use.scored_text, "pairs": use.text}
    ),
    Schema("prompt and completion", ("prompt", "completion"), {"pairs": use.pair, "prompts": use.prompt_row}),
    Schema("chat (messages)", ("messages",), {"pairs": use.chat_pair, "prompts": use.chat_prompt}),
    Schema("prompt", ("prompt",), {"prompts": use.prompt_row}),
    Schema("text", ("text",), {"pairs": use.text}),
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
        read_by = " or ".join(LOADERS[known] for known in fitting[0].uses)
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
    "completions": ("responses", "candidates", "answers", "generations", "outputs"),
    "steps": ("solution_steps", "completion_steps"),
    "labels": ("ratings", "step_labels", "correctness"),
}


def _rename(fields: Fields, config: DataConfig, kind: Kind | None) -> str:
    """Which options would name columns that are there for those that are not; empty where none looks like it."""
    hints = []
    for name in (*SIMPLEST[kind], *(("completions",) if kind == "preferences" else ())):
        column = getattr(config, f"{name}_column")
        other = next((n for n in SYNONYMS[name] if n in fields), None)
        if column not in fields and other is not None:
            hints.append(f'{name}_column="{other}"')
    return "try " + ", ".join(hints) if hints else ""
