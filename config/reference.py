"""``docs/configuration.md``, written from the declarations: ``python -m config.reference > docs/configuration.md``."""

from __future__ import annotations

from config.declaration import Declaration
from config.decoding_config import DecodingConfig
from config.model_config import ModelConfig
from config.older.names import Renamed
from config.older.systems import SYSTEMS
from config.options import Option, options_of, sections_of
from config.ppo_config import PPOConfig
from config.preset_files import preset_header, preset_names
from config.supervised_config import PreferenceConfig, ProcessRewardConfig, RewardModelConfig, SFTConfig

HEAD = """# Configuration

Written by `./run python -m config.reference > docs/configuration.md` from the declarations in `config/`; a test keeps
the two equal.

A run is described by one config: `PPOConfig` (PPO, GRPO and their family), `SFTConfig`,
`RewardModelConfig`, `ProcessRewardConfig` or `PreferenceConfig`. Its
values come from, each one winning over those before it:

| | |
|---|---|
| defaults | the tables below; an algorithm's own where nobody set an option |
| a preset | `--preset grpo`, or several, `--preset standard,dapo` |
| files | `--config base.toml run.yaml`, left to right; TOML, YAML or JSON |
| the environment | `MLX_PPO_LEARNING_RATE=1e-5` |
| the command line | `--learning-rate 1e-5`, `--learning_rate 1e-5`, `--set learning_rate=1e-5` |

Headings in a file are for its readers: every name is unique, so a setting means the same under any heading or none.
`none` (in TOML the text `"none"`) stands for no value. In YAML `1e-5` is a number; `yes`, `no` and `12:30` are text.
A name that does not exist, a key given twice, a value of the wrong type or out of range are refused in a sentence with
file and line. `main.py explain` prints the result: every value, where it came from, and the formula that it trains.

In Python:

```python
from config.loader import load_config
from config.ppo_config import PPOConfig

loaded = load_config(PPOConfig, preset="grpo", files=["run.yaml"], overrides=["learning_rate=1e-5"])
loaded.config                           # a PPOConfig
str(loaded.origins["learning_rate"])    # 'command line --learning-rate'
loaded.notes                            # what there is to say about it
```
"""

REWARDS = """`rewards` is a list of names, or of entries with a weight and options of the reward's own:

```toml
rewards = ["format", { name = "jaccard", weight = 0.5 }]

[[rewards]]
name = "format_structure"
weight = 0.05
config = { min_think_length = 10 }
```

are two ways to write such a list (one of them per file). On the command line: `--rewards format,jaccard`.
"""


def reference() -> str:
    """The document."""
    parts = [HEAD, "## Options of every stage, and of reinforcement learning\n"]
    for section, options in sections_of(PPOConfig).items():
        parts.append(_table(section, options))
        parts += [REWARDS] if section == "scores" else []
    shared = options_of(PPOConfig)
    for cls in (SFTConfig, RewardModelConfig, ProcessRewardConfig, PreferenceConfig):
        parts.append(
            f"## {cls.__name__}\n\n{_first_line(cls)} All of the tables above that are of `DataConfig` or "
            "`TrainingConfig`, and:\n"
        )
        own = [
            option
            for option in options_of(cls).values()
            if option.name not in shared or option.owner == cls.__name__
        ]
        parts.append(_table(None, own))
    parts.append(
        f"## DecodingConfig\n\n{_first_line(DecodingConfig)} Flags of `generate`, `chat` and `make-preferences`.\n"
    )
    parts.append(_table(None, list(options_of(DecodingConfig).values())))
    parts.append(f"## ModelConfig\n\n{_first_line(ModelConfig)} The value of `embedded_model`.\n")
    parts.append(_table(None, list(options_of(ModelConfig).values())))
    return "\n".join([*parts, _presets(), _older()]).rstrip() + "\n"


def _first_line(cls: type[Declaration]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _table(section: str | None, options: list[Option]) -> str:
    lines = [f"### {section}", ""] if section else []
    lines += ["| option | values | default | meaning | declared in |", "|---|---|---|---|---|"]
    for option in options:
        default = (
            "see `ModelConfig.tiny`"
            if option.is_nested and option.default
            else f"`{option.shown(option.default)}`"
        )
        cells = (f"`{option.name}`", option.values, default, option.meaning, f"`{option.owner}`")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _presets() -> str:
    lines = [
        "## Presets",
        "",
        "Files of `config/presets`; each says at its head what it needs and what to expect.",
        "",
    ]
    for name in preset_names():
        first = preset_header(name).splitlines()[0]
        lines.append(f"- `{name}`: {first.removeprefix(f'{name}: ')}")
    return "\n".join([*lines, ""])


def _older() -> str:
    lines = [
        "## Names of older systems",
        "",
        "A file of one of these systems is recognised by its names (`--from SYSTEM` says it, for files and flags)",
        "and translated; what is done differently or is not there is said when it is read, and with `--strict` a",
        "setting that would change what is trained is an error. What such a file does not give takes that system's",
        "own default, where it has a preset. Names that are ours too, with our meaning, are left out here.",
        "",
    ]
    for system in SYSTEMS.values():
        preset = f", defaults in the preset `{system.preset}`" if system.preset else ""
        lines += [
            f"### {system.title}",
            "",
            f"`--from {system.name}`{preset}.",
            "",
            "| theirs | ours |",
            "|---|---|",
        ]
        rows: dict[str, list[str]] = {}
        for name, meaning in system.settings.items():
            ours = f"`{meaning.ours}`" if isinstance(meaning, Renamed) else meaning.summary
            said = f"; {meaning.say}" if isinstance(meaning, Renamed) and meaning.say else ""
            rows.setdefault(ours + said, []).append(f"`{name}`")
        lines += [f"| {', '.join(names)} | {ours} |" for ours, names in rows.items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
