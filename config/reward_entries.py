"""The entries of ``rewards``: a name, or a name with a weight and options of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from config.declaration import nearest, shown

KEYS = ("name", "weight", "config")


def _checked(value: Any) -> list[Any]:
    """The entries in one form each: a name, or a mapping with ``name`` and any of ``weight`` and ``config``."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping) and "name" in value:
        value = [value]
    if isinstance(value, Mapping):  # name → weight
        value = [{"name": name, "weight": weight} for name, weight in value.items()]
    if not isinstance(value, (list, tuple)):
        raise ValueError('a list is expected, of names or of entries like {name = "jaccard", weight = 0.5}')
    if not value:
        raise ValueError("at least one reward is expected; leave rewards out for the default one")
    return [_entry(one, position) for position, one in enumerate(value, start=1)]


def _entry(one: Any, position: int) -> Any:
    if isinstance(one, str) and one.strip():
        return one
    if not isinstance(one, Mapping):
        raise ValueError(
            f"entry {position} is {shown(one)}, and a name or a {{name, weight, config}} is expected"
        )
    for key in one:
        if key not in KEYS:
            raise ValueError(
                f'entry {position} has no "{key}"{nearest(str(key), KEYS)} (there are name, weight and config, and '
                "what the reward itself understands goes under config)"
            )
    if not isinstance(one.get("name"), str) or not one["name"].strip():
        raise ValueError(f"entry {position} needs a name, found {shown(dict(one))}")
    weight, config = one.get("weight"), one.get("config")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, (int, float)) or not _finite(weight)
    ):
        raise ValueError(f'the weight of "{one["name"]}" is {shown(weight)}, and a finite number is expected')
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(
            f'the config of "{one["name"]}" is {shown(config)}, and a table of options is expected'
        )
    return {key: one[key] for key in KEYS if one.get(key) is not None}


def _finite(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


#: What ``RewardSet.build`` takes, as a file or a flag can say it.
Rewards = Annotated[list[Any], BeforeValidator(_checked)]
