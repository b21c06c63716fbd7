"""Options made from a declaration: every field of a config class is a flag, grouped, with meaning and default.

A flag's value stays text until ``config.loader`` checks it as it checks files, so that a wrong one gets the same
sentence wherever it stands. Flags and ``--set`` are applied in the order in which they are written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Collection
from typing import Any

from command_line.parsing import Parser, one_of
from config.declaration import Declaration
from config.loader import Loaded, load_config
from config.older.names import Flag
from config.older.systems import find_system
from config.options import Option, sections_of
from config.ppo_config import PPOConfig

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


# Options -------------------------------------------------------------------------------------------------


class _Value(argparse.Action):
    """Appends (field, text) to ``options.overrides``, behind what was given before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        add_override(namespace, self.dest, values)


class _Switch(argparse.Action):
    """``--x`` and ``--no-x`` of a field that is true or false."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        add_override(namespace, self.dest, option_string not in self.option_strings[1:])


class _Assignment(argparse.Action):
    """``--set NAME=VALUE``, in the order of the flags around it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        name, equals, value = values.partition("=")
        if not equals or not name.strip():
            raise argparse.ArgumentError(self, f"NAME=VALUE is expected, found {values!r}")
        add_override(namespace, name.strip(), value)


def add_override(namespace: argparse.Namespace, field: str, value: Any) -> None:
    """One more (field, value) of the command line; the last of a field counts."""
    namespace.overrides = [*getattr(namespace, "overrides", []), (field, value)]


def add_source_options(parser: Parser) -> None:
    """Where a config comes from: preset, files, single settings."""
    sources = parser.add_argument_group(
        "configuration", "defaults < preset < files, left to right < MLX_PPO_… < options of the command line"
    )
    sources.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="TOML, YAML or JSON; sections are headings, later files win",
    )
    sources.add_argument("--preset", metavar="NAME", help="a file of config/presets to start from")
    sources.add_argument(
        "--set",
        action=_Assignment,
        default=argparse.SUPPRESS,
        metavar="NAME=VALUE",
        help="one setting, by any of the names a file may use; repeatable",
    )
    sources.add_argument(
        "--strict",
        action="store_true",
        help="refuse settings of other systems that would train something else than they do there",
    )
    sources.add_argument(
        "--from",
        dest="from_system",
        metavar="SYSTEM",
        help="the flags of an older system follow, with their meaning and defaults there (docs/command_line.md)",
    )
    parser.set_defaults(overrides=[])


def _adopt(parser: Parser, name: str, cls: type[Declaration]) -> None:
    """Add an older system's flags; where one is spelled like one of ours, it means what it means there."""
    system = find_system(name, cls.__name__)
    group = parser.add_argument_group(f"flags of {system.title}", conflict_handler="resolve")
    flags = list(system.flags)
    if system.name == "mlx-rlhf":  # the folder of one in ppo_training.py, a switch to train one in sft.py
        trains_one = cls is not PPOConfig
        meaning = "train a reward model" if trains_one else "folder of a reward model"
        flags.append(Flag("reward_model", trains_one, meaning))
    for flag in flags:
        dashes = "--" if len(flag.name) > 1 else "-"
        options = [dashes + flag.name.replace("_", "-")]
        kind: dict[str, Any] = {"action": _Value, "metavar": "VALUE"}
        if flag.is_switch:
            options.append("--no-" + options[0].lstrip("-"))
            kind = {"action": _Switch, "nargs": 0}
        _add_theirs(group, options, flag.name, flag.meaning, kind)
    listed = {flag.name.replace("-", "_") for flag in flags}
    for name in system.settings:  # of which it may have no list of flags: a value, or none for true
        ours = parser.option("--" + name.replace("_", "-"))
        if name.replace("-", "_") not in listed and (ours is None or isinstance(ours, (_Value, _Switch))):
            kind = {"action": _Value, "nargs": "?", "const": True, "metavar": "VALUE"}
            _add_theirs(group, ["--" + name.replace("_", "-")], name, f"as in {system.title}", kind)


def _add_theirs(group: Any, options: list[str], name: str, meaning: str, kind: dict[str, Any]) -> None:
    text = meaning.replace("%", "%%")
    group.add_argument(*options, dest=name.replace("-", "_"), default=argparse.SUPPRESS, help=text, **kind)


def add_run_options(parser: Parser) -> None:
    """What every command that trains takes besides its config."""
    run = parser.add_argument_group("run")
    run.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    run.add_argument("--explain", action="store_true", help="print every setting and where it came from")
    add_log_level(run)


def add_log_level(parser: Any) -> None:
    """How much is printed, ours and the libraries'."""
    parser.add_argument(
        "--log-level",
        type=lambda text: one_of(LOG_LEVELS)(text.upper()),
        default="INFO",
        metavar="LEVEL",
        help="DEBUG, INFO, WARNING (no plan, no progress) or ERROR (default INFO)",
    )


def add_config_options(parser: Parser, cls: type[Declaration], leave_out: Collection[str] = ()) -> None:
    """Configuration sources, then a flag for each field of ``cls`` under the heading of its section."""
    add_source_options(parser)
    parser.adopt = lambda parser, system: _adopt(parser, system, cls)
    for section, fields in sections_of(cls).items():
        group = parser.add_argument_group(section)
        for field in fields:
            if field.name not in leave_out:
                _add_field(group, field)


def _add_field(group: Any, field: Option) -> None:
    names = ["--" + field.name.replace("_", "-")]
    kind: dict[str, Any] = {"action": _Value, "metavar": _metavar(field)}
    if field.is_switch:
        names.append("--no-" + names[0][2:])
        kind = {"action": _Switch, "nargs": 0}
    if field.name == "resume":  # alone it is the newest in output_dir
        kind |= {"nargs": "?", "const": "latest", "metavar": "PATH"}
    group.add_argument(*names, dest=field.name, default=argparse.SUPPRESS, help=_help(field), **kind)


def _metavar(field: Option) -> str:
    """What a value looks like: its choices, or N, X, TEXT, A,B,… or JSON."""
    if field.choices:
        return "|".join(str(choice) for choice in field.choices)
    return {int: "N", float: "X", str: "TEXT", list: "A,B,…"}.get(field.base, "JSON")


def _help(field: Option) -> str:
    parts = [] if field.default is None or field.is_nested else [f"default {field.shown(field.default)}"]
    parts += [field.limits] if field.limits else []
    return (field.meaning + (f" ({'; '.join(parts)})" if parts else "")).replace("%", "%%")


# Loading -------------------------------------------------------------------------------------------------


def load(cls: type[Any], options: argparse.Namespace) -> Loaded:
    """The config that files, environment and flags make; what the loader has to say is printed.

    Raises:
        InvalidConfigurationError: one sentence, naming file and line or the option.
    """
    level = getattr(logging, getattr(options, "log_level", "INFO"))
    if level == logging.DEBUG:
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if level >= logging.WARNING:
        add_override(options, "verbose", False)
    loaded: Loaded = load_config(
        cls,
        preset=options.preset,
        files=options.config,
        overrides=options.overrides,
        older=options.from_system,
        strict=options.strict,
    )
    for note in loaded.notes:
        loud = note.startswith("WARNING")
        if loud or level < logging.WARNING:
            print(note if loud else f"note: {note}", file=sys.stderr)
    return loaded
