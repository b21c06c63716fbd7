"""What ties the rows of the table to each other, through advantages, loss and gradient of the whole pipeline.

The model is a table, the rollouts are made by hand, and the old logprobs are the current ones with noise, so that
ratios differ from 1 wherever an identity does not need them to be 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import ExperienceBuffer
from experience_buffer.data_structures import Prompt, Rollout
from ppo_trainer.algorithms import ALGORITHMS
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.tabular import table_model, token_id

LETTERS = "abcdefgh"
LONGEST = 6


class Step(NamedTuple):
    """What one optimiser step would be made of."""

    advantages: np.ndarray  # (B, T)
    mask: np.ndarray  # (B, T)
    loss: float
    gradient: np.ndarray  # of the table


def rollouts_of(lengths: Sequence[int], groups: int = 2, seed: int = 0) -> list[Rollout]:
    """One completion of each length per prompt, of letters drawn at random."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(groups):
        text = LETTERS[index]
        prompt = Prompt(index, text, (token_id(text),), {})
        for member, length in enumerate(lengths):
            letters = [LETTERS[i] for i in random.integers(0, len(LETTERS), size=length)]
            ids = tuple(token_id(letter) for letter in letters)
            made.append(Rollout(prompt, member, ids, (-2.0,) * length, True, "".join(letters)))
    return made


def some_scores(count: int, seed: int = 5) -> list[float]:
    return np.random.default_rng(seed).normal(size=count).round(3).tolist()


def take(
    folder: Path,
    algorithm: str,
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    *,
    noise: float = 0.3,
    micro: int | None = None,
    **options: Any,
) -> Step:
    """The loss of ``algorithm`` on these rollouts and its gradient, with old logprobs ``noise`` away."""
    by_row = iter(range(10**6))
    config = PPOConfig(
        algorithm=algorithm,
        model_name="embedded",
        fine_tune_type="full",
        max_new_tokens=LONGEST,
        output_dir=str(folder / f"run-{next(by_row)}-{np.random.default_rng().integers(1 << 60)}"),
        verbose=False,
        **{
            "group_size": 2,
            "num_epochs_per_rollout": 2,
            "kl_coef": 0.0,
            "gamma": 1.0,
            "overlong_buffer": 0.0,
            "allow_biased_kl": True,
            **options,
        },
    )
    random = np.random.default_rng(1)
    table = {letter: random.normal(size=len(LETTERS)).tolist() for letter in LETTERS}
    trainer = PPOTrainer(
        config,
        model=table_model(table, LETTERS),
        reward_model=lambda completions, **columns: list(scores)[: len(completions)],
    )
    experience, _ = trainer.make_experience(rollouts)
    assert experience.old_logprobs is not None

    def shifted(x: mx.array, seed: int) -> mx.array:
        away = np.random.default_rng(seed).normal(size=x.shape) * noise
        return mx.where(experience.mask, x + mx.array(away, dtype=mx.float32), 0.0)

    experience = experience._replace(old_logprobs=shifted(experience.old_logprobs, 2))
    if experience.ref_logprobs is not None:
        experience = experience._replace(ref_logprobs=shifted(experience.ref_logprobs, 3))
    objective = trainer._build_updater(1).objective
    (minibatch,) = ExperienceBuffer(experience, micro_batch_size=micro).minibatches(0)
    model = trainer.policy.model
    differentiate = nn.value_and_grad(model, lambda part: objective(part, minibatch, first=False)[0])
    total, gradients = 0.0, None
    for part in minibatch.micro_batches:
        loss, found = differentiate(part)
        total += float(loss)
        gradients = found if gradients is None else tree_map(mx.add, gradients, found)
    ((_, gradient),) = tree_flatten(gradients)
    return Step(np.array(experience.advantages), np.array(experience.mask), total, np.array(gradient))


def assert_proportional(one: Step, other: Step, factor: float) -> None:
    """``one`` is ``factor`` times ``other``, in loss and gradient, and neither is nothing."""
    assert np.abs(other.gradient).max() > 1e-3
    np.testing.assert_allclose(one.gradient, factor * other.gradient, atol=1e-5 * abs(factor), rtol=1e-4)
    np.testing.assert_allclose(one.loss, factor * other.loss, atol=1e-5 * abs(factor))


UNEVEN = [1, 3, 6, 2]
SCORES = some_scores(8)


def test_dapo_with_equal_clips_and_one_length_is_grpo(tmp_path: Path) -> None:
    rollouts = rollouts_of([4] * 4)
    grpo = take(tmp_path, "grpo", rollouts, SCORES)
    dapo = take(tmp_path, "dapo", rollouts, SCORES, clip_epsilon_high=0.2)
    assert_proportional(dapo, grpo, 1.0)
    uneven = rollouts_of(UNEVEN)
    assert not np.allclose(
        take(tmp_path, "dapo", uneven, SCORES, clip_epsilon_high=0.2).gradient,
        take(tmp_path, "grpo", uneven, SCORES).gradient,
        atol=1e-3,
    )


