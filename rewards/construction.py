"""From a class or function and its parameters to a reward that can be called."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from config.declaration import Declaration
from config.errors import InvalidConfigurationError, ToolkitError

T = TypeVar("T")


def made(found: object, spec: str, config: Mapping[str, Any]) -> object:
    """``found`` with the parameters in ``config``: an instance of a class, a function with keywords filled in.

    Raises:
        InvalidConfigurationError: for a parameter that it does not have, naming the nearest, or a value that it
            refuses.
    """
    if inspect.isclass(found):
        return _instance(found, spec, config)
    if not config:
        return found
    if not inspect.isroutine(found):
        raise InvalidConfigurationError(
            f"The reward {spec!r} is a {type(found).__name__} that is made already, so it takes no config "
            f"({', '.join(map(str, config))}); leave that out."
        )
    adjustable = [p.name for p in inspect.signature(found).parameters.values() if p.default is not p.empty]
    _refuse_unknown(spec, config, adjustable)
    return functools.partial(found, **config)


def _instance(cls: type, spec: str, config: Mapping[str, Any]) -> object:
    if issubclass(cls, Declaration):
        names = [name for name in cls.__dataclass_fields__ if not name.startswith("_")]  # type: ignore[attr-defined]
        _refuse_unknown(spec, config, names)
        try:
            return cls(**config)
        except InvalidConfigurationError as error:
            raise InvalidConfigurationError(f"reward {spec!r}: {error}") from None
    parameters = list(inspect.signature(cls).parameters.values())
    takes_mapping = [p.name for p in parameters][:1] == ["config"]
    keywords: dict[str, Any] = {"config": dict(config)} if takes_mapping else dict(config)
    if not takes_mapping and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        _refuse_unknown(spec, config, [p.name for p in parameters])
    try:
        return cls(**keywords)
    except ToolkitError:
        raise
    except Exception as error:
        how = f"with {', '.join(map(str, config))}" if config else "without arguments"
        raise InvalidConfigurationError(
            f"The reward {spec!r} is a class that cannot be made {how} "
            f"({type(error).__name__}: {error}); give an instance of it, or a function."
        ) from error


def _refuse_unknown(spec: str, config: Mapping[str, Any], known: list[str]) -> None:
    for key in config:
        if key not in known:
            raise InvalidConfigurationError(
                f"The reward {spec!r} has no parameter {key!r}; {nearest(str(key), known)}."
            )


def as_reward(found: object, spec: str) -> Callable[..., Any]:
    """``found`` if it can be called, a caller of its ``compute(context)`` if it has that, or a refusal."""
    if callable(found):
        return found
    if callable(getattr(found, "compute", None)):
        from rewards.base_reward import ComputeReward  # which builds on this module

        return ComputeReward(found)
    raise InvalidConfigurationError(
        f"The reward {spec!r} is a {type(found).__name__}, which cannot be called; "
        f"a reward is a function of (prompts, completions, **columns) that returns a list of numbers."
    )


def named(reward: T, name: str) -> T:
    """The same reward, logged under ``name``."""
    object.__setattr__(reward, "__name__", name)  # a declared reward is frozen
    object.__setattr__(reward, "reward_name", name)
    return reward


def nearest(word: str, choices: Iterable[str]) -> str:
    """What was meant by ``word``, or all there is, as the end of a sentence."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(map(repr, near)) + "?"
    return "there are: " + (", ".join(choices) or "none")
