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

from config.errors import InvalidConfigurationError
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


@pytest.mark.parametrize(("uncertain", "count"), [("c", 3), ("ca", 9)])
def test_only_the_tokens_of_highest_entropy_teach(tmp_path: Path, uncertain: str, count: int) -> None:
    """c is the most uncertain letter, then a, then b, then d; of the thirteen tokens three follow c, and six a."""
    order = sorted({x for _, x, _ in tokens()}, key=entropy, reverse=True)
    assert order == ["c", "a", "b", "d"]
    forks = [x in uncertain for _, x, _ in tokens()]
    assert sum(forks) == count
    quantile = count / N
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


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])  # k3 times a ratio of 1 has the gradient of k2
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


# Columns and limits, by the weight that each token's gradient has ------------------------------------------


def rows_advantages() -> np.ndarray:
    groups = np.array(SCORES).reshape(2, 3)
    return (groups - groups.mean(axis=1, keepdims=True)).ravel()


def with_ratios(folder: Path, offset: float, **options: Any) -> np.ndarray:
    """The gradient where row i has a ratio of exp(-offset (i + 1)) at each of its tokens."""
    return gradient(*make(folder, offset=offset, old_logprobs_from="rollout", **options))


def weighing(weight: Any, offset: float) -> list[float]:
    """``weight(r, A, n)`` for each token."""
    a = rows_advantages()
    return [
        float(weight(np.exp(-offset * (row + 1)), a[row], len(TEXTS[row]))) / FIXED for row, _, _ in tokens()
    ]


def sapo_weight(r: float, a: float, tau: float) -> float:
    """d/d log r of (4 / tau) sigma(tau (r - 1)) A."""
    gate = 1 / (1 + np.exp(-tau * (r - 1)))
    return float(4 * gate * (1 - gate) * r * a)


@pytest.mark.parametrize(
    ("offset", "options", "weight"),
    [
        (-0.2, {"surrogate": "unclipped"}, lambda r, a, n: r * a),
        (-0.2, {}, lambda r, a, n: 0 if a > 0 and r > 1.2 else r * a),
        (-0.2, {"clip_epsilon": 0.5}, lambda r, a, n: 0 if a > 0 and r > 1.5 else r * a),
        (
            -0.2,
            {"clip_epsilon": 0.1, "clip_epsilon_high": 1.0},
            lambda r, a, n: 0 if a > 0 and r > 2 else r * a,
        ),
        (
            0.1,
            {"clip_epsilon": 0.15, "clip_epsilon_high": 1.0},
            lambda r, a, n: 0 if a < 0 and r < 0.85 else r * a,
        ),
        (
            -0.2,
            {"dual_clip": 2.0},
            lambda r, a, n: 0 if (a > 0 and r > 1.2) or (a < 0 and r > 2) else r * a,
        ),
        (-0.2, {"delta": 1.7}, lambda r, a, n: 0 if (a > 0 and r > 1.2) or (a < 0 and r > 1.7) else r * a),
        (-0.2, {"surrogate": "cispo"}, lambda r, a, n: r * a),
        (-0.2, {"surrogate": "cispo", "ratio_cap": 1.6}, lambda r, a, n: min(r, 1.6) * a),
        (-0.2, {"surrogate": "sapo"}, lambda r, a, n: sapo_weight(r, a, 1.0 if a > 0 else 1.05)),
        (
            -0.2,
            {"surrogate": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0},
            lambda r, a, n: sapo_weight(r, a, 0.5 if a > 0 else 2.0),
        ),
        # A row's ratio is the mean's at each of its n tokens, and so is its gradient: n times 1 / n.
        (-0.2, {"ratio": "sequence", "surrogate": "unclipped"}, lambda r, a, n: r * a),
        (-0.05, {"ratio": "sequence_product", "surrogate": "unclipped"}, lambda r, a, n: n * r**n * a),
        (-0.05, {"ratio": "sequence_product"}, lambda r, a, n: 0 if a > 0 and r**n > 1.2 else n * r**n * a),
    ],
)
def test_the_bound_of_the_ratio_is_what_the_config_says(
    tmp_path: Path, offset: float, options: dict[str, Any], weight: Any
) -> None:
    """dr_grpo's own are the token's ratio, clipped to 1 ± 0.2."""
    found = with_ratios(tmp_path, offset, **options)
    np.testing.assert_allclose(found, expected(weighing(weight, offset), 1.0), atol=1e-5)


