"""What one row of a file becomes for one kind of trainer: a function for each use in the table of ``schemas``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from config.data_config import DataConfig
from data_loading.json_text import kind_of, parse_value
from data_loading.messages import answer_text, as_prompt, check_text, shared_start, split_chat
from data_loading.records import BadRowError

Fields = Mapping[str, Any]
Row = dict[str, Any]

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


def prompt_row(fields: Fields, config: DataConfig) -> list[Row]:
    """A prompt; the other fields are columns for the reward, under their own names."""
    row = {"prompt": as_prompt(fields[config.prompt_column], fields, config)}
    return [row | _columns(fields, config, config.prompt_column)]


def chat_prompt(fields: Fields, config: DataConfig) -> list[Row]:
    """The chat up to its last question; an answer after it is the column ``completion``."""
    before, answer = split_chat(fields[config.messages_column])
    row: Row = {"prompt": as_prompt(before, fields, config)}
    if answer is not None:
        row["completion"] = answer
    return [row | _columns(fields, config, config.messages_column)]


def _columns(fields: Fields, config: DataConfig, consumed: str) -> Row:
    columns = {name: value for name, value in fields.items() if name not in (consumed, "system", "prompt")}
    if config.completion_column in fields:
        columns["completion"] = fields[config.completion_column]
    taken = sorted(RESERVED_COLUMNS & columns.keys())
    if taken:
        raise BadRowError(
            f'the field "{taken[0]}" has the name of something that rewards are given anyway; rename it'
        )
    return columns


def pair(fields: Fields, config: DataConfig) -> list[Row]:
    return [_pair(fields, config, empty=False)]


def _pair(fields: Fields, config: DataConfig, *, empty: bool) -> Row:
    """``empty``: whether the answer may be: as a bad one that is judged, not as one that is imitated."""
    prompt = as_prompt(fields[config.prompt_column], fields, config)
    name = config.completion_column
    return {"prompt": prompt, "completion": answer_text(fields[name], name, empty=empty)}


def chat_pair(fields: Fields, config: DataConfig) -> list[Row]:
    before, answer = split_chat(fields[config.messages_column])
    if answer is None:
        raise BadRowError("the chat must end with the assistant's message, which is what is learned")
    return [{"prompt": as_prompt(before, fields, config), "completion": answer}]


def text(fields: Fields, config: DataConfig) -> list[Row]:
    return [{"text": _answer(fields, config.text_column)}]


def preference(fields: Fields, config: DataConfig) -> list[Row]:
    chosen = fields[config.chosen_column]
    if (
        isinstance(chosen, (list, tuple)) and len(chosen) > 1
    ):  # whole chats beside a prompt that they begin with
        return implicit_preference(fields, config)
    prompt = as_prompt(fields[config.prompt_column], fields, config)
    better, worse = (_answer(fields, name) for name in (config.chosen_column, config.rejected_column))
    return [_comparison(fields, prompt, better, worse)]


_SAME = "the better and the worse answer are the same, so there is nothing to learn from them"


def _comparison(fields: Fields, prompt: Any, chosen: str, rejected: str) -> Row:
    if chosen == rejected:
        raise BadRowError(_SAME)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    margin = fields.get("margin")
    return row if margin is None else row | {"margin": _number(margin, "margin")}


def implicit_preference(fields: Fields, config: DataConfig) -> list[Row]:
    prompt, chosen, rejected = shared_start(fields[config.chosen_column], fields[config.rejected_column])
    return [_comparison(fields, as_prompt(prompt, fields, config), chosen, rejected)]


def ranked(fields: Fields, config: DataConfig) -> list[Row]:
    """A list of answers, the best first, with their rewards; without any they are ranked by where they stand."""
    name, rewards = config.completions_column, config.rewards_column
    texts = [answer_text(answer, name) for answer in _list(fields, name)]
    if fields.get(rewards) is not None:
        scores = [_number(value, rewards) for value in _list(fields, rewards)]
        if len(scores) != len(texts):
            raise BadRowError(
                f'"{rewards}" must have one entry per completion ({len(texts)}), found {len(scores)}'
            )
    else:
        _refuse_other_ranks(fields, config, len(texts))
        scores = [-float(i) for i in range(len(texts))]
    if len(set(scores)) < 2:
        raise BadRowError("at least two completions of different rank are needed to compare them")
    if len(set(texts)) < len(set(zip(texts, scores, strict=True))):
        raise BadRowError(_SAME)
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    prompt = as_prompt(fields[config.prompt_column], fields, config)
    return [
        {"prompt": prompt, "completions": [texts[i] for i in order], "rewards": [scores[i] for i in order]}
    ]


def _refuse_other_ranks(fields: Fields, config: DataConfig, count: int) -> None:
    """Numbers beside the answers that nobody was told of may well contradict their order."""
    for name in ("scores", "ratings", "ranks", "ranking"):
        if isinstance(fields.get(name), (list, tuple)) and len(fields[name]) == count:
            raise BadRowError(
                f'"{name}" stands beside "{config.completions_column}", and there is no "{config.rewards_column}"; '
                f'give rewards_column="{name}" if more of it is better, or drop the column if the best answer stands '
                "first"
            )


def stepwise(fields: Fields, config: DataConfig) -> list[Row]:
    """The steps of one answer, each with how right it is, from 0 to 1."""
    return [_steps(fields, config, config.steps_column)]


def stepwise_completions(fields: Fields, config: DataConfig) -> list[Row]:
    """The same where the steps are called completions, as in TRL."""
    return [_steps(fields, config, config.completions_column)]


def _steps(fields: Fields, config: DataConfig, name: str) -> Row:
    column = config.labels_column
    steps, labels = _list(fields, name), _list(fields, column)
    if not steps:
        raise BadRowError(f'"{name}" has no steps; at least one is needed')
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise BadRowError(f'"{name}", step {number}: a text is expected, found {kind_of(step)}')
        check_text(step, f"{name}, step {number}")
    if len(labels) != len(steps):
        raise BadRowError(f'"{column}" must have one entry per step ({len(steps)}), found {len(labels)}')
    for number, label in enumerate(labels, start=1):
        if not isinstance(label, (int, float)) or not 0 <= label <= 1:
            raise BadRowError(
                f'"{column}", step {number}: true, false or a number from 0 to 1 is expected, found {label!r:.60}'
            )
    prompt = as_prompt(fields[config.prompt_column], fields, config)
    return {"prompt": prompt, "steps": list(steps), "labels": [float(label) for label in labels]}


def scored(fields: Fields, config: DataConfig) -> list[Row]:
    reward = _number(fields[config.reward_column], config.reward_column)
    return [_pair(fields, config, empty=True) | {"reward": reward}]


def scored_text(fields: Fields, config: DataConfig) -> list[Row]:
    reward = _number(fields[config.reward_column], config.reward_column)
    return [{"prompt": "", "completion": _answer(fields, config.text_column), "reward": reward}]


def labelled(fields: Fields, config: DataConfig) -> list[Row]:
    label = as_label(fields["label"])
    assert label is not None  # or the schema would not fit
    return [_pair(fields, config, empty=True) | {"reward": float(label)}]


def as_label(value: Any) -> bool | None:
    """Whether a label says good; None for what says neither. A cell of a table is text, and some write 1 and 0."""
    text = value.strip().lower() if isinstance(value, str) else value
    if isinstance(text, (bool, int, float, str)):
        return True if text in (True, "true", "1") else False if text in (False, "false", "0") else None
    return None


def refuse_labelled(fields: Fields, config: DataConfig) -> list[Row]:
    raise BadRowError(
        '"label" says that some of these completions are bad, and SFT would imitate them all; keep the good ones '
        "without the label, or use load_preferences"
    )


def _answer(fields: Fields, name: str) -> str:
    return answer_text(fields[name], name)


def _list(fields: Fields, name: str) -> Sequence[Any]:
    """A list, or a text that is one in JSON, as a cell of a table is."""
    value = fields[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_value(value)
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
