"""Whole steps of reinforcement learning with every kind of adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from base_setup.parameters import named_arrays
from config.ppo_config import PPOConfig
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, load_language_model
from ppo_trainer.ppo_trainer import PPOTrainer

PROMPTS = ["ab", "abcdef", "x"]
KINDS: dict[str, dict[str, Any]] = {
    "soft prompt": {"fine_tune_type": "soft_prompt", "soft_prompt_text": "Say:"},
    "soft prompt and lora": {"soft_prompt_tokens": 3},
    "dora": {"fine_tune_type": "dora"},
    "whole modules": {"modules_to_save": ["norm"]},
    "quantised and grown": {"quantize_base": 4, "quantize_group_size": 32, "new_special_tokens": ["<a>"]},
}


def letters(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_measures_nothing_and_the_result_comes_back(
    make_config: Callable[..., Any], tmp_path: Path, kind: str, algorithm: str
) -> None:
    config = make_config(
        PPOConfig,
        algorithm=algorithm,
        kl_coef=0.1,
        batch_size=3,
        group_size=4,
        max_new_tokens=6,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        output_dir=str(tmp_path / "run"),
        verbose=False,
        **KINDS[kind],
    )
    trainer = PPOTrainer(config, reward_model=letters)
    assert trainer.policy.begins_as_base == (kind == "quantised and grown")
    before = {k: np.array(x) for k, x in named_arrays(trainer.policy.model.trainable_parameters()).items()}
    epochs = trainer.train(PROMPTS, num_epochs=2)["history"]
    assert epochs[0]["objective/kl"] == pytest.approx(0, abs=1e-9)
    assert epochs[1]["objective/kl"] != 0
    assert epochs[0]["sampling/sampling_logp_difference/max"] < 1e-4
    after = named_arrays(trainer.policy.model.trainable_parameters())
    assert after.keys() == before.keys()
    assert all(np.any(np.array(after[name]) != x) for name, x in before.items())
    final = tmp_path / "run" / "final"
    again_config = make_config(model_name=str(final / "base"), adapter_path=str(final))
    again = PolicyModel(load_language_model(again_config), again_config)
    ids = mx.array([[72, 101, 108]])
    assert np.array_equal(np.array(again.forward(ids).logits), np.array(trainer.policy.forward(ids).logits))


def test_the_reference_without_any_is_the_base_to_the_last_bit(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    config = make_config(
        PPOConfig, algorithm="grpo", group_size=2, reference="base", verbose=False, soft_prompt_tokens=4
    )
    trainer = PPOTrainer(config, reward_model=letters, model=tiny)
    tokens, mask = mx.array([[1, 2, 3, 4]]), mx.array([[False, True, True]])
    plain = PolicyModel(tiny, make_config()).logprobs(tokens, mask)
    assert trainer.reference is not None
    assert np.array_equal(np.array(trainer.reference.logprobs(tokens, mask)), np.array(plain))
    assert not np.array_equal(np.array(trainer.policy.logprobs(tokens, mask)), np.array(plain))
