"""From presets, files, environment and command line to one checked config that knows where each value came from.

    defaults  <  preset(s)  <  file(s), left to right  <  environment MLX_PPO_…  <  command line

>>> loaded = load_config(PPOConfig, preset="grpo", files=["run.yaml"], overrides=["learning_rate=1e-5"])
>>> loaded.config.learning_rate, str(loaded.origins["learning_rate"])
(1e-05, 'command line --learning-rate')

A file may be one of ours or of an older system (``config/older``): theirs is translated, and what is done differently,
or is not there, is said in ``notes``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from config.declaration import Declaration, nearest, shown
from config.errors import InvalidConfigurationError
from config.files import read_settings
from config.older.names import Translation
from config.older.systems import SYSTEMS, find_system, recognise, systems_with
from config.options import options_of
from config.ppo_config import PPOConfig
from config.preset_files import preset_path
from config.settings import Given, Origin, default
from config.supervised_config import PreferenceConfig, ProcessRewardConfig, RewardModelConfig, SFTConfig

C = TypeVar("C", bound=Declaration)

PREFIX = "MLX_PPO_"
NOT_OPTIONS = ("MLX_PPO_BLAS",)  # read by base_setup.backend
#: Who sets the first of these means it in place of the second, where that comes from a source of lower rank.
INSTEAD_OF = (
    ("num_epochs", "num_steps"),
    ("num_steps", "num_epochs"),
    ("warmup_steps", "warmup_ratio"),
    ("warmup_ratio", "warmup_steps"),
    ("dual_clip", "delta"),
    ("delta", "dual_clip"),
    ("rewards", "reward_weights"),
    ("lora_layers", "lora_blocks"),
    ("lora_blocks", "lora_layers"),
)
STAGES: tuple[type[Declaration], ...] = (
    PPOConfig,
    SFTConfig,
    RewardModelConfig,
    ProcessRewardConfig,
    PreferenceConfig,
)


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A config, where each of its values came from, and what there is to say about it."""

    config: C
    origins: dict[str, Origin]  # of every field
    notes: list[str]

    def located(self, error: InvalidConfigurationError) -> InvalidConfigurationError:
        """The error with the places of the options that it names, where somebody set them."""
        places = _places(str(error), self.origins)
        return InvalidConfigurationError(f"{error} ({places})" if places else str(error), error.problems)

    def resolved(self, config: C) -> Loaded[C]:
        """The same for ``config``, which is this one with an algorithm's own values filled in."""
        filled = Origin("algorithm", f"algorithm {getattr(config, 'algorithm', '')}".strip())
        origins = {
            name: origin if getattr(config, name) == getattr(self.config, name) else filled
            for name, origin in self.origins.items()
        }
        return Loaded(config, origins, self.notes)


def load_config(
    cls: type[C],
    *,
    preset: str | Sequence[str] | None = None,
    files: str | Path | Iterable[str | Path] = (),
    environ: Mapping[str, str] | None = None,
    overrides: Iterable[str | tuple[str, Any]] = (),
    older: str | None = None,
    strict: bool = False,
) -> Loaded[C]:
    """Read a config of class ``cls``.

    Args:
        preset: a name of ``config/presets``, several joined by commas, or a list; later ones win.
        files: TOML, YAML or JSON; later ones win.
        environ: where ``MLX_PPO_LEARNING_RATE`` and the like are looked up, and the variable in which an older system
            names its file; None = the process's own environment.
        overrides: ``"name=value"``, or pairs of a name and a value (text is read as the option's type). Names may
            have - or _.
        older: the system whose names files and overrides have (``config.older.names.find_system``); None = files
            are recognised by their names.
        strict: refuse a setting of an older system that changes what is trained and that is not there.
    Raises:
        InvalidConfigurationError: one sentence with file and line, or variable, or flag; the name; what was found.
    """
    system = find_system(older, cls.__name__).name if older is not None else None
    environ = os.environ if environ is None else environ
    files = [files] if isinstance(files, (str, Path)) else list(files)
    given, notes = list[Given](), list[str]()
    variable = SYSTEMS[system].file_variable if system is not None else None
    if variable is not None and not files and environ.get(variable):
        files = [environ[variable]]
        notes.append(f"environment {variable}: no other file is named, so {environ[variable]} is read")
    for name in _preset_names(preset):
        given += _from_file(cls, preset_path(name), len(given) + 1, None, f"preset {name.strip()}")
    for file in files:
        try:
            given += _from_file(cls, Path(file), len(given) + 1, system)
        except InvalidConfigurationError as error:
            if not notes:
                raise
            raise InvalidConfigurationError(f"environment {variable}: {error}") from None
    given += _from_environment(environ, len(given) + 1)
    given += _from_overrides(overrides, len(given) + 1, system)

    ours, said = _translated(cls, given, strict, system)
    notes += said
    chosen = _chosen(cls, ours, notes)
    origins = {name: default() for name in options_of(cls)} | {n: one.origin for n, one in chosen.items()}
    return Loaded(_built(cls, chosen, origins), origins, notes)