def test_dapo_clips_higher(tmp_path: Path) -> None:
    rollouts = rollouts_of(UNEVEN)
    dapo = take(tmp_path, "dapo", rollouts, SCORES)
    equal = take(tmp_path, "dapo", rollouts, SCORES, clip_epsilon_high=0.2)
    assert np.abs(dapo.gradient - equal.gradient).max() > 1e-3


def test_rloo_on_policy_is_centred_scores_times_g_over_g_minus_one(tmp_path: Path) -> None:
    """G = 4; Dr. GRPO divides each completion's tokens by their greatest number, 6."""
    rollouts = rollouts_of(UNEVEN)
    rloo = take(tmp_path, "rloo", rollouts, SCORES, noise=0.0)
    centred = take(tmp_path, "dr_grpo", rollouts, SCORES, noise=0.0)
    np.testing.assert_allclose(rloo.gradient, 4 / 3 * LONGEST * centred.gradient, atol=1e-5)
    assert np.abs(rloo.gradient).max() > 1e-2
    np.testing.assert_allclose(rloo.advantages, 4 / 3 * centred.advantages, atol=1e-6)


def test_gspo_with_answers_of_one_token_is_grpo(tmp_path: Path) -> None:
    rollouts = rollouts_of([1] * 4)
    clip = {"clip_epsilon": 0.2, "clip_epsilon_high": 0.2}
    assert_proportional(
        take(tmp_path, "gspo", rollouts, SCORES, **clip), take(tmp_path, "grpo", rollouts, SCORES), 1.0
    )


def test_luspo_with_answers_of_five_tokens_is_five_times_gspo(tmp_path: Path) -> None:
    rollouts = rollouts_of([5] * 4)
    clip = {"clip_epsilon": 0.1, "clip_epsilon_high": 0.1}
    luspo, gspo = (take(tmp_path, name, rollouts, SCORES, **clip) for name in ("luspo", "gspo"))
    assert_proportional(luspo, gspo, 5.0)


def test_cispo_inside_its_cap_has_the_gradient_of_the_unclipped_ratio(tmp_path: Path) -> None:
    """d(ratio) = ratio d(log π): REINFORCE's gradient times the ratio."""
    rollouts = rollouts_of(UNEVEN)
    cispo = take(tmp_path, "cispo", rollouts, SCORES, ratio_cap=1e6)
    plain = take(tmp_path, "dapo", rollouts, SCORES, surrogate="unclipped")
    np.testing.assert_allclose(cispo.gradient, plain.gradient, atol=1e-6)
    capped = take(tmp_path, "cispo", rollouts, SCORES, ratio_cap=1.0)
    assert np.abs(capped.gradient - cispo.gradient).max() > 1e-3


@pytest.mark.parametrize("name", ["grpo", "sapo", "gspo"])
def test_on_policy_every_bound_has_the_gradient_of_the_plain_ratio(tmp_path: Path, name: str) -> None:
    rollouts = rollouts_of(UNEVEN)
    bounded = take(tmp_path, name, rollouts, SCORES, noise=0.0)
    plain = take(tmp_path, "grpo", rollouts, SCORES, noise=0.0, surrogate="unclipped")
    np.testing.assert_allclose(bounded.gradient, plain.gradient, atol=1e-6)


def test_bnpo_in_one_micro_batch_is_dapos_loss_and_in_several_it_is_not(tmp_path: Path) -> None:
    rollouts = rollouts_of(UNEVEN)
    dapo = take(tmp_path, "dapo", rollouts, SCORES, clip_epsilon_high=0.2)
    assert_proportional(take(tmp_path, "bnpo", rollouts, SCORES), dapo, 1.0)
    split = take(tmp_path, "bnpo", rollouts, SCORES, micro=2)
    assert np.abs(split.gradient - dapo.gradient).max() > 1e-3


def test_gdpo_with_one_reward_is_grpo_rescaled(tmp_path: Path) -> None:
    """Normalised scores have a deviation over the batch of sqrt(6/7): two groups lose a degree of freedom each."""
    rollouts = rollouts_of(UNEVEN)
    gdpo, grpo = (take(tmp_path, n, rollouts, SCORES, advantage_epsilon=0.0) for n in ("gdpo", "grpo"))
    np.testing.assert_allclose(gdpo.advantages, grpo.advantages / np.sqrt(6 / 7), atol=1e-5)


