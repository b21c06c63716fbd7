"""``generate-config``: a commented file that trains as it is, from the declarations."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from config.declaration import nearest, shown
from config.errors import InvalidConfigurationError
from config.options import Option, plain, sections_of
from config.ppo_config import PPOConfig

SUFFIXES = (".yaml", ".yml", ".toml")
WIDTH = 100

#: Each template's values beside the model and the data; the advanced one also shows every other option at its default.
TEMPLATES: dict[str, dict[str, Any]] = {
    "minimal": {
        "algorithm": "grpo",
        "num_steps": 200,
        "max_new_tokens": 128,
        "group_size": 4,
        "batch_size": 2,
        "prompt_overflow": "keep_end",
        "learning_rate": 1e-5,
        "seed": 0,
    },
    "standard": {
        "algorithm": "grpo",
        "num_epochs": 1,
        "max_new_tokens": 256,
        "group_size": 8,
        "temperature": 1.0,
        "batch_size": 8,
        "micro_batch_size": 8,
        "max_prompt_length": 512,
        "prompt_overflow": "keep_end",
        "fine_tune_type": "lora",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "learning_rate": 1e-5,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.05,
        "max_grad_norm": 1.0,
        "kl_coef": 0.04,
        "log_samples_every": 10,
        "seed": 0,
    },
}
TEMPLATES["advanced"] = {
    **TEMPLATES["standard"],
    "minibatch_size": 16,
    "gradient_checkpointing": True,
    "clip_epsilon": 0.2,
    "clip_epsilon_high": 0.28,
    "missing_end_penalty": 0.5,
    "weight_decay": 0.01,
}
HEADS = {
    "minimal": "The least that a run needs. Every other option has its default: docs/configuration.md.",
    "standard": "What one usually sets. Every other option has its default: docs/configuration.md.",
    "advanced": "What one usually sets, and more. Every other option stands here as a comment, at its default (or the "
    "algorithm's own, where it has one).",
}


def generate_config(
    model_path: str,
    data_path: str,
    template: str = "standard",
    *,
    val_path: str | None = None,
    rewards: list[Any] | None = None,
    suffix: str = ".yaml",
) -> str:
    """The text of a configuration file.

    Args:
        model_path: a folder, a Hugging Face name or ``embedded``.
        data_path: rows to train on.
        template: ``minimal``, ``standard`` or ``advanced``.
        val_path: rows to validate on.
        rewards: names or entries; None = answers are judged by form, and the file shows how to name others.
        suffix: the ending of its name: .yaml, .yml or .toml.
    Raises:
        InvalidConfigurationError: for a template or a suffix that there is not, or a path that is empty.
    """
    if template not in TEMPLATES:
        raise InvalidConfigurationError(
            f'template: there is no "{template}"{nearest(template, TEMPLATES)} (there are: {", ".join(TEMPLATES)})'
        )
    if suffix.lower() not in SUFFIXES:
        raise InvalidConfigurationError(
            f"output: the name ends in {suffix or 'nothing'!r}; .yaml or .toml is expected"
        )
    given = {"model_name": model_path, "train_path": data_path, "val_path": val_path, "rewards": rewards}
    values = {name: value for name, value in given.items() if value is not None} | TEMPLATES[template]
    for name in ("model_name", "train_path"):
        if not str(values[name]).strip():
            raise InvalidConfigurationError(
                f"{name}: a path or a name is expected, found {shown(values[name])}"
            )
    PPOConfig(**values)  # what is written has to be right
    write = _toml if suffix.lower() == ".toml" else _yaml
    lines = [f"# {line}" for line in textwrap.wrap(HEADS[template], WIDTH)]
    lines += [
        "# The algorithm's own values hold where nothing is said: main.py explain --config THIS FILE",
        "",
    ]
    for section, options in sections_of(PPOConfig).items():
        lines += write(section, options, values, everything=template == "advanced")
    return "\n".join(lines).rstrip() + "\n"


def _comment(option: Option, indent: str) -> list[str]:
    text = f"{option.meaning} [{option.values}]"
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _chosen(options: list[Option], values: Mapping[str, Any], everything: bool) -> list[Option]:
    # How rewards are named is worth showing wherever nobody named one.
    return [one for one in options if one.name in values or everything or one.name == "rewards"]


def _example(option: Option, equals: str, absent: str) -> str:
    """What a comment shows: the default, and for rewards how one is named."""
    default = ["well_formed"] if option.name == "rewards" else plain(option.default)
    if isinstance(default, dict):
        default = {key: value for key, value in default.items() if value is not None}
    return absent if default is None else _written(default, equals)


def _toml(section: str, options: list[Option], values: Mapping[str, Any], everything: bool) -> list[str]:
    return _section(f"[{section}]", "", " = ", options, values, everything)


def _yaml(section: str, options: list[Option], values: Mapping[str, Any], everything: bool) -> list[str]:
    return _section(f"{section}:", "  ", ": ", options, values, everything)


def _section(
    heading: str, indent: str, equals: str, options: list[Option], values: Mapping[str, Any], everything: bool
) -> list[str]:
    lines: list[str] = []
    absent = "none" if indent else '"none"'  # TOML has no word for it
    chosen = _chosen(options, values, everything)
    for option in chosen:
        lines += _comment(option, indent)
        if option.name in values:
            lines.append(f"{indent}{option.name}{equals}{_written(values[option.name], equals)}")
        else:
            lines.append(f"{indent}# {option.name}{equals}{_example(option, equals, absent)}")
    if not lines:
        return []
    # In YAML a heading without a setting would be a setting of its own.
    any_set = any(option.name in values for option in chosen)
    return [heading if any_set else f"# {heading}", *lines, ""]


def _written(value: Any, equals: str) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(key)}{equals}{_written(one, equals)}' for key, one in value.items())} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(one, equals) for one in value)}]"
    return json.dumps(value, ensure_ascii=False)  # a text of JSON is one of TOML and of YAML
