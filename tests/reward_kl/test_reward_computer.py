"""Scores and KL to rewards per token."""

import mlx.core as mx
import numpy as np
import pytest

from advantage.reward_to_go import reward_to_go
from reward_kl.reward_computer import (
    apply_missing_end_penalty,
    clip_scores,
    overlong_penalty,
    token_rewards,
    whiten_rewards,
)

MASK = np.array(
    [
        [False, True, True, False],  # prompt, two tokens, padding
        [True, False, True, True],  # a hole, and an end in the last slot
        [False, False, False, False],
        [True, False, False, False],
    ]
)
SCORES = np.array([10.0, 20.0, 30.0, 40.0], dtype=np.float32)
KL = np.arange(16, dtype=np.float32).reshape(4, 4)


def test_the_score_lands_on_the_last_sampled_token_and_the_kl_on_all():
    rewards = token_rewards(mx.array(SCORES), mx.array(KL), mx.array(MASK), kl_coef=0.5)
    expected = [
        [0.0, -0.5, 10 - 1.0, 0.0],
        [-2.0, 0.0, -3.0, 20 - 3.5],
        [0.0, 0.0, 0.0, 0.0],
        [40 - 6.0, 0.0, 0.0, 0.0],
    ]
    assert np.array(rewards).tolist() == expected
    assert rewards.dtype == mx.float32


def test_without_discount_and_kl_every_token_returns_the_score():
    rewards = token_rewards(mx.array(SCORES), None, mx.array(MASK), kl_coef=0.0)
    returns = np.array(reward_to_go(rewards, mx.array(MASK), gamma=1.0))
    assert (returns == np.where(MASK, SCORES[:, None], 0)).all()


def test_a_coefficient_in_an_array_serves_a_compiled_function():
    compiled = mx.compile(token_rewards)
    for kl_coef in (0.5, 0.25):
        rewards = compiled(mx.array(SCORES), mx.array(KL), mx.array(MASK), mx.array(kl_coef))
        eager = token_rewards(mx.array(SCORES), mx.array(KL), mx.array(MASK), kl_coef)
        assert np.array(rewards).tolist() == np.array(eager).tolist()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_garbage_in_padding_and_in_the_score_of_an_empty_row(garbage):
    clean = token_rewards(mx.array(SCORES), mx.array(KL), mx.array(MASK), 0.5)
    scores = np.where([False, False, True, False], garbage, SCORES).astype(np.float32)
    kl = np.where(MASK, KL, garbage).astype(np.float32)

    def total(kl):
        return token_rewards(mx.array(scores), kl, mx.array(MASK), 0.5).sum()

    assert (
        np.array(token_rewards(mx.array(scores), mx.array(kl), mx.array(MASK), 0.5)) == np.array(clean)
    ).all()
    assert np.array(mx.grad(total)(mx.array(kl))).tolist() == np.where(MASK, -0.5, 0).tolist()


def test_one_token_per_row():
    rewards = token_rewards(mx.array([1.0, 2.0]), mx.array([[3.0], [4.0]]), mx.array([[True], [False]]), 1.0)
    assert np.array(rewards).tolist() == [[-2.0], [0.0]]


def test_missing_end_penalty():
    scores, terminated = mx.array([1.0, 2.0, float("nan")]), mx.array([True, False, False])
    subtracted = np.array(apply_missing_end_penalty(scores, terminated, 0.5))
    assert subtracted[:2].tolist() == [1.0, 1.5]
    assert np.isnan(subtracted[2])
    replaced = apply_missing_end_penalty(scores, terminated, 1.0, mode="replace")
    assert np.array(replaced).tolist() == [1.0, -1.0, -1.0]


def test_clip_scores():
    scores = mx.array([-20.0, 3.0, 20.0, float("nan")])
    assert np.array(clip_scores(scores, -10, 10))[:3].tolist() == [-10.0, 3.0, 10.0]
    assert np.isnan(clip_scores(scores, -10, 10)[3].item())
    assert np.array(clip_scores(scores, None, 10))[:3].tolist() == [-20.0, 3.0, 10.0]
    assert np.array(clip_scores(scores, None, None))[:3].tolist() == [-20.0, 3.0, 20.0]


