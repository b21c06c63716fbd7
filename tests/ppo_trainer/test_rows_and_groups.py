"""Scores, groups and rows: who is credited with what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ppo_trainer.evaluator import score_rollouts
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    GRPO,
    KINDS,
    PPO,
    PROMPTS,
    READABLE,
    config,
    even_share,
    fixed_batch,
    gradients,
    judged_by_length,
    largest_difference,
    same,
    weights,
)


def test_each_row_is_credited_with_its_own_score_against_its_own_group(tmp_path: Path) -> None:
    """Scores 0 1 2 6 | 5 5 5 9 by hand: (s - mean) / (Bessel std + 1e-4), the same on each of a row's tokens."""

    def by_order(completions: Sequence[str], **columns: Any) -> list[float]:
        return [0, 1, 2, 6, 5, 5, 5, 9]

    trainer = PPOTrainer(config(tmp_path, **GRPO), reward_model=by_order)
    rollouts = fixed_batch(trainer, group_size=4)
    experience, metrics = trainer.make_experience(rollouts)
    groups = np.array([[0.0, 1, 2, 6], [5, 5, 5, 9]])
    expected = (groups - groups.mean(axis=1, keepdims=True)) / (
        groups.std(axis=1, ddof=1, keepdims=True) + 1e-4
    )
    for row, (rollout, advantage) in enumerate(zip(rollouts, expected.ravel(), strict=True)):
        start, n = len(rollout.prompt.ids) - 1, len(rollout.completion_ids)
        found = np.array(experience.advantages[row])
        np.testing.assert_allclose(found[start : start + n], advantage, atol=1e-5)
        assert not found[:start].any()
        assert not found[start + n :].any()
        assert np.array(experience.tokens[row])[start + 1 : start + 1 + n].tolist() == list(
            rollout.completion_ids
        )
    assert metrics["reward"] == pytest.approx(groups.mean())


def test_with_neither_discount_nor_kl_every_token_returns_the_score_of_its_row(tmp_path: Path) -> None:
    """gamma = lam = 1 and kl_coef = 0: R_t = A_t + V_t is the score, whatever V is."""
    trainer = PPOTrainer(config(tmp_path, gamma=1, lam=1, kl_coef=0, **PPO), reward_model=even_share)
    assert trainer.value_model is not None
    trainer.value_model.module.head.bias = mx.array([0.7])
    rollouts = fixed_batch(trainer, group_size=3)
    experience, _ = trainer.make_experience(rollouts)
    for row, score in enumerate(score_rollouts(trainer.rewards, rollouts).total):
        mask = np.array(experience.mask[row])
        assert mask.sum() == len(rollouts[row].completion_ids)
        np.testing.assert_allclose(np.array(experience.returns[row])[mask], score, atol=1e-5)
        np.testing.assert_allclose(np.array(experience.values[row])[mask], 0.7, atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(0.5, 1.0), (1.0, 0.0), (0.9, 0.5)])
def test_discount_and_trace_decay_are_those_of_the_config(tmp_path: Path, gamma: float, lam: float) -> None:
    """V = c everywhere, score s at the end: R_last = s, and R_t = gamma ((1 - lam) c + lam R_{t+1}) before it."""
    c = 0.7
    trainer = PPOTrainer(config(tmp_path, gamma=gamma, lam=lam, kl_coef=0, **PPO), reward_model=even_share)
    assert trainer.value_model is not None
    trainer.value_model.module.head.bias = mx.array([c])
    rollouts = fixed_batch(trainer, group_size=3)
    experience, _ = trainer.make_experience(rollouts)
    for row, score in enumerate(score_rollouts(trainer.rewards, rollouts).total):
        expected = [float(score)]
        for _ in rollouts[row].completion_ids[1:]:
            expected.insert(0, gamma * ((1 - lam) * c + lam * expected[0]))
        returns = np.array(experience.returns[row])[np.array(experience.mask[row])]
        np.testing.assert_allclose(returns, expected, atol=1e-5)


def test_the_kl_penalty_of_each_token_is_in_its_reward(tmp_path: Path) -> None:
    """lam = gamma = 1 and V = 0: R_t is the score minus the coefficient of now times the log-ratios from t on."""
    trainer = PPOTrainer(
        config(tmp_path, gamma=1, lam=1, kl_coef=0.5, learning_rate=1e-2, fine_tune_type="full", **PPO),
        reward_model=even_share,
    )
    trainer.train(PROMPTS, num_epochs=2)
    assert trainer.value_model is not None
    trainer.value_model.module.head.update({"weight": mx.zeros((1, 32)), "bias": mx.zeros((1,))})
    trainer.kl_controller.value = 0.8  # as a controller may have left it
    rollouts = fixed_batch(trainer)
    experience, metrics = trainer.make_experience(rollouts)
    logratio = np.array(
        trainer.policy.logprobs(experience.tokens, experience.mask)
        - trainer.reference.logprobs(experience.tokens, experience.mask)
    )
    assert np.abs(logratio).max() > 1e-3
    for row, score in enumerate(score_rollouts(trainer.rewards, rollouts).total):
        mask = np.array(experience.mask[row])
        expected = score - 0.8 * logratio[row][mask][::-1].cumsum()[::-1]
        np.testing.assert_allclose(np.array(experience.returns[row])[mask], expected, atol=1e-5)
    assert metrics["objective/kl"] == pytest.approx(logratio.sum() / len(rollouts), abs=1e-5)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.8 * metrics["objective/kl"], abs=1e-5)


