"""From what a user calls rewards to the set that a run scores with, learned models among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from config.errors import InvalidConfigurationError, ModelLoadError
from config.ppo_config import PPOConfig
from models.process_reward_model import STEP_REWARDS, ProcessRewardModel, is_process_reward_model
from models.reward_model import SETTINGS, RewardModel, read_settings
from models.sequence_classifier import SequenceClassifier, is_classifier
from models.sft_model import EMBEDDED, LanguageModel
from rewards.composition import RewardSet
from rewards.construction import named
from rewards.registry import entry_of, resolve

LEARNED = "learned:"


def build_rewards(spec: Any, config: PPOConfig, base: LanguageModel | None = None) -> RewardSet:
    """The rewards that ``spec`` names, as ``config`` has them composed and limited.

    Without ``base`` no weight is loaded: what is learned stands there by name only, checked for being there.
    """
    options: dict[str, Any] = {
        "composition": config.reward_composition,
        "timeout": config.reward_timeout,
        "on_error": config.on_reward_error,
    }
    if isinstance(spec, RewardSet):  # it has its own, unless the config says otherwise on purpose
        fields = {
            "composition": "reward_composition",
            "timeout": "reward_timeout",
            "on_error": "on_reward_error",
        }
        options = {name: options[name] for name, field in fields.items() if config.was_set(field)}
    return RewardSet.build(
        spec, config.reward_weights, resolver=lambda part: _resolved(part, base, config), **options
    )


def _resolved(part: Any, base: LanguageModel | None, config: PPOConfig) -> Any:
    """One reward; a learned one is loaded, and made to read the policy's tokens where it has the same vocabulary."""
    name: Any = part
    settings: Mapping[str, Any] = {}
    if isinstance(part, Mapping):
        name, settings = entry_of(part)
    if isinstance(name, str) and (name.startswith(LEARNED) or _is_learned(name)):
        folder = _path(name.removeprefix(LEARNED))
        _check_folder(folder)
        _check_options(folder, settings)
        part = _by_name_only(folder) if base is None else _load(folder, base, settings, config)
    if isinstance(part, RewardModel) and base is not None:
        return part.for_tokenizer(base.tokenizer)
    return resolve(part)


def _is_learned(name: str) -> bool:
    """Whether this is the path of a folder that holds a reward model."""
    return _holds_model(_path(name))


def _holds_model(folder: Path) -> bool:
    try:
        return (folder / SETTINGS).is_file() or is_classifier(folder)
    except OSError:  # too long for a path
        return False


def _path(name: str) -> Path:
    """The folder of that name; ``~`` is the home of who runs this, ``~nobody-here/x`` a folder called so."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _check_folder(folder: Path) -> None:
    if not _holds_model(folder):
        raise ModelLoadError(
            f'reward: "{LEARNED}{str(folder)[:200]}" is no folder of a reward model; expected is one that '
            f"RewardModel.save wrote ({SETTINGS}), or a checkpoint of an architecture …ForSequenceClassification "
            "(config.json)"
        )


def _check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """A learned reward has no options but ``step_reward``, where it scores steps."""
    known = ("step_reward",) if (folder / SETTINGS).is_file() and is_process_reward_model(folder) else ()
    for name, value in options.items():
        if name not in known:
            there = " (there is: step_reward)" if known else ", which has no options"
            raise InvalidConfigurationError(f'reward: "{name}" is no option of {folder}{there}; leave it out')
        if value not in STEP_REWARDS:
            raise InvalidConfigurationError(
                f"reward: step_reward of {folder} is one of {', '.join(STEP_REWARDS)}, found {value!r:.40}"
            )


def _by_name_only(folder: Path) -> Callable[..., list[float]]:
    def reward_model(completions: list[Any]) -> list[float]:
        raise ModelLoadError(f"reward: {folder} has not been loaded")

    if (folder / SETTINGS).is_file() and is_process_reward_model(folder):
        return named(reward_model, ProcessRewardModel.reward_name)
    return reward_model


def _has_this_base(folder: Path, base: LanguageModel, config: PPOConfig) -> bool:
    """Whether the reward model was trained on the very base that the policy has: its name, and what made it."""
    theirs = read_settings(folder).get("config")
    ours = json.loads(json.dumps(config.as_dict()))
    made_by = ["quantize_base", "quantize_group_size", "quantize_mode", "new_special_tokens"]
    if base.name == EMBEDDED or config.new_special_tokens:  # drawn with the seed
        made_by += ["embedded_model", "seed"]
    return (
        isinstance(theirs, dict)
        and theirs.get("model_name") == base.name
        and all(theirs.get(name, ours[name]) == ours[name] for name in made_by)
    )


def _load(
    folder: Path, base: LanguageModel, options: Mapping[str, Any], config: PPOConfig
) -> RewardModel | ProcessRewardModel | SequenceClassifier:
    if not (folder / SETTINGS).is_file():
        return SequenceClassifier.load(folder)
    shared = base if _has_this_base(folder, base, config) else None
    if not is_process_reward_model(folder):
        return RewardModel.load(folder, shared)
    model = ProcessRewardModel.load(folder, shared)
    model.step_reward = options.get("step_reward", model.step_reward)
    return model
