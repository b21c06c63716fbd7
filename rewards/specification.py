"""What a set of rewards is specified by: its parts, their weights, their names."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from config.errors import InvalidConfigurationError
from rewards.registry import Reward

Composition = Literal["weighted_sum", "weighted_mean_clip01", "sum"]


def parts_of(spec: object) -> tuple[list[Any], list[float] | None]:
    """What a specification names, for ``resolve``, and the weights that are written in it; None = none is."""
    if spec is None:
        return [], None
    if _is_entry(spec):
        spec = [spec]
    if isinstance(spec, Mapping):
        return list(spec), list(spec.values())
    if isinstance(spec, str) or callable(spec) or not isinstance(spec, Iterable):
        return [spec], None
    parts = list(spec)
    for part in parts:
        if isinstance(part, Mapping) and not _is_entry(part):
            raise InvalidConfigurationError(
                f"The reward {dict(part)!r} has no name; an entry is "
                '{"name": …, "weight": …, "config": {…}}, of which only the name is needed.'
            )
    if not any(_is_entry(part) and part.get("weight") is not None for part in parts):
        return parts, None
    own = [part.get("weight") if _is_entry(part) else None for part in parts]
    return parts, [1.0 if weight is None else weight for weight in own]


def _is_entry(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("name"), str)


def check_composition(
    composition: str, names: Sequence[str], weights: Sequence[float], *, given: bool
) -> None:
    """Refuse a composition that there is not, or weights that it cannot have."""
    if composition not in get_args(Composition):
        raise InvalidConfigurationError(
            f"reward_composition: {composition!r} is none of {', '.join(get_args(Composition))}."
        )
    if composition == "sum" and given and any(weight != 1 for weight in weights):
        raise InvalidConfigurationError(
            "reward_composition: a sum has no weights, but there are "
            f"{', '.join(f'{n} {w:g}' for n, w in zip(names, weights, strict=True))}; leave them out, or "
            'use "weighted_sum".'
        )
    if composition == "weighted_mean_clip01" and (min(weights) < 0 or sum(weights) == 0):
        raise InvalidConfigurationError(
            "reward_composition: the weights of a weighted mean are at least 0 and not all 0, but there are "
            f"{', '.join(f'{n} {w:g}' for n, w in zip(names, weights, strict=True))}."
        )


def checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """One finite weight per name; 1 each where none is given."""
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


def unique_names(rewards: Sequence[Reward]) -> list[str]:
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