def test_opo_with_one_length_has_dr_grpos_advantages_and_with_several_its_own(tmp_path: Path) -> None:
    even, uneven = rollouts_of([4] * 4), rollouts_of(UNEVEN)
    opo, dr_grpo = (take(tmp_path, name, even, SCORES).advantages for name in ("opo", "dr_grpo"))
    np.testing.assert_allclose(opo, dr_grpo, atol=1e-6)
    found = take(tmp_path, "opo", uneven, SCORES)
    group = np.array(SCORES[:4])
    baseline = (np.array(UNEVEN) * group).sum() / 12
    np.testing.assert_allclose(
        found.advantages[:4].sum(axis=1) / np.array(UNEVEN), group - baseline, atol=1e-5
    )


def test_reinforce_on_one_prompt_has_rloos_advantages_and_on_policy_its_gradient(tmp_path: Path) -> None:
    rollouts = rollouts_of(UNEVEN, groups=1)
    reinforce, rloo = (
        take(tmp_path, name, rollouts, SCORES[:4], noise=0.0) for name in ("reinforce", "rloo")
    )
    np.testing.assert_allclose(reinforce.advantages, rloo.advantages, atol=1e-6)
    np.testing.assert_allclose(reinforce.gradient, rloo.gradient, atol=1e-6)


def test_reinforce_pp_is_ppo_with_values_of_zero(tmp_path: Path) -> None:
    """A fresh value head says 0; with lam = gamma = 1 GAE is then the reward-to-go."""
    rollouts = rollouts_of(UNEVEN)
    ppo = take(tmp_path, "ppo", rollouts, SCORES, lam=1.0)
    assert_proportional(take(tmp_path, "reinforce_pp", rollouts, SCORES), ppo, 1.0)
    white = ppo.advantages[ppo.mask]
    np.testing.assert_allclose([white.mean(), white.std(ddof=1)], [0, 1], atol=1e-5)


def test_reinforce_pp_baseline_centres_in_the_group_and_scales_over_the_batch(tmp_path: Path) -> None:
    rollouts = rollouts_of([2, 2, 2, 2])
    found = take(tmp_path, "reinforce_pp_baseline", rollouts, SCORES)
    groups = np.array(SCORES).reshape(2, 4)
    centred = np.repeat((groups - groups.mean(axis=1, keepdims=True)).ravel(), 2)  # each on two tokens
    np.testing.assert_allclose(found.advantages[found.mask], centred / centred.std(ddof=1), atol=1e-5)


def test_remax_subtracts_the_score_of_the_likeliest_answer(tmp_path: Path) -> None:
    """The reward function answers the greedy call too: one call for each, by the number of rows."""
    rollouts = rollouts_of(UNEVEN)
    config = PPOConfig(
        algorithm="remax",
        model_name="embedded",
        fine_tune_type="full",
        max_new_tokens=LONGEST,
        output_dir=str(tmp_path / "run"),
        verbose=False,
        kl_coef=0.0,
    )
    random = np.random.default_rng(1)
    table = {letter: random.normal(size=len(LETTERS)).tolist() for letter in LETTERS}
    seen: list[list[str]] = []

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        seen.append(list(completions))
        return SCORES if len(completions) == 8 else [0.25, -0.5]

    trainer = PPOTrainer(config, model=table_model(table, LETTERS), reward_model=reward)
    experience, _ = trainer.make_experience(rollouts)
    baseline = np.repeat([0.25, -0.5], 4)
    expected = (np.array(SCORES) - baseline)[:, None] * np.array(experience.mask)
    np.testing.assert_allclose(np.array(experience.advantages), expected, atol=1e-6)
    # The likeliest answer follows the largest logit from letter to letter.
    for prompt, answer in zip(LETTERS[:2], seen[1], strict=True):
        letter, chain = prompt, ""
        for _ in range(LONGEST):
            letter = LETTERS[int(np.argmax(table[letter]))]
            chain += letter
        assert answer == chain


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.needs_groups])
def test_equal_scores_in_a_group_give_a_gradient_of_exactly_zero(tmp_path: Path, name: str) -> None:
    rollouts = rollouts_of(UNEVEN)
    found = take(tmp_path, name, rollouts, [0.1] * 4 + [0.7] * 4)
    assert not found.advantages.any()
    assert not found.gradient.any()


@pytest.mark.parametrize(
    "name", [name for name, row in ALGORITHMS.items() if row.reduction != "micro_batch_mean"]
)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_one_by_eight_two_by_four_and_four_by_two_are_one_gradient(
    tmp_path: Path, name: str, kl_coef: float
) -> None:
    """Every row of the table that claims it, with the KL where it has it; lengths are uneven."""
    rollouts = rollouts_of(UNEVEN)
    whole, *parts = (
        take(tmp_path, name, rollouts, SCORES, micro=micro, kl_coef=kl_coef, entropy_coef=0.1)
        for micro in (None, 8, 4, 2)
    )
    assert np.abs(whole.gradient).max() > 1e-3
    for part in parts:
        np.testing.assert_allclose(part.gradient, whole.gradient, atol=1e-6)
        np.testing.assert_allclose(part.loss, whole.loss, atol=1e-5)
