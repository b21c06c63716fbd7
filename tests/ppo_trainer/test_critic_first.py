"""Where one update follows, the critic learns with the forward that tells its values: the same step, cheaper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten

from config.ppo_config import PPOConfig
from ppo_trainer.algorithms import find_algorithm
from ppo_trainer.credit import Credit, Scored, from_critic
from ppo_trainer.ppo_trainer import PPOTrainer

PROMPTS = ["Once", "upon a time there was", "a"]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 / 3 for text in completions]


def trained(folder: Path, **options: Any) -> tuple[PPOTrainer, list[dict[str, float]]]:
    """A trainer after two steps, and their metrics."""
    algorithm = options.pop("algorithm", None)
    config = PPOConfig(
        **{
            "model_name": "embedded",
            "max_new_tokens": 6,
            "batch_size": 3,
            "num_epochs_per_rollout": 1,
            "learning_rate": 1e-2,
            "kl_coef": 0.05,
            "output_dir": str(folder),
            "verbose": False,
            **options,
        }
    )
    trainer = PPOTrainer(config, reward_model=reward, algorithm=algorithm)
    steps: list[dict[str, float]] = []

    class Keep:
        def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
            steps.append(metrics)

    trainer.train(PROMPTS, num_epochs=2, callbacks=[Keep()])
    return trainer, steps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batch_size": 2},
        {"whiten_rewards": True, "lam": 0.7, "gamma": 0.9},
        {"fine_tune_type": "full"},
    ],
    ids=str,
)
def test_the_step_is_that_of_a_pass_for_the_values_and_then_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    first, told = trained(tmp_path / "first", **options)
    assert first._critic_learns_first(len(PROMPTS))
    monkeypatch.setattr(PPOTrainer, "_critic_learns_first", lambda self, rows: False)
    plain, expected = trained(tmp_path / "plain", **options)
    assert first.value_model is not None
    assert plain.value_model is not None
    for mine, theirs in (
        (first.value_model.module, plain.value_model.module),
        (first.policy.model, plain.policy.model),
    ):
        wanted = dict(tree_flatten(theirs.trainable_parameters()))
        for name, weight in tree_flatten(mine.trainable_parameters()):
            np.testing.assert_allclose(np.array(weight), np.array(wanted[name]), atol=2e-5, err_msg=name)
    assert told[1]["val/clipfrac_avg"] == 0
    for name in ("loss/value_avg", "explained_variance", "advantages/std", "loss/policy_avg", "grad_norm"):
        assert told[1][name] == pytest.approx(expected[1][name], rel=1e-3, abs=1e-5), name
    head = np.array(first.value_model.module.head.weight)
    assert np.abs(head).max() > 1e-3  # it starts at zero


@pytest.mark.parametrize(
    "options",
    [
        {"num_epochs_per_rollout": 2},
        {"minibatch_size": 2},
        {"value_network": "shared"},
        {"mask_truncated_completions": True},
        {"target_kl": 0.5},
        {
            "algorithm": replace(
                find_algorithm("ppo"), credit=lambda batch, config: from_critic(batch, config)
            )
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_it_has_values_first_where_the_update_depends_on_more(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer, steps = trained(tmp_path, **options)
    assert not trainer._critic_learns_first(len(PROMPTS))
    assert len(steps) == 2


def test_what_nobody_could_score_teaches_the_critic_nothing(tmp_path: Path) -> None:
    config = PPOConfig(
        model_name="embedded",
        max_new_tokens=3,
        num_epochs_per_rollout=1,
        output_dir=str(tmp_path),
        verbose=False,
    )
    trainer = PPOTrainer(config, reward_model=lambda completions, **_: [None] * len(completions))
    trainer.train(PROMPTS, num_epochs=1)
    assert trainer.value_model is not None
    assert float(np.abs(np.array(trainer.value_model.module.head.weight)).max()) == 0.0


def test_returns_are_made_of_the_values_before_the_step(tmp_path: Path) -> None:
    """With lam = gamma = 1 the return is the sum of rewards, whatever the values: the first loss is known by hand."""
    _, steps = trained(
        tmp_path, lam=1.0, gamma=1.0, kl_coef=0.0, vf_coef=0.5, algorithm=find_algorithm("ppo")
    )
    scores, lengths = [], []

    def watched(batch: Scored, config: PPOConfig) -> Credit:
        scores.append(np.array(batch.scores))
        lengths.append(np.array(batch.mask).sum(axis=1))
        return from_critic(batch, config)

    row = replace(find_algorithm("ppo"), credit=watched)
    trained(tmp_path / "watched", lam=1.0, gamma=1.0, kl_coef=0.0, vf_coef=0.5, algorithm=row)
    by_hand = 0.5 * (scores[0] ** 2 * lengths[0]).sum() / lengths[0].sum()  # V starts at 0
    assert steps[0]["loss/value_avg"] == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 1e-3
