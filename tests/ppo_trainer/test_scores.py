"""From raw scores to advantages: every step of the shaping, by arithmetic, through the experience maker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import ExperienceBuffer
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


# What is left out, and of what ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "divisor"),
    [
        ("token_mean", lambda n: 2 + 5 + 9 + 1 + 8 + 9),
        ("sequence_mean", lambda n: 6 * n),
        ("fixed_length", lambda n: 6 * LONGEST),
        ("sequence_sum", lambda n: 6),
        ("micro_batch_mean", lambda n: 2 + 5 + 9 + 1 + 8 + 9),
    ],
)
def test_a_truncated_completion_has_no_gradient_and_no_place_in_the_denominator(
    tmp_path: Path, reduction: str, divisor: Any
) -> None:
    """-A (1 - p) / divisor at each b of the six rows that ended; the last of each group of four did not."""
    experience, _, trainer = make(tmp_path, mask_truncated_completions=True, reduction=reduction)
    (minibatch,) = ExperienceBuffer(experience).minibatches(0)
    assert (minibatch.n_rows, minibatch.n_tokens) == (6, 34)
    objective, model = trainer._build_updater(1).objective, trainer.policy.model
    differentiate = nn.value_and_grad(model, lambda part: objective(part, minibatch, first=True)[0])
    _, gradients = differentiate(minibatch.micro_batches[0])
    ((_, gradient),) = tree_flatten(gradients)
    found = np.array(gradient)[token_id("b"), [token_id("a"), token_id("b")]]
    miss = [1 - 1 / (1 + np.exp(0.5 + 0.5)), 1 - 1 / (1 + np.exp(0.1 - 0.2))]  # 1 - p(b), after a and after b
    by_hand = np.zeros(2)
    for row, (n, advantage) in enumerate(zip(LENGTHS, centred(RAW), strict=True)):
        if row % 4 != 3:
            by_hand -= advantage / divisor(n) * np.array([miss[0], (n - 1) * miss[1]])
    np.testing.assert_allclose(found, by_hand, atol=1e-6)


def test_a_batch_that_was_cut_off_throughout_moves_nothing(tmp_path: Path) -> None:
    _, _, trainer = make(tmp_path, mask_truncated_completions=True, learning_rate=0.1)
    cut = [replace(r, terminated=False) for r in rollouts()]
    experience, _ = trainer.make_experience(cut)
    before = np.array(trainer.policy.model.lm_head.weight)
    assert trainer.update(experience)["num_updates"] == 0
    np.testing.assert_array_equal(np.array(trainer.policy.model.lm_head.weight), before)


def test_unscorable_rows_enter_neither_moments_nor_means_nor_tokens(tmp_path: Path) -> None:
    scores = [*RAW[:3], None, None, *RAW[5:]]
    known = np.array([score for score in scores if score is not None])
    experience, metrics, trainer = make(tmp_path, scores, score_scaling="norm", score_clip=1.0)
    shaped = np.clip((known - known.mean()) / known.std(ddof=1), -1, 1)
    assert trainer._maker.shaper.moments.count == 6
    assert metrics["scores/running_mean"] == pytest.approx(known.mean(), rel=1e-5)
    assert metrics["objective/scores"] == pytest.approx(shaped.mean(), abs=1e-5)
    groups = [shaped[:3] - shaped[:3].mean(), shaped[3:] - shaped[3:].mean()]
    np.testing.assert_allclose(per_row(experience)[:3], groups[0], atol=1e-5)
    np.testing.assert_allclose(per_row(experience)[5:], groups[1], atol=1e-5)
    assert not np.array(experience.mask)[3:5].any()
    assert not np.array(experience.advantages)[3:5].any()


def test_a_batch_without_any_score_leaves_moments_and_kl_coefficient_alone(tmp_path: Path) -> None:
    """Nothing was measured: a KL of 0 that nobody has seen is no reason to steer."""
    options = {"algorithm": "rloo", "kl_coef": 0.2, "kl_target": 3.0, "kl_horizon": 100}
    _, metrics, trainer = make(tmp_path, [None] * 8, score_scaling="std", **options)
    assert trainer._maker.shaper.moments.count == 0
    trainer._adapt_kl(metrics, 8)
    assert trainer.kl_controller.value == 0.2
    trainer._adapt_kl({"objective/kl": float("nan")}, 8)  # of an update that was skipped: the run goes on
    assert trainer.kl_controller.value == 0.2
    trainer._adapt_kl({"objective/kl": 30.0}, 8)
    assert trainer.kl_controller.value > 0.2


def test_the_share_of_rows_in_groups_of_one_score(tmp_path: Path) -> None:
    for scores, share in (([1.0] * 4 + RAW[4:], 4 / 8), ([2.0, None, 2.0, 2.0, *RAW[4:]], 3 / 7), (RAW, 0.0)):
        assert make(tmp_path, scores)[1]["frac_reward_zero_std"] == pytest.approx(share)


def test_the_first_scores_are_not_divided_as_long_as_they_are_equal(tmp_path: Path) -> None:
    for mode, mean in (("std", 0.7), ("norm", 0.0)):
        experience, metrics, _ = make(tmp_path, [0.7] * 8, score_scaling=mode)
        assert metrics["objective/scores"] == pytest.approx(mean, abs=1e-6)
        assert not np.array(experience.advantages).any()


# Rows that take scores in another way ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shaped"),
    [
        ({"score_scaling": "std"}, lambda s: s / np.std(RAW, ddof=1)),
        ({"score_scaling": "norm"}, lambda s: (s - np.mean(RAW)) / np.std(RAW, ddof=1)),
        ({"score_clip": 1.5}, lambda s: np.clip(s, -1.5, 1.5)),
    ],
)
def test_remax_compares_scores_on_one_scale(tmp_path: Path, options: dict[str, Any], shaped: Any) -> None:
    """The likeliest answer's score goes the way of the others, and is none of those that are scaled by."""
    _, _, trainer = make(tmp_path)
    greedy = [2.0, -1.0]
    config = trainer.config.replace(
        **{"algorithm": "remax", "kl_placement": "none", "output_dir": str(tmp_path / "remax"), **options}
    )
    remax = PPOTrainer(
        config,
        model=trainer.policy.base,
        reward_model=lambda completions, **columns: RAW if len(completions) == 8 else greedy,
    )
    experience, _ = remax.make_experience(rollouts())
    by_hand = shaped(np.array(RAW)) - np.repeat(shaped(np.array(greedy)), 4)
    np.testing.assert_allclose(per_row(experience), by_hand, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"score_scaling": "std"}, {"score_scaling": "norm"}, {"score_clip": 2.0}]
)
def test_gdpo_compares_shaped_scores_or_refuses_to(tmp_path: Path, options: dict[str, Any]) -> None:
    """With one reward it is grpo rescaled, whatever was done to the scores before."""
    (name,) = options
    exact = {"advantage_epsilon": 0.0, "scale_rewards": "group"}
    try:
        gdpo, _, _ = make(tmp_path, algorithm="gdpo", **exact, **options)
    except InvalidConfigurationError as error:
        assert name in str(error)  # noqa: PT017
        return
    grpo, _, _ = make(tmp_path, algorithm="grpo", **exact, **options)
    np.testing.assert_allclose(per_row(gdpo), per_row(grpo) / np.sqrt(6 / 7), atol=1e-4)


