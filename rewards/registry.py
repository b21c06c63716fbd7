"""Names for rewards, and the ways to point at one.

A reward is any callable ``f(prompts, completions, **columns) -> list[float | None]``. This file only
answers "which callable is meant by that?"; how it is called and checked is in ``composition.py``.

    resolve(my_function)                  the callable itself
    resolve("sequential_digits")          a name given with @register
    resolve("my_package.rewards:brevity") an attribute of an importable module
    resolve("my_rewards.py:brevity")      a function in a file
    resolve({"name": ANY OF THESE STRINGS, "config": {"limit": 20}})    the same with parameters

Parameters go to a class as keywords (or as one mapping called ``config``, if that is what its constructor takes), and
to the keywords of a function that have defaults. A class may judge a batch when it is called, or one row in
``compute(context)`` (``base_reward.py``).

Every module of this package is imported when the first name is looked up, so a new file with a
``@register`` in it needs no entry in a list. The price: such a file must import without optional
libraries; it imports those inside its functions.

Naming a module or a file executes it, with the rights of the user. That is the intention, but it
means that a config file from a stranger is a program from a stranger.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import rewards
from config.errors import InvalidConfigurationError
from rewards import older_imports
from rewards.construction import as_reward, made, named, nearest

__all__ = ["RewardRegistry", "aliases_of", "entry_of", "named", "names", "register", "registered", "resolve"]

Reward = Callable[..., Any]
SomeReward = TypeVar("SomeReward", bound=Reward)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.+-]*")
_registered: dict[str, Reward] = {}


def register(name: str, *aliases: str) -> Callable[[SomeReward], SomeReward]:
    """Give a reward a name that configs can use.

    >>> @register("brevity")
    ... def brevity(completions, **columns):
    ...     return [1.0 / (1 + len(text)) for text in completions]
    >>> resolve("brevity") is brevity
    True
    """

    def decorate(reward: SomeReward) -> SomeReward:
        for key in (name, *aliases):
            if not _NAME.fullmatch(key):
                raise InvalidConfigurationError(
                    f"A reward cannot be registered as {key!r}: a name starts with a letter and has only "
                    f"letters, digits and the characters _ . + - in it."
                )
            owner = _registered.get(key)
            if owner is not None and _origin(owner) != _origin(reward):
                raise InvalidConfigurationError(
                    f"The reward name {key!r} already belongs to {_origin(owner)}; "
                    f"register {_origin(reward)} under another name."
                )
            _registered[key] = reward
        return reward

    return decorate


class RewardRegistry:
    """The registry as a class, for plug-ins that write ``@RewardRegistry.register("name")``.

    A name of this package may be taken over here: whoever brings a reward of that name along means their own.
    """

    @staticmethod
    def register(name: str) -> Callable[[SomeReward], SomeReward]:
        """As :func:`register`."""

        def decorate(reward: SomeReward) -> SomeReward:
            _import_our_rewards()
            owner = _registered.get(name)
            if owner is not None and _is_ours(owner) and not _is_ours(reward):
                del _registered[name]
            return register(name)(reward)

        return decorate

    @staticmethod
    def create(name: str, config: Mapping[str, Any] | None = None) -> Reward:
        """The reward of that name with these parameters."""
        return resolve({"name": name, "config": dict(config or {})})

    @staticmethod
    def names() -> list[str]:
        """As :func:`names`."""
        return names()


def names() -> list[str]:
    """Every registered name, aliases included, sorted."""
    _import_our_rewards()
    return sorted(_registered)


def registered(name: str) -> Reward | None:
    """What is registered under ``name``, as it was registered: a function or a class; None for nothing."""
    _import_our_rewards()
    return _registered.get(name)


def aliases_of(reward: Reward) -> list[str]:
    """All names of one reward, in the order in which they were given."""
    return [name for name, owner in _registered.items() if owner is reward]


def resolve(spec: object) -> Reward:
    """Turn a callable, a registered name, ``"module:function"``, ``"file.py:function"``, or a mapping of ``name``
    (one of those strings) and ``config`` (its parameters) into the callable.

    A class is instantiated, without arguments where no config is given; its instances must be callable, or have
    ``compute(context)``.
    """
    config: Mapping[str, Any] = {}
    if isinstance(spec, Mapping):
        spec, config = entry_of(spec)
    if not isinstance(spec, str):
        return as_reward(made(spec, repr(spec), config), repr(spec))
    reward = as_reward(made(_found(spec), spec, config), spec)
    prepare = getattr(reward, "prepare", None)
    if callable(prepare):
        prepare()  # what it needs and does not find is said now
    return reward


def entry_of(entry: Mapping[Any, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name and the parameters of an entry ``{"name": …, "weight": …, "config": {…}}``.

    Raises:
        InvalidConfigurationError: for a key that entries do not have, or a config that is no mapping.
    """
    unknown = sorted(map(str, set(entry) - {"name", "weight", "config"}))
    if unknown or not isinstance(entry.get("name"), str):
        raise InvalidConfigurationError(
            f"The reward {dict(entry)!r} "
            + (f"has the unknown key {unknown[0]!r}" if unknown else "has no name")
            + '; an entry is {"name": …, "weight": …, "config": {…}}, of which only the name is needed.'
        )
    config = entry.get("config") or {}
    if not isinstance(config, Mapping):
        raise InvalidConfigurationError(
            f"The config of the reward {entry['name']!r} is {config!r}; a mapping of its parameters is expected."
        )
    return entry["name"], config