@pytest.mark.parametrize(
    ("reduction", "divisor"),
    [
        ("token_mean", lambda n: N),
        ("sequence_mean", lambda n: 6 * n),
        ("fixed_length", lambda n: FIXED),
        ("sequence_sum", lambda n: 6),
        ("micro_batch_mean", lambda n: N),
    ],
)
def test_the_reduction_is_what_the_config_says(tmp_path: Path, reduction: str, divisor: Any) -> None:
    weighted = [a / divisor(len(TEXTS[row])) for a, (row, _, _) in zip(advantages(), tokens(), strict=True)]
    found = gradient(*make(tmp_path, reduction=reduction))
    np.testing.assert_allclose(found, expected(weighted, 1.0), atol=1e-6)


# The KL in the loss and in the reward, by arithmetic ---------------------------------------------------------


def at(temperature: float, p: np.ndarray) -> np.ndarray:
    """The same logits at another temperature."""
    warmer = p ** (1 / temperature)
    return warmer / warmer.sum()


def colder(before: str) -> np.ndarray:
    """What the reference below says after ``before``: the policy's logits, doubled."""
    return at(0.5, probabilities(before))


def log_ratios() -> list[float]:
    """d = log π - log π_ref of each token."""
    return [logprob(x, y) - float(np.log(colder(x)[LETTERS.index(y)])) for _, x, y in tokens()]


def exact_kl(before: str) -> float:
    p = probabilities(before)
    return float((p * np.log(p / colder(before))).sum())


def from_another_reference(
    folder: Path, *, offset: float = 0.0, **options: Any
) -> tuple[PPOTrainer, Experience, dict[str, float]]:
    """As ``make``, with the policy's logits, doubled, as reference: so the texts' KL is positive."""
    trainer, _ = make(folder, offset=offset, **options)
    assert trainer.reference is not None
    table = np.array(trainer.policy.model.lm_head.weight)
    ids = [token_id(letter) for letter in LETTERS]
    table[np.ix_(ids, ids)] *= 2
    trainer.reference.model.lm_head.weight = mx.array(table)
    return trainer, *trainer.make_experience(rollouts(offset))


@pytest.mark.parametrize(
    ("estimator", "slope"),
    [
        # d/d log π of each estimator at ratio 1; the ratio's own slope adds k3 to that of k3.
        ("k2", lambda d: d),
        ("mse", lambda d: d),
        ("k3", lambda d: d),
        ("k3_plain", lambda d: 1 - np.exp(-d)),
        ("abs", np.sign),
    ],
)
@pytest.mark.parametrize("corrected", [False, True])
def test_each_estimator_in_the_loss_pulls_as_it_should(
    tmp_path: Path, estimator: str, slope: Any, corrected: bool
) -> None:
    options = {"importance_correction": "token_truncate"} if corrected else {}
    trainer, experience, _ = from_another_reference(
        tmp_path, offset=0.1, kl_coef=0.5, kl_estimator=estimator, allow_biased_kl=True, **options
    )
    found = gradient(trainer, experience._replace(advantages=mx.zeros_like(experience.advantages)))
    w = [np.exp(-0.1 * (row + 1)) if corrected else 1.0 for row, _, _ in tokens()]
    pulls = [-0.5 * wt * float(slope(d)) for wt, d in zip(w, log_ratios(), strict=True)]
    np.testing.assert_allclose(found, expected(pulls, FIXED), atol=1e-6)


