"""How long a run is and what judges it, where its config says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.conftest import TINY

PROMPTS = ["a", "b", "c", "d", "e"]


def trainer_of(tmp_path: Path, **options: Any) -> PPOTrainer:
    config = PPOConfig(
        model_name="embedded",
        embedded_model=TINY,
        algorithm="reinforce",
        batch_size=2,
        max_new_tokens=3,
        output_dir=str(tmp_path / "run"),
        verbose=False,
        **options,
    )
    return PPOTrainer(config)


@pytest.mark.parametrize(
    ("options", "argument", "steps", "epochs"),
    [
        ({"num_epochs": 2}, None, 6, 2),  # 3 batches in an epoch of 5 prompts
        ({"num_steps": 4}, None, 4, 2),  # the second epoch ends after one
        ({"num_steps": 2, "num_epochs": 9}, None, 2, 1),
        ({"num_steps": 3}, None, 3, 1),
        ({"num_steps": 4, "num_epochs": 5}, 1, 3, 1),  # whoever calls decides
    ],
)
def test_steps_and_epochs(
    tmp_path: Path, options: dict[str, int], argument: int | None, steps: int, epochs: int
) -> None:
    trainer = trainer_of(tmp_path, **options)
    result = trainer.train(PROMPTS, argument)
    assert trainer.step == steps
    assert len(result["history"]) == epochs


def test_a_second_call_makes_as_many_steps_again(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, num_steps=2)
    trainer.train(PROMPTS)
    trainer.train(PROMPTS)
    assert trainer.step == 4


def test_the_schedule_is_as_long_as_the_run(tmp_path: Path) -> None:
    """From 4 down to 0 in 4 steps, of which the last is made at 1."""
    trainer = trainer_of(tmp_path, num_steps=4, learning_rate=4e-6, lr_schedule="linear")
    rates: list[float] = []

    class Seen:
        def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
            rates.append(metrics["lr"])

    trainer.train(PROMPTS, callbacks=[Seen()])
    assert rates == pytest.approx([4e-6, 3e-6, 2e-6, 1e-6], rel=1e-5)


def test_rewards_of_the_config_judge_unless_others_are_given(tmp_path: Path) -> None:
    entries = ["well_formed", {"name": "sequential_digits", "weight": 0.25}]
    assert trainer_of(tmp_path / "a", rewards=entries).rewards.names == ["well_formed", "sequential_digits"]
    assert trainer_of(tmp_path / "a2", rewards=entries).rewards.weights == [1.0, 0.25]
    config = PPOConfig(model_name="embedded", embedded_model=TINY, rewards=entries)
    assert PPOTrainer(config, reward_model="sequential_digits").rewards.names == ["sequential_digits"]
    with pytest.raises(InvalidConfigurationError, match="well_formd"):
        trainer_of(tmp_path / "b", rewards=["well_formd"])