# Sources -------------------------------------------------------------------------------------------------


def _preset_names(preset: str | Sequence[str] | None) -> list[str]:
    names = [preset] if isinstance(preset, str) else list(preset or ())
    return [part for name in names for part in name.split(",") if part.strip()]


def _from_file(
    cls: type[Declaration], path: Path, rank: int, system: str | None, preset: str | None = None
) -> list[Given]:
    nested = {
        name for stage in (cls, *STAGES) for name, option in options_of(stage).items() if option.is_nested
    }
    nested |= {name for known in SYSTEMS.values() for name in known.tables}
    settings = read_settings(path, lambda name: _plain(name) in nested)
    if system is None and preset is None:
        names = {_plain(one.name) for one in settings}
        headings = {_plain(heading) for one in settings for heading in one.headings}
        system = recognise(names, headings, _every_name(cls), cls.__name__)
    found: dict[str, Given] = {}
    for one in settings:
        place = str(path) if one.line is None else f"{path}:{one.line}"
        origin = Origin("preset", preset) if preset else Origin("file", place)
        name = _plain(one.name)
        if name in found:
            raise InvalidConfigurationError(
                f'{place}: "{name}" is given twice (first at {found[name].place}); headings only order a file, so keep '
                "one"
            )
        found[name] = Given(name, one.value, origin, rank, place, system=system)
    return list(found.values())


def _from_environment(environ: Mapping[str, str], rank: int) -> list[Given]:
    given = []
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and variable not in NOT_OPTIONS:
            origin = Origin("environment", f"environment {variable}")
            given.append(
                Given(_plain(variable[len(PREFIX) :]), text, origin, rank, str(origin), is_text=True)
            )
    return given


def _from_overrides(overrides: Iterable[str | tuple[str, Any]], rank: int, system: str | None) -> list[Given]:
    given = []
    for position, one in enumerate(overrides):
        if isinstance(one, str):
            name, equals, value = one.partition("=")
            if not equals or not name.strip():
                raise InvalidConfigurationError(
                    f"command line: {shown(one)} is no setting; name=value is expected, such as learning_rate=1e-5"
                )
            name, value = name.strip(), value.strip()
        else:
            name, value = one
        flag = f"command line --{name.lstrip('-').replace('_', '-')}"
        # Of two equal flags the later one counts, as everywhere on a command line.
        given.append(
            Given(
                _plain(name.lstrip("-")),
                value,
                Origin("command line", flag),
                rank + position,
                flag,
                is_text=isinstance(value, str),
                system=system,
            )
        )
    return given


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


# Names to fields -----------------------------------------------------------------------------------------


def _every_name(cls: type[Declaration]) -> set[str]:
    return {name for stage in (cls, *STAGES) for name in options_of(stage)}