def test_whitened_rewards_keep_their_mean():
    rewards = np.where(MASK, KL, np.nan).astype(np.float32)
    whitened = np.array(whiten_rewards(mx.array(rewards), mx.array(MASK)))
    assert np.isclose(whitened[MASK].mean(), KL[MASK].mean(), atol=1e-5)
    assert np.isclose(whitened[MASK].var(ddof=1), 1.0, atol=1e-5)
    assert (whitened[~MASK] == 0).all()


def test_the_overlong_penalty_rises_over_the_buffer_and_stays_at_its_weight():
    """L = 10, c = 4, w = 1: free up to 6, then (6 - n) / 4, and -1 from 10 on."""
    lengths = mx.array([0, 5, 6, 7, 8, 9, 10, 11, 1000])
    penalty = overlong_penalty(lengths, 10, 4)
    assert np.array(penalty).tolist() == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert penalty.dtype == mx.float32
    half = overlong_penalty(lengths, 10, 4, weight=0.5)
    assert np.array(half).tolist() == [0, 0, 0, -0.125, -0.25, -0.375, -0.5, -0.5, -0.5]


def test_the_papers_overlong_penalty():
    """L = 20480 and c = 4096, so the free part ends at 16384; 3 quarters of the way from there is 19456."""
    penalty = overlong_penalty(mx.array([16384, 16385, 19456, 20480]), 20480, 4096)
    assert np.array(penalty).tolist() == [0, -1 / 4096, -0.75, -1]


def test_an_overlong_buffer_at_its_limits():
    lengths = mx.array([0, 9, 10, 11])
    assert np.array(overlong_penalty(lengths, 10, 0)).tolist() == [
        0,
        0,
        0,
        -1,
    ]  # nothing before L is exceeded
    whole = np.array(overlong_penalty(lengths, 10, 10))  # every token costs a tenth
    np.testing.assert_allclose(whole, [0, -0.9, -1, -1], rtol=1e-6)
    fractional = np.array(overlong_penalty(mx.array([7, 8, 10]), 10, 2.5))  # a share of L need not be whole
    np.testing.assert_allclose(fractional, [0, -0.2, -1], rtol=1e-6)  # (7.5 - 8) / 2.5
    assert np.array(overlong_penalty(lengths, 10, 4, weight=0.0)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_length": 0, "buffer": 0}, "max_length 0"),
        ({"buffer": 11}, "buffer 11"),
        ({"buffer": -1}, "buffer -1"),
        ({"buffer": float("nan")}, "buffer nan"),
        ({"weight": -0.5}, "weight.*-0.5"),
        ({"weight": float("inf")}, "weight.*inf"),  # inf * 0 would make a NaN of every short answer
        ({"weight": float("nan")}, "weight.*nan"),
        ({"lengths": mx.zeros((2, 1))}, r"lengths.*\(2, 1\)"),
    ],
)
def test_wrong_overlong_arguments_are_named(arguments, named):
    right = {"lengths": mx.array([1, 2]), "max_length": 10, "buffer": 4, "weight": 1.0}
    with pytest.raises(ValueError, match=named):
        overlong_penalty(**(right | arguments))


def test_wrong_arguments_are_named():
    mask = mx.ones((2, 3), dtype=mx.bool_)
    with pytest.raises(ValueError, match=r"scores \(3,\).*mask \(2, 3\)"):
        token_rewards(mx.zeros((3,)), None, mask, 0.0)
    with pytest.raises(ValueError, match=r"kl \(2, 4\), mask \(2, 3\)"):
        token_rewards(mx.zeros((2,)), mx.zeros((2, 4)), mask, 0.1)
    with pytest.raises(ValueError, match="'subtract' or 'replace'"):
        apply_missing_end_penalty(mx.zeros((2,)), mx.zeros((2,), dtype=mx.bool_), 1.0, mode="multiply")
    with pytest.raises(ValueError, match="penalty"):
        apply_missing_end_penalty(mx.zeros((2,)), mx.zeros((2,), dtype=mx.bool_), -1.0)
    with pytest.raises(ValueError, match="low"):
        clip_scores(mx.zeros((2,)), 1.0, -1.0)
