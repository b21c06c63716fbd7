"""Config classes: ranges, types and defaults are checked when one is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from config.errors import InvalidConfigurationError, ToolkitError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import PreferenceConfig, ProcessRewardConfig, RewardModelConfig, SFTConfig
from config.training_config import TrainingConfig
from ppo_trainer.algorithms import find_algorithm
from ppo_trainer.resolution import resolve_config

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
CONFIG_CLASSES = (
    ModelConfig,
    TrainingConfig,
    PPOConfig,
    SFTConfig,
    RewardModelConfig,
    ProcessRewardConfig,
    PreferenceConfig,
)


@pytest.mark.parametrize("cls", CONFIG_CLASSES)
def test_a_config_is_frozen_compared_by_value_and_made_by_keyword(cls: type) -> None:
    config = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        cls("positional")
    assert config == cls()


@pytest.mark.parametrize("cls", CONFIG_CLASSES)
def test_every_field_has_one_line_of_documentation_and_every_default_is_valid(cls: type) -> None:
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        assert info.description, name
        assert "\n" not in info.description, name
    values = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
    assert cls(**values) == cls()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: PPOConfig(learning_rat=1),
            r'PPOConfig has no field "learning_rat"; did you mean "learning_rate"',
        ),
        (lambda: PPOConfig(zzz=1), r'PPOConfig has no field "zzz"$'),
        (
            lambda: PPOConfig(batch_size=True),
            r"batch_size: true/false where a number is expected \(found True\)",
        ),
        (lambda: PPOConfig(lora_layers=False), "lora_layers: true/false where a number is expected"),
        (lambda: PPOConfig(kl_coef=True), "kl_coef: true/false where a number is expected"),
        (lambda: PPOConfig(batch_size=0), r"batch_size: .*greater than 0 \(found 0\)"),
        (lambda: PPOConfig(batch_size=1.5), r"batch_size: .*\(found 1.5\)"),
        (lambda: PPOConfig(learning_rate=float("nan")), r"learning_rate: .*\(found nan\)"),
        (lambda: PPOConfig(learning_rate=float("inf")), r"learning_rate: .*\(found inf\)"),
        (lambda: PPOConfig(gamma=1.01), r"gamma: .*less than or equal to 1 \(found 1.01\)"),
        (lambda: PPOConfig(adam_beta1=1), r"adam_beta1: .*less than 1 \(found 1\)"),
        (lambda: PPOConfig(lora_layers=0), r"lora_layers: .*\(found 0\)"),
        (lambda: PPOConfig(seed=2**64), r"seed: .*\(found 18446744073709551616\)"),
        (lambda: PPOConfig(temperature=0), r"temperature: .*\(found 0\)"),
        (lambda: PPOConfig(top_p=0), r"top_p: .*\(found 0\)"),
        (
            lambda: PPOConfig(value_network="both"),
            r"value_network: .*'separate' or 'shared' \(found 'both'\)",
        ),
        (lambda: PPOConfig(model_name=None), r"model_name: .*\(found None\)"),
        (lambda: PPOConfig(batch_size=0, gamma=2), r"batch_size: .*; gamma: "),
        (lambda: PPOConfig(top_p=0.9), "top_p = 0.9: .*allow_truncated_sampling"),
        (lambda: PPOConfig(top_k=5, min_p=0.1), "top_k = 5 and min_p = 0.1: "),
        (
            lambda: ModelConfig(hidden_size=30, num_attention_heads=4),
            r"hidden_size \(30\) must be a multiple",
        ),
        (lambda: ModelConfig(num_key_value_heads=5), r"num_attention_heads \(12\) must be a multiple"),
        (lambda: ModelConfig(hidden_size=12, num_attention_heads=4), "rotary positions need it even"),
        (lambda: RewardModelConfig(list_size=1), r"list_size: .*2 \(found 1\)"),
    ],
)
def test_a_mistake_comes_back_as_one_sentence_that_names_field_and_value(
    make: Callable[[], Any], sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence) as caught:
        make()
    assert isinstance(caught.value, ToolkitError)
    assert "\n" not in str(caught.value)


def test_truncated_sampling_is_possible_for_who_asks_for_it() -> None:
    assert PPOConfig(top_p=0.9, allow_truncated_sampling=True).top_p == 0.9


def test_replace_changes_what_it_is_told_checks_it_and_leaves_the_original() -> None:
    config = PPOConfig(batch_size=3, group_size=2)
    changed = config.replace(batch_size=5, seed=1)
    assert (changed.batch_size, changed.group_size, changed.seed) == (5, 2, 1)
    assert (config.batch_size, config.seed) == (3, 0)
    assert type(changed) is PPOConfig
    with pytest.raises(InvalidConfigurationError, match='did you mean "batch_size"'):
        config.replace(batchsize=1)
    with pytest.raises(InvalidConfigurationError, match="batch_size"):
        config.replace(batch_size=0)


def test_what_was_set_on_purpose_stays_so_through_replace_and_defaults() -> None:
    """kl_coef is set, batch_size replaced, group_size filled in: later defaults move only the last."""
    config = PPOConfig(kl_coef=0.1).with_defaults({"group_size": 4, "kl_coef": 9.0}).replace(batch_size=7)
    assert (config.kl_coef, config.batch_size, config.group_size) == (0.1, 7, 4)
    later = config.with_defaults({"kl_coef": 5.0, "batch_size": 6, "group_size": 2})
    assert (later.kl_coef, later.batch_size, later.group_size) == (0.1, 7, 2)


def test_with_defaults_checks_names_and_values() -> None:
    with pytest.raises(InvalidConfigurationError, match='did you mean "group_size"'):
        PPOConfig().with_defaults({"group_sizes": 4})
    with pytest.raises(InvalidConfigurationError, match="gamma"):
        PPOConfig().with_defaults({"gamma": 4})


def test_as_dict_is_plain_and_makes_the_same_config_again() -> None:
    config = PPOConfig(embedded_model=SMALLEST, reward_weights=[1.0, 2.0], kl_coef=0.3)
    plain = config.as_dict()
    assert plain["embedded_model"]["hidden_size"] == 32
    assert PPOConfig(**plain) == config


def test_no_two_sections_share_a_field_name() -> None:
    """A config file's sections are headings only, so the model's fields must not repeat the trainer's."""
    trainers = {f.name for cls in CONFIG_CLASSES[1:] for f in dataclasses.fields(cls)}
    assert not trainers & {f.name for f in dataclasses.fields(ModelConfig)}


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match="value_warmup_steps: a head on the policy's trunk"):
        resolve_config(PPOConfig(value_network="shared", value_warmup_steps=2), find_algorithm("ppo"))
    with pytest.raises(InvalidConfigurationError, match=r"kl_target: .* 0 stays 0"):
        resolve_config(PPOConfig(kl_target=6.0, kl_coef=0.0), find_algorithm("ppo"))


def test_defaults_of_several_sources_add_up_and_never_beat_what_was_set() -> None:
    config = (
        PPOConfig(gamma=0.5).with_defaults({"group_size": 3, "gamma": 0.1}).with_defaults({"kl_coef": 0.5})
    )
    assert (config.gamma, config.group_size, config.kl_coef) == (0.5, 3, 0.5)
    assert resolve_config(config, find_algorithm("grpo")).group_size == 8  # a later source wins
    assert resolve_config(config.replace(group_size=3), find_algorithm("grpo")).group_size == 3