def test_k3_takes_its_ratio_from_the_sampler_where_the_loss_does(tmp_path: Path) -> None:
    """d/d log π of r k3 is r d."""
    trainer, experience, _ = from_another_reference(
        tmp_path, offset=0.1, kl_coef=0.5, kl_estimator="k3", old_logprobs_from="rollout"
    )
    found = gradient(trainer, experience._replace(advantages=mx.zeros_like(experience.advantages)))
    ratios = [np.exp(-0.1 * (row + 1)) for row, _, _ in tokens()]
    pulls = [-0.5 * r * d for r, d in zip(ratios, log_ratios(), strict=True)]
    np.testing.assert_allclose(found, expected(pulls, FIXED), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_exact_kl_in_the_loss_has_its_exact_gradient(tmp_path: Path, temperature: float) -> None:
    """dKL/dz_j = p_j (log p_j - log q_j - KL) / temperature, at the states of all sampled tokens."""
    trainer, experience, _ = from_another_reference(
        tmp_path, kl_coef=0.5, kl_estimator="full", temperature=temperature
    )
    found = gradient(trainer, experience._replace(advantages=mx.zeros_like(experience.advantages)))
    by_hand = np.zeros((4, 4))
    for _, x, _ in tokens():
        p, q = at(temperature, probabilities(x)), at(temperature, colder(x))
        log_ratio = np.log(p / q)
        pull = p * (log_ratio - (p * log_ratio).sum()) / temperature
        by_hand[:, LETTERS.index(x)] += 0.5 * pull / FIXED
    np.testing.assert_allclose(found, by_hand, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "value"),
    [
        ("k1", lambda d, x: d),
        ("k2", lambda d, x: d * d / 2),
        ("mse", lambda d, x: d * d / 2),
        ("k3", lambda d, x: np.exp(-d) - 1 + d),
        ("abs", lambda d, x: abs(d)),
        ("full", lambda d, x: exact_kl(x)),
    ],
)
def test_each_estimator_in_the_reward_is_taken_off_token_by_token(
    tmp_path: Path, estimator: str, value: Any
) -> None:
    """Credit is the rewards still to come, so their differences are the rewards."""
    _, experience, metrics = from_another_reference(
        tmp_path,
        algorithm="reinforce_pp",
        whiten_advantages=False,
        kl_coef=0.5,
        kl_estimator=estimator,
        allow_biased_kl=True,
    )
    to_go, mask = np.array(experience.advantages), np.array(experience.mask)
    rewards = np.concatenate([-np.diff(np.append(a[m], 0.0)) for a, m in zip(to_go, mask, strict=True)])
    kl = [value(d, x) for d, (_, x, _) in zip(log_ratios(), tokens(), strict=True)]
    scores = np.concatenate(
        [[0.0] * (len(text) - 1) + [score] for text, score in zip(TEXTS, SCORES, strict=True)]
    )
    np.testing.assert_allclose(rewards, scores - 0.5 * np.array(kl), atol=1e-5)
    # What is told, and steered by, is k1 whatever is optimised.
    assert metrics["objective/kl"] == pytest.approx(sum(log_ratios()) / 6, rel=1e-4)


@pytest.mark.parametrize(("algorithm", "estimator"), [("rloo", "k1"), ("grpo", "k3"), ("grpo", "full")])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_the_controller_hears_the_kl_of_a_step_in_its_unit(
    tmp_path: Path, algorithm: str, estimator: str, unit: str
) -> None:
    """13 tokens in 6 rows; the KL is 10 % above its target in one unit and far from it in the other."""
    true = sum(log_ratios()) / (6 if unit == "sequence" else N)
    trainer, experience, made = from_another_reference(
        tmp_path,
        algorithm=algorithm,
        kl_coef=0.2,
        kl_estimator=estimator,
        kl_target=true / 1.1,
        kl_unit=unit,
        kl_horizon=60,
        num_epochs_per_rollout=1,
    )
    metrics = trainer.update(experience) | made
    assert metrics["objective/kl"] == pytest.approx(sum(log_ratios()) / 6, rel=1e-4)
    assert metrics["objective/kl_per_token"] == pytest.approx(sum(log_ratios()) / N, rel=1e-4)
    k3 = float(np.mean([np.exp(-d) - 1 + d for d in log_ratios()]))
    assert metrics["kl"] == pytest.approx(
        k3, rel=1e-4
    )  # whatever the estimator is, and wherever it is placed
    terms = {"k3": k3, "full": float(np.mean([exact_kl(x) for _, x, _ in tokens()]))}
    in_loss = {"loss/kl_avg": terms[estimator]} if estimator in terms else {}
    assert {n: x for n, x in metrics.items() if n == "loss/kl_avg"} == pytest.approx(in_loss, rel=1e-4)
    trainer._adapt_kl(metrics, 6)
    assert trainer.kl_controller.value == pytest.approx(0.2 * (1 + 0.1 * 6 / 60), rel=1e-5)