def _found(spec: str) -> object:
    """What a string names: registered, in a module or in a file."""
    _import_our_rewards()
    if spec in _registered:
        return _registered[spec]
    source, colon, attribute = spec.strip().rpartition(":")
    if colon and source and attribute:
        module = _load_file(source) if source.endswith(".py") else _load_module(source, spec)
        return _attribute(module, attribute, spec)
    if spec.endswith(".py"):
        functions = ", ".join(_functions(_load_file(spec))) or "none"
        raise InvalidConfigurationError(
            f"The reward {spec!r} is a file; say which function of it, as in {spec}:NAME "
            f"(it defines: {functions})."
        )
    raise InvalidConfigurationError(
        f"There is no reward named {spec!r}; {nearest(spec, names())}. "
        f'Your own is written "package.module:function" or "path/to/file.py:function".'
    )


def _load_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise InvalidConfigurationError(
            f"The reward {spec!r} needs the module {name!r}, which cannot be imported "
            f"({type(error).__name__}: {error}); a file is written as path/to/file.py:function."
        ) from error


def _load_file(name: str) -> ModuleType:
    try:
        path = Path(name).expanduser().resolve()
        found = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, no path at all, the home of nobody
        raise InvalidConfigurationError(
            f"The reward file {name!r:.200} cannot be looked for ({error})."
        ) from error
    if not found:
        raise InvalidConfigurationError(f"The reward file {name!r} does not exist (looked for {path}).")
    # One file is one module, however often and under whichever spelling it is named. The hash keeps two
    # files called rewards.py apart; the entry in sys.modules lets dataclasses and pickle find their module.
    module_name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InvalidConfigurationError(f"The reward file {path} cannot be loaded as Python.")
    # At the end, so that a helper beside the file is found but nothing installed is hidden by it.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    if older_imports.PACKAGE in path.read_text(encoding="utf-8", errors="replace"):
        older_imports.install()
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # exit() in a script must not look like the end of a run
        del sys.modules[module_name]
        raise InvalidConfigurationError(
            f"The reward file {path} does not run ({type(error).__name__}: {error}); "
            f"try it alone with: python {path}"
        ) from error
    return module


def _attribute(module: ModuleType, dotted: str, spec: str) -> object:
    found: object = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            raise InvalidConfigurationError(
                f"The reward {spec!r} does not exist: {getattr(found, '__name__', module.__name__)} "
                f"has no {part!r}; {nearest(part, _functions(module))}."
            )
        found = getattr(found, part)
    return found


def _functions(module: ModuleType) -> list[str]:
    return sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))


def _is_ours(reward: Reward) -> bool:
    return str(getattr(reward, "__module__", "")).startswith(f"{rewards.__name__}.")


def _origin(reward: Reward) -> str:
    """Where a reward was written. A notebook cell that runs again registers the same origin: no clash."""
    return f"{reward.__module__}.{getattr(reward, '__qualname__', type(reward).__qualname__)}"


@functools.cache
def _import_our_rewards() -> None:
    for module in pkgutil.iter_modules(rewards.__path__):
        importlib.import_module(f"{rewards.__name__}.{module.name}")
