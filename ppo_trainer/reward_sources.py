"""From what a user calls rewards to the set that a run scores with, learned models among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from config.errors import InvalidConfigurationError, ModelLoadError
from config.ppo_config import PPOConfig
from models.reward_model import SETTINGS, RewardModel
from models.sequence_classifier import SequenceClassifier, is_classifier
from models.sft_model import LanguageModel
from rewards.composition import RewardSet
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
        spec, config.reward_weights, resolver=lambda part: _resolved(part, base), **options
    )


def _resolved(part: Any, base: LanguageModel | None) -> Any:
    """One reward; a learned one is loaded, and made to read the policy's tokens where it has the same vocabulary."""
    name: Any = part
    settings: Mapping[str, Any] = {}
    if isinstance(part, Mapping):
        name, settings = entry_of(part)
    if isinstance(name, str) and (name.startswith(LEARNED) or _is_learned(name)):
        if settings:
            raise InvalidConfigurationError(
                f"The reward {name!r} is a learned model, which takes no config ({', '.join(map(str, settings))}); "
                "leave that out."
            )
        folder = _path(name.removeprefix(LEARNED))
        part = _by_name_only(folder) if base is None else _load(folder, base)
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


def _by_name_only(folder: Path) -> Callable[..., list[float]]:
    if not _holds_model(folder):
        raise ModelLoadError(
            f'reward: "{LEARNED}{str(folder)[:200]}" is no folder of a reward model; expected is one that '
            f"RewardModel.save wrote ({SETTINGS}), or a checkpoint of an architecture …ForSequenceClassification "
            "(config.json)"
        )

    def reward_model(completions: list[Any]) -> list[float]:
        raise ModelLoadError(f"reward: {folder} has not been loaded")

    return reward_model


def _load(folder: Path, base: LanguageModel) -> RewardModel | SequenceClassifier:
    if (folder / SETTINGS).is_file():
        return RewardModel.load(folder, base if RewardModel.base_name(folder) == base.name else None)
    return SequenceClassifier.load(folder)