def test_the_kl_of_an_evaluation_is_that_of_whole_answers(tmp_path: Path) -> None:
    trainer, _, _ = from_another_reference(tmp_path)
    found = trainer.evaluate(["a", "b", "c"])
    answers = [(before, record["completion"]) for before, record in zip("abc", found["samples"], strict=True)]
    pairs = [pair for before, text in answers for pair in zip(before + text[:-1], text, strict=True)]
    assert len(pairs) == 3 * 4
    total = sum(logprob(x, y) - float(np.log(colder(x)[LETTERS.index(y)])) for x, y in pairs)
    assert found["objective/kl"] == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_is_that_of_the_distribution_sampled_from(tmp_path: Path, temperature: float) -> None:
    trainer, experience = make(tmp_path, temperature=temperature, entropy_coef=0.7)
    plain = gradient(*make(tmp_path, temperature=temperature))
    found = gradient(trainer, experience) - plain
    by_hand, total = np.zeros((4, 4)), 0.0
    for _, x, _ in tokens():
        p = at(temperature, probabilities(x))
        h = -(p * np.log(p)).sum()
        by_hand[:, LETTERS.index(x)] += 0.7 * p * (np.log(p) + h) / temperature / N
        total += h
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    metrics = trainer._build_updater(1).update(experience, 1)
    assert metrics["entropy"] == pytest.approx(total / N, rel=1e-4)


# When updates end, or are not made ---------------------------------------------------------------------------


def table_after(
    folder: Path, *, praised: bool = False, **options: Any
) -> tuple[np.ndarray, dict[str, float]]:
    """The weights after the updates on one batch; ``praised``: every advantage is 1."""
    trainer, experience = make(folder, learning_rate=0.05, **options)
    if praised:
        experience = experience._replace(advantages=experience.mask.astype(mx.float32))
    metrics = trainer._build_updater(1).update(experience, 1)
    return np.array(trainer.policy.model.lm_head.weight), metrics


def test_target_kl_keeps_the_update_that_passed_it_and_makes_no_other(tmp_path: Path) -> None:
    """The first update is at a KL of 0, the second finds the policy moved: two of five are made."""
    stopped, metrics = table_after(tmp_path, num_epochs_per_rollout=5, target_kl=1e-6)
    assert metrics["num_updates"] == 2
    two, _ = table_after(tmp_path, num_epochs_per_rollout=2)
    five, _ = table_after(tmp_path, num_epochs_per_rollout=5)
    np.testing.assert_array_equal(stopped, two)
    assert np.abs(five - two).max() > 1e-2
    unbothered, metrics = table_after(tmp_path, num_epochs_per_rollout=5, target_kl=1e3)
    assert metrics["num_updates"] == 5
    np.testing.assert_array_equal(unbothered, five)


def test_target_kl_is_a_mean_per_token(tmp_path: Path) -> None:
    """Just below the KL that the second update finds it ends there, just above it goes on."""
    _, metrics = table_after(tmp_path, num_epochs_per_rollout=2)
    found = 2 * metrics["policy/approxkl_avg"]  # the first update's is 0
    for factor, updates in ((0.99, 2), (1.01, 3)):
        _, metrics = table_after(tmp_path, num_epochs_per_rollout=3, target_kl=factor * found)
        assert metrics["num_updates"] == updates