def _translated(
    cls: type[Declaration], given: Sequence[Given], strict: bool, asked_for: str | None
) -> tuple[list[Given], list[str]]:
    """Settings under our names alone, and what there is to say about those that were not.

    ``asked_for``: the system whose defaults hold even where nothing of it is given.
    """
    theirs: dict[str, dict[str, Given]] = {}
    ours, notes, loud = [], list[str](), list[str]()
    for one in sorted(given, key=lambda one: one.rank):
        if one.system is not None and SYSTEMS[one.system].knows(one.name):
            theirs.setdefault(one.system, {})[one.name] = one
        else:
            ours.append(one)
    # A system's own defaults stand below everything, its file's or flags' presence being what asks for them.
    names = dict.fromkeys([asked_for, *(one.system for one in given)])
    for system in (SYSTEMS[name] for name in names if name is not None):
        groups = issubclass(cls, PPOConfig)
        result: Translation = system.translate(theirs.get(system.name, {}), has_groups=groups)
        ours += result.settings
        if system.preset is not None and issubclass(cls, PPOConfig):
            below = f"{system.title}'s default (preset {system.preset})"
            ours += _from_file(cls, preset_path(system.preset), 0, None, below)
            notes.append(
                f"{system.title}: its names are translated, and what is not given takes its own defaults (preset "
                f"{system.preset})"
            )
        else:
            notes.append(f"{system.title}: its names are translated")
        notes += result.notes
        loud += result.loud
    if strict and loud:
        raise InvalidConfigurationError("; ".join(loud))
    return ours, [*(f"WARNING: {sentence}" for sentence in loud), *notes]


def _chosen(cls: type[Declaration], given: Sequence[Given], notes: list[str]) -> dict[str, Given]:
    """For each field of ``cls`` the setting that wins."""
    options, elsewhere = options_of(cls), _every_name(cls)
    chosen: dict[str, Given] = {}
    for one in sorted(given, key=lambda one: one.rank):
        if one.name not in options:
            if one.name not in elsewhere:
                raise InvalidConfigurationError(_unknown(cls, one))
            if one.origin.kind == "command line" and one.system is None:
                raise InvalidConfigurationError(
                    f"{one.place}: {cls.__name__} has no {one.name}; leave it out"
                )
            if one.origin.kind in ("file", "command line"):
                notes.append(f"{one.place}: {one.name} is of another stage; {cls.__name__} has no use for it")
            continue
        before = chosen.get(one.name)
        if before is not None and before.rank == one.rank and one.origin.kind == "file":
            raise InvalidConfigurationError(
                f"{one.place}: this sets {one.name}, which {before.place} sets too; keep one of them"
            )
        chosen[one.name] = one
    ranks = {name: one.rank for name, one in chosen.items()}
    for name, other in INSTEAD_OF:
        if name in ranks and ranks[name] > ranks.get(other, ranks[name]):
            del chosen[other]
    data, file = chosen.get("dataset_name"), chosen.get("train_path")
    if data and file and data.rank > file.rank and file.origin.kind != "command line":
        del chosen["train_path"]  # which would be trained on; of one command line the local file is
    return chosen


def _unknown(cls: type[Declaration], one: Given) -> str:
    valid = [*options_of(cls), *(SYSTEMS[one.system].settings if one.system is not None else ())]
    hint = nearest(one.name, valid)
    if one.system is None and (known := systems_with(one.name)):
        hint += f"; a name of {', '.join(known)} (--from says that a file or a flag has such names)"
    hint = hint or "; docs/configuration.md has them all"
    return f'{one.place}: {cls.__name__} has no field "{one.name}"{hint} (found {shown(one.value)})'


# Checking ------------------------------------------------------------------------------------------------


def _built(cls: type[C], chosen: Mapping[str, Given], origins: Mapping[str, Origin]) -> C:
    options = options_of(cls)
    values = {
        name: options[name].from_text(one.value) if one.is_text else options[name].from_file(one.value)
        for name, one in chosen.items()
    }
    try:
        return cls(**values)
    except InvalidConfigurationError as error:
        sentences = []
        for field, sentence in error.problems:
            places = _places(sentence, origins)
            if field in chosen:
                sentences.append(f"{chosen[field].place}: {sentence}")
            else:
                sentences.append(f"{sentence} ({places})" if places else sentence)
        raise InvalidConfigurationError("; ".join(sentences) or str(error), error.problems) from None


def _places(sentence: str, origins: Mapping[str, Origin]) -> str:
    """Where the options that a sentence names were set, as far as somebody set them."""
    named = dict.fromkeys(re.findall(r"\w+", sentence))
    return ", ".join(
        f"{name}: {origins[name]}" for name in named if name in origins and origins[name].kind != "default"
    )