def test_equal_rewards_in_every_group_teach_grpo_exactly_nothing(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, kl_coef=0, **GRPO, **READABLE), reward_model=judged_by_length)
    rollouts = fixed_batch(trainer, group_size=4)
    experience, metrics = trainer.make_experience(rollouts)
    assert all(not g.any() for g in gradients(trainer, experience).values())
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["reward_std"] > 1


@KINDS
def test_a_row_that_no_reward_applies_to_changes_nothing(tmp_path: Path, kind: dict[str, Any]) -> None:
    """The gradient with such a row in the batch is the gradient without it: it enters no sum and no count."""

    def skipping(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[Any]:
        scores = even_share(completion_ids)
        return [None if text == "3" else score for text, score in zip(completions, scores, strict=True)]

    trainer = PPOTrainer(config(tmp_path, **kind, **READABLE), reward_model=skipping)
    rollouts = fixed_batch(trainer, group_size=4)
    assert [rollout.text for rollout in rollouts] == ["0", "1", "2", "3"] * 2
    scored = [rollout for rollout in rollouts if rollout.text != "3"]
    with_them, without = (gradients(trainer, trainer.make_experience(r)[0]) for r in (rollouts, scored))
    assert max(float(np.abs(g).max()) for g in without.values()) > 1e-3
    assert largest_difference(with_them, without) < 1e-6


def test_unscored_rows_enter_no_metric_of_the_scored_ones(tmp_path: Path) -> None:
    """Scores 2 and 4 and four rows without one, before the first update: the mean is 3 and the KL part is 0."""

    def two_of_six(completions: Sequence[str], **columns: Any) -> list[Any]:
        return [2.0, None, None, 4.0, None, None]

    trainer = PPOTrainer(config(tmp_path, **PPO), reward_model=two_of_six)
    _, metrics = trainer.make_experience(fixed_batch(trainer, group_size=3))
    assert metrics["reward"] == metrics["objective/scores"] == 3.0
    assert metrics["objective/rlhf_reward"] == pytest.approx(3.0)
    assert metrics["objective/non_score_reward"] == pytest.approx(0.0)


@KINDS
def test_a_batch_without_any_score_is_survived_and_moves_nothing(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """In the first step, and later on too: momentum is no reason to move without having seen anything."""
    calls = 0

    def none_in_steps_1_and_3(completions: Sequence[str], completion_ids: Any, **_: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        return [None] * len(completions) if calls in (1, 3) else even_share(completion_ids)

    after: list[dict[str, np.ndarray]] = []

    class Watch:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
            after.append(weights(trainer))

    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, kl_coef=0.1, **kind), reward_model=none_in_steps_1_and_3
    )
    before = weights(trainer)
    result = trainer.train(PROMPTS, num_epochs=3, callbacks=[Watch()])
    assert same(before, after[0])
    assert not same(after[0], after[1])
    assert same(after[1], after[2])
    assert math.isfinite(result["history"][1]["avg_reward"])
    assert all(np.isfinite(x).all() for x in after[2].values())


def test_an_epochs_mean_reward_is_that_of_the_rows_that_have_one(tmp_path: Path) -> None:
    calls = 0

    def none_at_first(completions: Sequence[str], **columns: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        return [None if calls == 1 else 2.0] * len(completions)

    trainer = PPOTrainer(config(tmp_path, batch_size=2, **PPO), reward_model=none_at_first)
    assert trainer.train(PROMPTS, num_epochs=1)["avg_reward"] == 2.0


def test_the_missing_end_penalty_lowers_the_scores_of_cut_off_rows_and_of_no_others(tmp_path: Path) -> None:
    trainer = PPOTrainer(
        config(tmp_path, missing_end_penalty=0.6, kl_coef=0, gamma=1, lam=1, **PPO), reward_model=even_share
    )
    rollouts = fixed_batch(trainer, group_size=3)
    experience, metrics = trainer.make_experience(rollouts)
    scores = score_rollouts(trainer.rewards, rollouts).total
    expected = [s if r.terminated else s - 0.6 for s, r in zip(scores, rollouts, strict=True)]
    assert {r.terminated for r in rollouts} == {True, False}
    for row, score in enumerate(expected):
        mask = np.array(experience.mask[row])
        np.testing.assert_allclose(np.array(experience.returns[row])[mask], score, atol=1e-5)
    assert metrics["objective/scores"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert metrics["reward"] == pytest.approx(scores.mean(), abs=1e-6)
