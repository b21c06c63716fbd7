"""The older systems, found by name or recognised by the names that a file has."""

from __future__ import annotations

from collections.abc import Collection

from config.declaration import nearest
from config.errors import InvalidConfigurationError
from config.older import mlx_grpo, mlx_grpo_gsm8k, mlx_rl_trainer, mlx_rlhf
from config.older.names import Flag, System
from config.older.trl import MLX_LM, TRL
from config.older.trl_preference import TRL_PREFERENCE

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        mlx_rl_trainer.SYSTEM,
        mlx_grpo.SYSTEM,
        mlx_grpo_gsm8k.SYSTEM,
        mlx_rlhf.SYSTEM,
        TRL,
        TRL_PREFERENCE,
        MLX_LM,
    )
}


def find_system(name: str, stage: str | None = None) -> System:
    """The system of this name (- and _ are the same), as it is where a config of the class ``stage`` is read."""
    wanted = name.strip().lower().replace("_", "-")
    if wanted not in SYSTEMS:
        raise InvalidConfigurationError(
            f'from: there is no system "{name}"{nearest(wanted, SYSTEMS)} (there are: {", ".join(SYSTEMS)})'
        )
    system = SYSTEMS[wanted]
    if stage is not None and stage in system.other_stages:
        return SYSTEMS[system.other_stages[stage]]
    if stage is not None and system.stage not in (None, stage):
        raise InvalidConfigurationError(
            f'from: "{name}" has names for {system.stage} alone, and this is {stage}'
        )
    return system


def recognise(
    names: Collection[str], headings: Collection[str], ours: Collection[str], stage: str
) -> str | None:
    """The system whose file has these names and headings, read for the config class ``stage``; None for one of ours.

    A heading of theirs decides; else the system that knows most of the names that are not ours. Those have to be more
    than half as many as ours: one name of theirs in a file of ours is a slip, and must not bring their defaults.
    """
    foreign = set(names) - set(ours)
    for system in SYSTEMS.values():
        if system.headings & set(headings) and (foreign & system.settings.keys() or "mlx_grpo" in headings):
            return system.name
    here = [system for system in SYSTEMS.values() if system.stage in (None, stage)]
    known = {system.name: len(foreign & system.settings.keys()) for system in here}
    best = max(known, key=lambda name: known[name])
    return find_system(best, stage).name if 2 * known[best] > len(set(names) & set(ours)) else None


def systems_with(name: str) -> list[str]:
    """The systems that have a setting of this name."""
    return [system.name for system in SYSTEMS.values() if system.knows(name)]


def older_flags(system: str) -> dict[str, Flag]:
    """The flags of an older system's command line that are not options of ours, by name."""
    return {flag.name: flag for flag in find_system(system).flags}
