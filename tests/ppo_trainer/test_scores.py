"""From raw scores to advantages: every step of the shaping, by arithmetic, through the experience maker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Experience, Prompt, Rollout
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.tabular import table_model, token_id

LONGEST = 10
#: Lengths of two groups of four completions; the last of each is cut off.
LENGTHS = [2, 5, 9, 10, 1, 8, 9, 10]
RAW = [1.0, 3.0, 2.0, 6.0, -1.0, 0.0, 0.5, 2.5]


def rollouts(lengths: Sequence[int] = LENGTHS) -> list[Rollout]:
    made = []
    for row, length in enumerate(lengths):
        prompt = Prompt(row // 4, "a", (token_id("a"),), {})
        ids = (token_id("b"),) * length
        made.append(Rollout(prompt, row % 4, ids, (-1.0,) * length, row % 4 != 3, "b" * length))
    return made


def make(
    folder: Path, scores: Sequence[float | None] = RAW, **options: Any
) -> tuple[Experience, dict[str, float], PPOTrainer]:
    config = PPOConfig(
        model_name="embedded",
        fine_tune_type="full",
        max_new_tokens=LONGEST,
        output_dir=str(folder / f"run-{len(list(folder.iterdir()))}"),
        verbose=False,
        **{"algorithm": "dr_grpo", "group_size": 4, "gamma": 1.0, **options},
    )
    trainer = PPOTrainer(
        config,
        model=table_model({"a": [0.5, -0.5], "b": [0.1, 0.2]}, "ab"),
        reward_model=lambda completions, **columns: list(scores),
    )
    return *trainer.make_experience(rollouts()), trainer


def per_row(experience: Experience) -> np.ndarray:
    """The advantage of each row, which all its tokens share."""
    advantages, mask = np.array(experience.advantages), np.array(experience.mask)
    for row in range(len(mask)):
        assert len(set(advantages[row][mask[row]].tolist())) <= 1
    return np.array([a[m][0] if m.any() else np.nan for a, m in zip(advantages, mask, strict=True)])


def centred(scores: Sequence[float]) -> np.ndarray:
    groups = np.array(scores, dtype=np.float64).reshape(2, 4)
    return (groups - groups.mean(axis=1, keepdims=True)).ravel()


def test_scores_are_clipped_before_they_are_compared(tmp_path: Path) -> None:
    experience, metrics, _ = make(tmp_path, score_clip=2.0)
    np.testing.assert_allclose(per_row(experience), centred([1, 2, 2, 2, -1, 0, 0.5, 2]), atol=1e-6)
    assert metrics["reward"] == pytest.approx(np.mean(RAW))  # what the reward said stays what is reported
    assert metrics["objective/scores"] == pytest.approx(np.mean([1, 2, 2, 2, -1, 0, 0.5, 2]))


def test_the_missing_end_penalty_is_subtracted_or_put_in_the_scores_place(tmp_path: Path) -> None:
    subtracted, _, _ = make(tmp_path, missing_end_penalty=1.5)
    np.testing.assert_allclose(per_row(subtracted), centred([1, 3, 2, 4.5, -1, 0, 0.5, 1.0]), atol=1e-6)
    replaced, _, _ = make(tmp_path, missing_end_penalty=1.5, missing_end_mode="replace")
    np.testing.assert_allclose(per_row(replaced), centred([1, 3, 2, -1.5, -1, 0, 0.5, -1.5]), atol=1e-6)


def test_an_unscorable_row_stays_out_even_where_a_penalty_would_replace_its_score(tmp_path: Path) -> None:
    scores = [*RAW[:3], None, *RAW[4:]]
    experience, _, _ = make(tmp_path, scores, missing_end_penalty=1.5, missing_end_mode="replace")
    assert not np.array(experience.mask)[3].any()
    np.testing.assert_allclose(per_row(experience)[:3], [-1, 1, 0], atol=1e-6)  # mean of 1, 3, 2


def test_overlong_answers_are_punished_over_the_buffer(tmp_path: Path) -> None:
    """L = 10, c = 4: nothing up to 6, then a quarter per token, all of it at 10."""
    experience, _, _ = make(tmp_path, overlong_buffer=0.4, overlong_penalty=2.0)
    penalties = [0, 0, -1.5, -2, 0, -1, -1.5, -2]
    np.testing.assert_allclose(per_row(experience), centred(np.array(RAW) + penalties), atol=1e-6)


@pytest.mark.parametrize("mode", ["std", "norm"])
def test_running_moments_scale_by_all_scores_so_far_the_batch_included(tmp_path: Path, mode: str) -> None:
    experience, metrics, trainer = make(tmp_path, score_scaling=mode)
    std = np.std(RAW, ddof=1)
    np.testing.assert_allclose(per_row(experience), centred(RAW) / std, rtol=1e-5)
    mean = np.mean(RAW) if mode == "norm" else 0.0
    assert metrics["objective/scores"] == pytest.approx((np.mean(RAW) - mean) / std, abs=1e-6)
    # A second batch: the same scores plus 10 from another reward.
    trainer.rewards.rewards[0] = lambda completions, **columns: [score + 10 for score in RAW]
    _, later = trainer.make_experience(rollouts())
    everything = np.array([*RAW, *(score + 10 for score in RAW)])
    assert later["scores/running_std"] == pytest.approx(everything.std(ddof=1), rel=1e-5)
    assert later["scores/running_mean"] == pytest.approx(everything.mean(), rel=1e-5)
    mean = everything.mean() if mode == "norm" else 0.0
    expected = (np.mean(RAW) + 10 - mean) / everything.std(ddof=1)
    assert later["objective/scores"] == pytest.approx(expected, rel=1e-4)


def test_the_order_is_scale_clip_missing_end_overlong(tmp_path: Path) -> None:
    experience, _, _ = make(
        tmp_path,
        score_scaling="std",
        score_clip=1.0,
        missing_end_penalty=0.5,
        overlong_buffer=0.4,
        overlong_penalty=2.0,
    )
    scaled = np.clip(np.array(RAW) / np.std(RAW, ddof=1), -1, 1)
    shaped = scaled - np.array([0, 0, 0, 0.5] * 2) + np.array([0, 0, -1.5, -2, 0, -1, -1.5, -2])
    np.testing.assert_allclose(per_row(experience), centred(shaped), atol=1e-5)


def test_a_truncated_completion_counts_in_its_group_and_teaches_nothing(tmp_path: Path) -> None:
    experience, _, _ = make(tmp_path, mask_truncated_completions=True)
    mask = np.array(experience.mask)
    assert mask.sum(axis=1).tolist() == [2, 5, 9, 0, 1, 8, 9, 0]  # and so they leave every denominator
    kept = [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(per_row(experience)[kept], centred(RAW)[kept], atol=1e-6)


def test_whitened_rewards_have_variance_one_and_their_own_mean(tmp_path: Path) -> None:
    """With reward-to-go and gamma = 1 the rewards are the differences of the advantages along a row."""
    experience, _, _ = make(
        tmp_path, algorithm="reinforce_pp", kl_coef=0.0, whiten_rewards=True, whiten_advantages=False
    )
    advantages, mask = np.array(experience.advantages), np.array(experience.mask)
    rewards = np.concatenate([-np.diff(np.append(a[m], 0.0)) for a, m in zip(advantages, mask, strict=True)])
    raw = np.concatenate([[0.0] * (n - 1) + [score] for n, score in zip(LENGTHS, RAW, strict=True)])
    expected = (raw - raw.mean()) / raw.std(ddof=1) + raw.mean()
    np.testing.assert_allclose(rewards, expected, atol=1e-5)


def test_gdpo_hears_each_reward_at_its_own_scale(tmp_path: Path) -> None:
    """A reward a thousand times as large as another drowns it in grpo and does not in gdpo."""
    large, small = np.array(RAW) * 1000, np.array([0, 1, 0, 1, 1, 0, 1, 0.0])
    config = PPOConfig(
        algorithm="gdpo",
        model_name="embedded",
        fine_tune_type="full",
        group_size=4,
        advantage_epsilon=0.0,
        reward_weights=[1.0, 2.0],
        output_dir=str(tmp_path / "run"),
        verbose=False,
    )

    def first(completions: Sequence[str], **columns: Any) -> list[float]:
        return large.tolist()

    def second(completions: Sequence[str], **columns: Any) -> list[float]:
        return small.tolist()

    trainer = PPOTrainer(
        config, model=table_model({"a": [0.5, -0.5], "b": [0.1, 0.2]}, "ab"), reward_model=[first, second]
    )
    experience, _ = trainer.make_experience(rollouts())

    def normalised(scores: np.ndarray) -> np.ndarray:
        groups = scores.reshape(2, 4)
        spread = groups.std(axis=1, ddof=1, keepdims=True)
        return ((groups - groups.mean(axis=1, keepdims=True)) / spread).ravel()

    total = normalised(large) + 2 * normalised(small)
    np.testing.assert_allclose(per_row(experience), (total - total.mean()) / total.std(ddof=1), atol=1e-4)
