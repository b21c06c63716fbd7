"""The options of the update: each by arithmetic, and each shown to reach the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import ExperienceBuffer
from experience_buffer.data_structures import Experience, Prompt, Rollout
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.tabular import Bandit, table_model, token_id

LETTERS = "abcd"
TABLE = {
    "a": [0.3, -0.2, 0.5, 0.0],
    "b": [1.5, -1.0, 0.0, 0.2],
    "c": [0.0, 0.1, -0.1, 0.05],
    "d": [3.0, 0.0, 0.0, 0.0],
}
#: Texts after the prompt a, two groups of three, and their scores.
TEXTS = ["b", "bcd", "dd", "ca", "a", "dbca"]
SCORES = [1.0, 0.0, 0.4, 0.2, 0.9, 0.1]


def probabilities(before: str) -> np.ndarray:
    weights = np.exp(np.array(TABLE[before]))
    return weights / weights.sum()


def logprob(before: str, after: str) -> float:
    return float(np.log(probabilities(before)[LETTERS.index(after)]))


def entropy(before: str) -> float:
    p = probabilities(before)
    return float(-(p * np.log(p)).sum())


def rollouts(offset: float = 0.0) -> list[Rollout]:
    """With the sampler's logprobs ``offset`` above the policy's, growing from row to row."""
    made = []
    for row, text in enumerate(TEXTS):
        ids = tuple(token_id(letter) for letter in text)
        truth = [logprob(x, y) for x, y in zip("a" + text[:-1], text, strict=True)]
        sampled = tuple(value + offset * (row + 1) for value in truth)
        made.append(Rollout(Prompt(row // 3, "a", (token_id("a"),), {}), row % 3, ids, sampled, True, text))
    return made


def make(folder: Path, *, offset: float = 0.0, **options: Any) -> tuple[PPOTrainer, Experience]:
    config = PPOConfig(
        model_name="embedded",
        fine_tune_type="full",
        max_new_tokens=4,
        output_dir=str(folder / f"run-{len(list(folder.iterdir()))}"),
        verbose=False,
        **{"algorithm": "dr_grpo", "group_size": 3, "batch_size": 2, **options},
    )
    trainer = PPOTrainer(
        config,
        model=table_model(TABLE, LETTERS),
        reward_model=lambda completions, **columns: SCORES[: len(completions)],
    )
    return trainer, trainer.make_experience(rollouts(offset))[0]


def gradient(trainer: PPOTrainer, experience: Experience, *, first: bool = True) -> np.ndarray:
    """Of the loss, at the letters: entry [y, x] is that of the logit of y after x."""
    objective = trainer._build_updater(1).objective
    (minibatch,) = ExperienceBuffer(experience).minibatches(0)
    (part,) = minibatch.micro_batches
    model = trainer.policy.model
    _, gradients = nn.value_and_grad(model, lambda part: objective(part, minibatch, first=first)[0])(part)
    ((_, found),) = tree_flatten(gradients)
    letters = [token_id(letter) for letter in LETTERS]
    return np.array(found)[np.ix_(letters, letters)]


def tokens() -> list[tuple[int, str, str]]:
    """Row, letter before, letter after, of each sampled token."""
    return [(row, x, y) for row, text in enumerate(TEXTS) for x, y in zip("a" + text[:-1], text, strict=True)]


def expected(per_token: Sequence[float], divisor: float) -> np.ndarray:
    """Gradient of -sum w_t log pi(y_t) / divisor for weights ``per_token``."""
    found = np.zeros((4, 4))
    for weight, (_, x, y) in zip(per_token, tokens(), strict=True):
        one_hot = np.eye(4)[LETTERS.index(y)]
        found[:, LETTERS.index(x)] -= weight * (one_hot - probabilities(x)) / divisor
    return found


def advantages() -> list[float]:
    groups = np.array(SCORES).reshape(2, 3)
    rows = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    return [float(rows[row]) for row, _, _ in tokens()]


N = len(tokens())
FIXED = 6 * 4  # rows times max_new_tokens


def test_the_plain_gradient_is_reinforces(tmp_path: Path) -> None:
    np.testing.assert_allclose(gradient(*make(tmp_path)), expected(advantages(), FIXED), atol=1e-6)


def test_the_entropy_bonus_is_a_token_mean_whatever_the_reduction(tmp_path: Path) -> None:
    """dH/dz_j = -p_j (log p_j + H), and the bonus is subtracted from the loss."""
    found = gradient(*make(tmp_path, entropy_coef=0.7)) - gradient(*make(tmp_path))
    by_hand = np.zeros((4, 4))
    for _, x, _ in tokens():
        p = probabilities(x)
        by_hand[:, LETTERS.index(x)] += 0.7 * p * (np.log(p) + entropy(x)) / N
    np.testing.assert_allclose(found, by_hand, atol=1e-6)


def test_an_entropy_bonus_makes_a_bandit_the_softmax_of_its_scores(tmp_path: Path) -> None:
    """max E[r] + c H has exp(r / c) / Z."""
    bandit = Bandit([1.0, 0.0, -1.0], [0.5, 1.0, 0.0])
    trainer = bandit.learn(tmp_path, "dr_grpo", entropy_coef=0.5, kl_coef=0.0)
    best = np.exp(bandit.scores / 0.5)
    np.testing.assert_allclose(bandit.probabilities(trainer), best / best.sum(), atol=0.02)


def test_only_the_tokens_of_highest_entropy_teach(tmp_path: Path) -> None:
    """c is the most uncertain letter, then a, then b, then d; five of the thirteen tokens follow c or a."""
    order = sorted({x for _, x, _ in tokens()}, key=entropy, reverse=True)
    assert order == ["c", "a", "b", "d"]
    forks = [x in "ca" for _, x, _ in tokens()]
    quantile = sum(forks) / N
    trainer, experience = make(tmp_path, top_entropy_quantile=quantile)
    chosen = [a if fork else 0.0 for a, fork in zip(advantages(), forks, strict=True)]
    np.testing.assert_allclose(gradient(trainer, experience), expected(chosen, FIXED), atol=1e-6)


def test_a_bad_row_that_the_policy_has_left_behind_is_dropped(tmp_path: Path) -> None:
    """The sampler's logprobs are 0.1, 0.2 … 0.6 per token above the policy's; rows 1, 3 and 5 have Â < 0."""
    trainer, experience = make(tmp_path, offset=0.1, off_policy_mask_threshold=0.35)
    kept = [
        0.0 if a < 0 and row + 1 > 3 else a for a, (row, _, _) in zip(advantages(), tokens(), strict=True)
    ]
    assert kept != advantages()
    np.testing.assert_allclose(gradient(trainer, experience), expected(kept, FIXED), atol=1e-6)
    dropped = {row for (row, _, _), a, k in zip(tokens(), advantages(), kept, strict=True) if k != a}
    metrics = trainer._build_updater(1).update(experience, 1)
    assert metrics["off_policy/dropped_fraction"] == pytest.approx(len(dropped) / 6)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"importance_correction": "token_truncate", "importance_cap": 0.7}, lambda w, n: min(w, 0.7)),
        ({"importance_correction": "token_mask", "importance_floor": 0.7}, lambda w, n: w if w >= 0.7 else 0),
        ({"importance_correction": "sequence_truncate", "importance_cap": 0.6}, lambda w, n: min(w**n, 0.6)),
        (
            {"importance_correction": "sequence_mask", "importance_floor": 0.5},
            lambda w, n: w**n * (w**n >= 0.5),
        ),
    ],
)
def test_the_weight_of_a_token_multiplies_its_gradient(
    tmp_path: Path, options: dict[str, Any], weight: Any
) -> None:
    """exp(trainer - sampler) is exp(-0.1), exp(-0.2) … per token of rows 0, 1 …"""
    weights = [weight(np.exp(-0.1 * (row + 1)), len(TEXTS[row])) for row, _, _ in tokens()]
    assert len({round(w, 6) for w in weights}) > 1
    weighted = [w * a for w, a in zip(weights, advantages(), strict=True)]
    found = gradient(*make(tmp_path, offset=0.1, **options))
    np.testing.assert_allclose(found, expected(weighted, FIXED), atol=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_an_estimated_kl_is_weighted_and_an_exact_one_is_not(tmp_path: Path, estimator: str) -> None:
    options = {"kl_coef": 0.5, "kl_estimator": estimator, "num_epochs_per_rollout": 1}
    correction = {"importance_correction": "token_truncate"}

    def kl_part(folder: Path, **more: Any) -> np.ndarray:
        trainer, experience = make(folder, offset=0.1, **options, **more)
        assert experience.ref_logprobs is not None
        # A reference of its own: the policy's table with the logits of a's row turned round.
        table = np.array(trainer.policy.model.lm_head.weight)
        ids = [token_id(letter) for letter in LETTERS]
        for before in ids:
            table[ids, before] = table[ids[::-1], before]
        assert trainer.reference is not None
        trainer.reference.model.lm_head.weight = mx.array(table)
        logprobs = trainer.reference.logprobs(experience.tokens, experience.mask)
        nothing = mx.zeros_like(experience.advantages)
        return gradient(trainer, experience._replace(ref_logprobs=logprobs, advantages=nothing))

    plain, corrected = kl_part(tmp_path), kl_part(tmp_path, **correction)
    assert np.abs(plain).max() > 1e-3
    if estimator == "full":
        np.testing.assert_allclose(corrected, plain, atol=1e-7)
    else:
        differences = [
            logprob(x, y) - np.log(probabilities(x)[::-1][LETTERS.index(y)]) for _, x, y in tokens()
        ]
        np.testing.assert_allclose(plain, -0.5 * expected(differences, FIXED), atol=1e-6)
        weighted = [
            d * np.exp(-0.1 * (row + 1)) for d, (row, _, _) in zip(differences, tokens(), strict=True)
        ]
        np.testing.assert_allclose(corrected, -0.5 * expected(weighted, FIXED), atol=1e-6)


def test_the_ratio_may_be_measured_from_the_sampler(tmp_path: Path) -> None:
    """Then it is exp(policy - sampler) from the first step on, single update or not."""
    options = {"old_logprobs_from": "rollout", "surrogate": "unclipped"}
    ratios = [np.exp(-0.1 * (row + 1)) for row, _, _ in tokens()]
    weighted = [r * a for r, a in zip(ratios, advantages(), strict=True)]
    trainer, experience = make(tmp_path, offset=0.1, **options)
    np.testing.assert_allclose(gradient(trainer, experience), expected(weighted, FIXED), atol=1e-6)
    metrics = trainer._build_updater(1).update(experience, 1)
    assert metrics["val/ratio_min"] == pytest.approx(np.exp(-0.6), rel=1e-5)
    assert metrics["val/ratio_max"] == pytest.approx(np.exp(-0.1), rel=1e-5)


def test_a_minibatch_of_too_large_a_ratio_is_not_learned_from(tmp_path: Path) -> None:
    """The sampler thought everything less likely: the mean ratio is above 1."""
    options = {"old_logprobs_from": "rollout", "learning_rate": 0.1}
    for threshold, moves in ((1.0, False), (2.0, True)):
        trainer, experience = make(tmp_path, offset=-0.1, ratio_threshold=threshold, **options)
        before = np.array(trainer.policy.model.lm_head.weight)
        metrics = trainer._build_updater(1).update(experience, 1)
        assert metrics["rejected_updates"] == (0 if moves else 1)
        assert np.array_equal(np.array(trainer.policy.model.lm_head.weight), before) != moves


def test_the_mismatch_is_that_of_sampler_and_trainer(tmp_path: Path) -> None:
    trainer, experience = make(tmp_path, offset=0.1, allow_truncated_sampling=True, top_p=0.9)
    metrics = trainer._build_updater(1).update(experience, 1)
    away = np.array([0.1 * (row + 1) for row, _, _ in tokens()])
    w = np.exp(-away)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(away.mean(), rel=1e-4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.6, rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(w.mean(), rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(w.min(), rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(w.max(), rel=1e-4)
    share = w.sum() ** 2 / (N * (w**2).sum())
    assert metrics["sampling/effective_sample_size"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize(("unit", "kl"), [("sequence", 6.0), ("token", 0.5)])
def test_the_controller_is_fed_in_its_unit(tmp_path: Path, unit: str, kl: float) -> None:
    """6 nats per sequence and 0.5 per token: on target in the right unit, off it in the other."""
    options = {"kl_coef": 0.2, "kl_target": kl, "kl_unit": unit, "kl_horizon": 100}
    trainer, _ = make(tmp_path, algorithm="rloo", **options)
    metrics = {"objective/kl": 6.0, "objective/kl_per_token": 0.5}
    trainer._adapt_kl(metrics, 50)
    assert trainer.kl_controller.value == pytest.approx(0.2)
    other = {"objective/kl": 12.0, "objective/kl_per_token": 1.0}
    trainer._adapt_kl(other, 50)
    assert trainer.kl_controller.value == pytest.approx(0.2 * (1 + 0.2 * 50 / 100))


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_full_kl_trains_through_the_whole_loop(tmp_path: Path, placement: str) -> None:
    bandit = Bandit([0.0, 1.0, 0.5], [1.0, 0.0, 0.0])
    trainer = bandit.learn(
        tmp_path,
        "dr_grpo",
        steps=5,
        kl_coef=0.5,
        kl_placement=placement,
        kl_estimator="full",
        allow_biased_kl=True,
    )
    assert trainer.config.kl_estimator == "full"
    assert bandit.probabilities(trainer)[0] > np.exp(0) / np.exp([0, 1, 0.5]).sum()
