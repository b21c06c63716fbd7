"""What a run leaves behind, and who can load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from config.errors import (
    CheckpointError,
)
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from monitoring.metrics_file import read_metrics
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    GRPO,
    KINDS,
    PPO,
    PROMPTS,
    config,
    constant,
    even_share,
    same,
    weights,
)


@KINDS
@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_a_saved_model_loaded_into_a_fresh_trainer_evaluates_the_same(
    tmp_path: Path, kind: dict[str, Any], fine_tune_type: str
) -> None:
    def fresh(name: str) -> PPOTrainer:
        options = {**kind, "fine_tune_type": fine_tune_type, "learning_rate": 2e-2}
        return PPOTrainer(config(tmp_path / name, **options), reward_model=even_share)

    trained, other = fresh("1"), fresh("2")
    trained.train(PROMPTS, num_epochs=4)
    expected = trained.evaluate(PROMPTS)
    assert other.evaluate(PROMPTS) != expected
    trained.save_model(tmp_path / "saved")
    other.load_model(tmp_path / "saved")
    assert other.evaluate(PROMPTS) == expected
    assert same(weights(other), weights(trained))
    assert expected["objective/kl"] != 0.0  # the reference is still the model before training


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_what_train_leaves_is_an_adapter_that_mlx_lm_loads(tmp_path: Path, fine_tune_type: str) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=2e-2, fine_tune_type=fine_tune_type, **PPO), reward_model=even_share
    )
    final = Path(trainer.train(PROMPTS, num_epochs=2)["run_folder"]) / "final"
    model, tokenizer = mlx_lm.load(str(final / "base"), adapter_path=str(final))[:2]
    tokens = mx.array([trainer.policy.tokenizer.encode("hello there")])
    assert tokenizer.encode("hello there") == tokens[0].tolist()
    np.testing.assert_allclose(
        np.array(model(tokens)), np.array(trainer.policy.forward(tokens).logits), atol=1e-6
    )
    plain = mlx_lm.load(str(final / "base"))[0]
    assert np.array_equal(np.array(plain(tokens)), np.array(trainer.policy.base.model(tokens)))
    assert not np.allclose(np.array(plain(tokens)), np.array(model(tokens)), atol=1e-3)


def test_a_saved_adapter_continues_as_a_new_run_with_itself_as_reference(tmp_path: Path) -> None:
    first = PPOTrainer(config(tmp_path / "1", learning_rate=2e-2, **PPO), reward_model=even_share)
    first.train(PROMPTS, num_epochs=2)
    first.save_model(tmp_path / "saved")
    second = PPOTrainer(
        config(tmp_path / "2", adapter_path=str(tmp_path / "saved"), **PPO), reward_model=even_share
    )
    assert second.evaluate(PROMPTS)["objective/kl"] == 0.0
    assert second.evaluate(PROMPTS)["samples"] == first.evaluate(PROMPTS)["samples"]


@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        ({"fine_tune_type": "full"}, {}),
        ({}, {"fine_tune_type": "full"}),
        ({"lora_r": 8}, {}),
        ({"lora_alpha": 64}, {}),  # the same arrays, but another scale: another model
        ({"embedded_model": ModelConfig.tiny()}, {}),
    ],
    ids=["full-into-lora", "lora-into-full", "rank", "alpha", "architecture"],
)
def test_a_saved_model_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, saved: dict[str, Any], mine: dict[str, Any]
) -> None:
    PPOTrainer(config(tmp_path / "1", **GRPO, **saved), reward_model=constant).save_model(tmp_path / "saved")
    trainer = PPOTrainer(config(tmp_path / "2", **GRPO, **mine), reward_model=constant)
    before = weights(trainer)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        trainer.load_model(tmp_path / "saved")
    assert same(weights(trainer), before)


def test_loading_from_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path), reward_model=constant)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        trainer.load_model(tmp_path / "nowhere")


def test_the_run_folder_says_what_was_run(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, seed=3, log_samples_every=1, **GRPO), reward_model=even_share)
    run = Path(trainer.train(PROMPTS, num_epochs=2)["run_folder"])
    assert run == tmp_path / "run"
    written = json.loads((run / "config.json").read_text())
    assert PPOConfig(**written["config"]) == trainer.config
    assert written["algorithm"] == "grpo"
    assert written["rewards"] == {"even_share": 1.0}
    assert written["config"]["num_epochs_per_rollout"] == 1  # as the row has it, not as the class declares it
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * trainer.config.max_logged_samples
    assert {s["step"] for s in samples} == {1, 2}
    kinds = [line.get("kind") for line in read_metrics(run / "metrics.jsonl")]
    assert kinds == [None, "epoch", None, "epoch", "end"]