def test_a_rejected_update_leaves_weights_and_optimiser_as_they_were(tmp_path: Path) -> None:
    """After one step towards all sampled tokens they are likelier than before: the mean ratio is above 1."""
    once, _ = table_after(tmp_path, praised=True, num_epochs_per_rollout=1)
    held, metrics = table_after(tmp_path, praised=True, num_epochs_per_rollout=4, ratio_threshold=1.001)
    free, freely = table_after(tmp_path, praised=True, num_epochs_per_rollout=4)
    assert freely["val/ratio"] > 1.01
    assert freely["rejected_updates"] == 0
    assert (metrics["rejected_updates"], metrics["skipped_updates"]) == (3, 0)
    np.testing.assert_array_equal(held, once)
    assert np.abs(free - once).max() > 1e-2


def test_after_a_rejected_minibatch_the_next_is_still_at_a_ratio_of_one(tmp_path: Path) -> None:
    """Every minibatch of these is refused (a mean of 1 is above 0.9), so none of them finds a policy that moved."""
    table, metrics = table_after(tmp_path, num_epochs_per_rollout=2, minibatch_size=2, ratio_threshold=0.9)
    assert metrics["rejected_updates"] == 6
    assert (metrics["val/ratio_min"], metrics["val/ratio_max"]) == (1, 1)
    start, _ = make(tmp_path)
    np.testing.assert_array_equal(table, np.array(start.policy.model.lm_head.weight))


# On policy -------------------------------------------------------------------------------------------------


def test_on_policy_the_sampler_and_the_trainer_agree(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, off_policy_mask_threshold=0.01, importance_correction="token_mask")
    sampled = trainer.generate([Prompt(0, "a", (token_id("a"),), {}), Prompt(1, "b", (token_id("b"),), {})])
    experience, _ = trainer.make_experience(sampled)
    metrics = trainer.update(experience)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0, abs=1e-6)
    for name in ("mean", "min", "max"):
        assert metrics[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1, abs=1e-6)
    assert metrics["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-6)
    assert metrics["off_policy/dropped_fraction"] == 0


def test_the_mismatch_is_measured_before_the_first_update_alone(tmp_path: Path) -> None:
    """Five epochs take the policy away from the sampler; what is told is where it was."""
    _, metrics = table_after(tmp_path, num_epochs_per_rollout=5)
    assert metrics["val/ratio_max"] > 1.05
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_what_the_correction_and_the_mask_leave_out_stays_in_the_denominator(
    tmp_path: Path, reduction: str
) -> None:
    """Rows 0 to 2 have weights above 0.7; a mean over what is left would be larger."""
    found = gradient(
        *make(
            tmp_path,
            offset=0.1,
            reduction=reduction,
            importance_correction="token_mask",
            importance_floor=0.7,
            off_policy_mask_threshold=0.15,
        )
    )
    weighted = []
    for a, (row, _, _) in zip(advantages(), tokens(), strict=True):
        w, away = np.exp(-0.1 * (row + 1)), 0.1 * (row + 1)
        kept = w >= 0.7 and not (a < 0 and away > 0.15)
        weighted.append(a * w * kept / (N if reduction == "token_mean" else 6 * len(TEXTS[row])))
    assert any(weighted)
    np.testing.assert_allclose(found, expected(weighted, 1.0), atol=1e-6)


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigurationError, match="logit_bias: token 99999 is not in the model's"):
        make(tmp_path, logit_bias={99999: 1.0}, importance_correction="token_truncate")


def test_a_bias_that_forbids_every_token_is_refused_before_training(tmp_path: Path) -> None:
    size = table_model(TABLE, LETTERS).config["vocab_size"]
    with pytest.raises(InvalidConfigurationError, match=f"logit_bias: all of the model's {size} tokens"):
        make(
            tmp_path,
            logit_bias=dict.fromkeys(range(size), -np.inf),
            importance_correction="token_truncate",
        )
