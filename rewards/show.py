"""What rewards there are, what one of them is made of, and what it says about a text: as plain text."""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from config.declaration import Declaration
from config.errors import InvalidConfigurationError, RewardError
from rewards.base_reward import context_of, reward_in
from rewards.calling import Caller, Heard, TrainerState
from rewards.checking import checked_values
from rewards.registry import aliases_of, names, registered, resolve
from rewards.row_reward import Row, RowReward
from rewards.specification import unique_names
from rewards.tags import PRESETS, TagSet

WIDTH = 100


def list_rewards() -> str:
    """A line for each reward: its name, its other names, its range, the beginning of what it says of itself."""
    lines, seen = [], set()
    for name in names():
        reward = registered(name)
        if reward is None or id(reward) in seen:
            continue
        seen.add(id(reward))
        first = own_name(name)
        others = [alias for alias in aliases_of(reward) if alias != first]
        also = f" (also {', '.join(others)})" if others else ""
        lines.append((first, f"{first}{also}", _range(reward), _summary(reward)))
    shown = [
        f"{title}  {scores}\n{textwrap.fill(text, WIDTH, initial_indent='    ', subsequent_indent='    ')}"
        for _, title, scores, text in sorted(lines)
    ]
    return "\n".join(shown)


def show(name: str) -> str:
    """Everything about one reward: names, range, formula, parameters with their defaults.

    Raises:
        InvalidConfigurationError: for an unknown name, with the nearest.
    """
    reward: Any = registered(name) or resolve(name)
    title = own_name(name)
    others = [alias for alias in aliases_of(reward) if alias != title]
    parts = [f"{title}  {_range(reward)}".rstrip()]
    if others:
        parts.append(f"also: {', '.join(others)}")
    parts += ["", inspect.getdoc(reward) or "(no description)"]
    parameters = _parameters(reward)
    if parameters:
        parts += ["", "Parameters (config):"]
        for parameter, kind, default, meaning in parameters:
            parts.append(f"  {parameter} = {default}  ({kind})" if kind else f"  {parameter} = {default}")
            if meaning:
                parts.append(textwrap.indent(textwrap.fill(meaning, WIDTH - 6), "      "))
    return "\n".join(parts)


def try_reward(
    name: str,
    prompt: str,
    completion: str,
    config: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> str:
    """What a reward says about one completion, and why.

    Args:
        config: the reward's parameters.
        columns: the row's other fields, one value each, such as ``{"answer": "72"}``.
    Raises:
        InvalidConfigurationError, RewardError: as a run would.
    """
    reward = resolve({"name": name, "config": dict(config or {})})
    columns = dict(columns or {})
    why: dict[str, Any] = {}
    asked, label = _telling(reward, Row(prompt, completion, columns), why), _label(reward, name)
    # Called as in a run, so that whatever goes wrong is the same sentence.
    offered = {"prompts": [prompt], "completions": [completion], **{key: [v] for key, v in columns.items()}}
    heard = Heard(rows=1)
    said = Caller(offered, heard, TrainerState(), None).call_all({label: asked}, stop=True)[label]
    if isinstance(said, RewardError):
        raise said
    values, unusable = checked_values(label, said, 1)
    if unusable:
        raise unusable[0]
    why |= {key: kept[0] for key, kept in heard.extra.items()} | heard.measured
    return _scored(label, None if math.isnan(values[0]) else float(values[0]), why)


def _label(reward: Any, name: str) -> str:
    return (
        own_name(name)
        if hasattr(reward, "compute") or hasattr(reward, "inner")
        else unique_names([reward])[0]
    )


def _telling(reward: Any, row: Row, why: dict[str, Any]) -> Callable[..., Any]:
    """A reward that judges ``row`` and leaves in ``why`` what the score is made of; ``reward`` where that is hidden."""
    judge = getattr(reward, "inner", reward)

    def row_by_row(**offered: Any) -> list[Any]:
        judgement = reward.judge_all([row])[0]
        why.update(judgement.why)
        return [judgement.score]

    def by_class(**offered: Any) -> list[Any]:
        score, log = reward_in(judge.compute(context_of(row)), 0)
        why.update(log if isinstance(log, Mapping) else {"log": log})
        return [score]

    if isinstance(reward, RowReward):
        return row_by_row
    return by_class if hasattr(judge, "compute") else reward


def own_name(name: str) -> str:
    """The name that a reward has in metrics, whichever of its names is given."""
    reward: Any = registered(name)
    if reward is None:
        return name
    return str(getattr(reward, "reward_name", None) or getattr(reward, "__name__", name))


def _scored(name: str, score: Any, why: Mapping[str, Any]) -> str:
    lines = [f"{name} = {'(does not apply)' if score is None else _number(score)}"]
    width = max((len(str(key)) for key in why), default=0)
    lines += [f"  {key!s:<{width}}  {_value(value)}" for key, value in why.items() if value is not None]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else repr(value)


def _range(reward: Any) -> str:
    if not hasattr(reward, "range"):
        return ""
    low, high = reward.range
    left = "(-∞" if math.isinf(low) else f"[{low:g}"
    right = "∞)" if math.isinf(high) else f"{high:g}]"
    return f"{left}, {right}"


def _summary(reward: Any) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((inspect.getdoc(reward) or "(no description)").partition("\n\n")[0].split())


def _parameters(reward: Any) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each parameter."""
    if inspect.isclass(reward) and issubclass(reward, Declaration):
        hints = get_type_hints(reward)
        fields = [f for f in dataclasses.fields(reward) if not f.name.startswith("_")]  # type: ignore[arg-type]
        return [(f.name, _kind(hints[f.name]), *_default_and_meaning(f)) for f in fields]
    if not callable(reward):
        raise InvalidConfigurationError(f"{reward!r} is no reward")
    signature = inspect.signature(reward)
    return [
        (p.name, "", repr(p.default), "")
        for p in signature.parameters.values()
        if p.default is not p.empty and p.name != "terminated"
    ]


def _default_and_meaning(field: Any) -> tuple[str, str]:
    default = getattr(field.default, "default", field.default)
    if isinstance(default, TagSet):
        shown = next((name for name, tags in PRESETS.items() if tags == default), str(default))
    elif isinstance(default, tuple) and len(default) > 3:
        shown = f"({len(default)} entries, such as {default[0]!r})"
    elif default is ... or "Undefined" in type(default).__name__:
        shown = "(to be given)"
    else:
        shown = (
            repr(default)
            if not isinstance(default, str)
            else f'"{default[:60]}{"…" if len(default) > 60 else ""}"'
        )
    return shown, str(getattr(field.default, "description", "") or "")


def _kind(hint: Any) -> str:
    if hint is TagSet:
        return "tags"
    if inspect.isclass(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("Literal", "one of ")