def test_in_gdpo_a_small_penalty_weighs_little(tmp_path: Path) -> None:
    """What shaping adds has a size of its own, which normalising it in its group would take away."""
    found = [
        per_row(make(tmp_path, algorithm="gdpo", advantage_epsilon=0.0, missing_end_penalty=penalty)[0])
        for penalty in (0.0, 0.01, 3.0)
    ]
    assert np.abs(found[1] - found[0]).max() < 0.1
    assert np.abs(found[2] - found[0]).max() > 0.3


def test_in_gdpo_a_row_on_which_a_reward_failed_is_nobodys_measure(tmp_path: Path) -> None:
    """With two groups of three rows left, Â is that of those six, whatever the other reward said of the failed ones."""
    first, second = [9.0, 3.0, 2.0, 6.0, -9.0, 0.0, 0.5, 2.5], [0.0, 1, 0, 2, 5, 0, 3, 1]

    def failing(completions: Sequence[str], **columns: Any) -> list[float]:
        return [float("nan") if row in (0, 4) else score for row, score in enumerate(second)][
            : len(completions)
        ]

    trainer = PPOTrainer(
        PPOConfig(
            algorithm="gdpo",
            model_name="embedded",
            fine_tune_type="full",
            group_size=4,
            advantage_epsilon=0.0,
            on_reward_error="skip",
            output_dir=str(tmp_path / "run"),
            verbose=False,
        ),
        model=table_model({"a": [0.5, -0.5], "b": [0.1, 0.2]}, "ab"),
        reward_model=[lambda completions, **columns: first[: len(completions)], failing],
    )
    experience, _ = trainer.make_experience(rollouts())
    total = np.zeros(6)
    for scores in (first, second):
        groups = np.array(scores).reshape(2, 4)[:, 1:]
        spread = groups.std(axis=1, ddof=1, keepdims=True)
        total += ((groups - groups.mean(axis=1, keepdims=True)) / spread).ravel()
    found = per_row(experience)
    assert np.isnan(found[[0, 4]]).all()
    np.testing.assert_allclose(found[[1, 2, 3, 5, 6, 7]], total / total.std(ddof=1), atol=1e-4)


def test_whitening_the_rewards_takes_the_kl_in(tmp_path: Path) -> None:
    """Rewards are -0.5 k1 per token and the score on the last; their deviation is that of all of them."""
    options = {"algorithm": "reinforce_pp", "kl_coef": 0.5, "whiten_advantages": False}
    _, _, trainer = make(tmp_path, whiten_rewards=True, **options)
    assert trainer.reference is not None
    table = np.array(trainer.policy.model.lm_head.weight)
    table[token_id("b"), token_id("b")] += 1.0  # the reference likes b after b better
    trainer.reference.model.lm_head.weight = mx.array(table)
    experience, _ = trainer.make_experience(rollouts())

    def logprob(b: float, a: float) -> float:
        return float(b - np.log(np.exp(a) + np.exp(b)))

    k1 = logprob(0.2, 0.1) - logprob(1.2, 0.1)
    raw = np.concatenate(
        [
            [0.0] + [-0.5 * k1] * (n - 1) + np.array([0.0] * (n - 1) + [s])
            for n, s in zip(LENGTHS, RAW, strict=True)
        ]
    )
    expected = (raw - raw.mean()) / raw.std(ddof=1) + raw.mean()
    to_go, mask = np.array(experience.advantages), np.array(experience.mask)
    rewards = np.concatenate([-np.diff(np.append(a[m], 0.0)) for a, m in zip(to_go, mask, strict=True)])
    np.testing.assert_allclose(rewards, expected, atol=1e-5)
