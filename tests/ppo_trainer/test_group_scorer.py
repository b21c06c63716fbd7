"""Scores that are worked out while others are decoded are the same scores, and learned from alike."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base_setup.parameters import named_arrays
from config.errors import InvalidConfigurationError, RewardError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from models.reward_model import RewardModel
from ppo_trainer.ppo_trainer import PPOTrainer

PROMPTS = ["one", "two", "three", "four"]


def settings(folder: Path, **options: Any) -> PPOConfig:
    small = ModelConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=1, intermediate_size=48
    )
    return PPOConfig(
        **{
            "model_name": "embedded",
            "embedded_model": small,
            "algorithm": "grpo",
            "group_size": 4,
            "batch_size": 4,
            "rollout_batch_size": 4,  # a group at a time: the first is done long before the last
            "max_new_tokens": 12,
            "output_dir": str(folder),
            "verbose": False,
            **options,
        }
    )


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def test_weights_and_scores_are_those_of_a_batch_scored_at_its_end(tmp_path: Path) -> None:
    found = []
    for early in (False, True):
        trainer = PPOTrainer(
            settings(tmp_path / str(early), score_while_decoding=early, learning_rate=1e-3),
            reward_model=vowels,
        )
        history = trainer.train(PROMPTS, num_epochs=2)
        found.append(
            (history, {k: np.array(x) for k, x in named_arrays(trainer.policy.model.parameters()).items()})
        )
    (at_end, weights), (early_on, others) = found
    assert [e["reward"] for e in at_end["history"]] == [e["reward"] for e in early_on["history"]]
    for name, array in weights.items():
        assert np.array_equal(array, others[name]), name


@pytest.mark.parametrize("early", [False, True])
def test_a_reward_is_told_the_step_that_it_scores(tmp_path: Path, early: bool) -> None:
    told: list[int] = []

    def reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        told.extend([trainer_state.global_step] * len(completions))
        return vowels([], completions)

    PPOTrainer(
        settings(tmp_path, score_while_decoding=early, batch_size=2, max_new_tokens=2), reward_model=reward
    ).train(PROMPTS, num_epochs=1)
    assert told == [1] * 8 + [2] * 8


@pytest.mark.parametrize("options", [{}, {"dynamic_sampling": True}])
def test_a_group_is_scored_before_the_last_one_is_decoded(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = PPOTrainer(
        settings(tmp_path, score_while_decoding=True, **options),
        reward_model=lambda prompts, completions, **_: seen(prompts, completions),
    )
    told: list[str] = []
    scored = threading.Event()

    def seen(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        assert len(completions) == 4
        told.append(f"scored {prompts[0]} in {threading.current_thread().name[:5]}")
        scored.set()
        return [float(len(text)) for text in completions]

    begin = trainer._group_scorer.begin  # type: ignore[union-attr]
    groups = 0

    def waiting(group: Any) -> None:
        nonlocal groups
        groups += 1
        begin(group)
        if groups == 1:  # decoding stands still here: only another thread can score now
            assert scored.wait(timeout=30)

    trainer._group_scorer.begin = waiting  # type: ignore[union-attr, method-assign]
    trainer.train(PROMPTS, num_epochs=1)
    assert groups >= 4
    assert len(told) == groups
    assert all(line.endswith("score") for line in told)


def test_what_a_reward_raises_reaches_the_caller(tmp_path: Path) -> None:
    def broken(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        raise ValueError("out of reach")

    trainer = PPOTrainer(settings(tmp_path, score_while_decoding=True), reward_model=broken)
    with pytest.raises(RewardError, match="out of reach"):
        trainer.train(PROMPTS, num_epochs=1)


def test_a_learned_reward_model_does_not_compute_beside_the_decoder(tmp_path: Path) -> None:
    config = settings(tmp_path, score_while_decoding=True)
    base = PPOTrainer(settings(tmp_path / "other"), reward_model=vowels).policy.base
    with pytest.raises(InvalidConfigurationError, match="score_while_decoding: the reward"):
        PPOTrainer(config, reward_model=RewardModel(base, config))
