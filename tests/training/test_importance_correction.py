"""The sampler's weights: by hand, by enumeration of every completion, and blind to what the mask hides."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from training.importance_correction import (
    MismatchStatistics,
    effective_sample_size,
    importance_weights,
    mismatch_statistics,
)

RNG = np.random.default_rng(11)
MASK = np.array(
    [
        [False, True, True, True, False],
        [True, True, False, True, True],  # a hole
        [False, False, False, False, False],
        [False, False, True, False, False],  # one token
    ]
)
OLD = RNG.normal(-2.0, 0.5, size=MASK.shape).astype(np.float32)
SAMPLER = (OLD + RNG.normal(0.0, 0.5, size=MASK.shape)).astype(np.float32)
CORRECTIONS = ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def weights_of(old=OLD, sampler=SAMPLER, mask=MASK, mode="token_truncate", **options):
    return np.array(importance_weights(mx.array(old), mx.array(sampler), mx.array(mask), mode, **options))


def statistics_of(old=OLD, sampler=SAMPLER, mask=MASK):
    return mismatch_statistics(mx.array(old), mx.array(sampler), mx.array(mask))


# --- weights


def test_every_mode_by_hand():
    old = np.log(np.array([[0.5, 3.0, 2.0, 9.0], [0.5, 0.5, 4.0, 9.0]], dtype=np.float32))
    mask = np.array([[True, True, True, False], [True, True, True, False]])
    expected = {  # the sampler gave every token probability 1; the rows' products are 3 and 1
        "none": [[1, 1, 1, 0], [1, 1, 1, 0]],
        "token_truncate": [[0.6, 2.5, 2, 0], [0.6, 0.6, 2.5, 0]],
        "token_mask": [[0, 0, 2, 0], [0, 0, 0, 0]],
        "sequence_truncate": [[2.5, 2.5, 2.5, 0], [1, 1, 1, 0]],
        "sequence_mask": [[0, 0, 0, 0], [1, 1, 1, 0]],
    }
    for mode, values in expected.items():
        weights = weights_of(old, np.zeros_like(old), mask, mode, cap=2.5, floor=0.6)
        assert weights.dtype == np.float32
        assert np.allclose(weights, values, atol=1e-6), mode


def test_the_bounds_themselves_are_within():
    old = np.log(np.array([[0.5, 2.0]]))
    assert np.allclose(
        weights_of(old, np.zeros((1, 2)), np.ones((1, 2), dtype=bool), "token_mask", cap=2.001, floor=0.499),
        [[0.5, 2.0]],
    )
    exact = weights_of(
        np.zeros((1, 1)), np.zeros((1, 1)), np.array([[True]]), "token_mask", cap=1.0, floor=1.0
    )
    assert exact.item() == 1.0


def test_the_default_is_a_cap_of_two_and_no_floor():
    old = np.log(np.array([[1e-6, 1.9, 2.1]], dtype=np.float32))
    weights = weights_of(old, np.zeros_like(old), np.ones((1, 3), dtype=bool), "token_truncate")
    assert np.allclose(weights, [[1e-6, 1.9, 2.0]], rtol=1e-5)


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_without_a_mismatch_every_weight_is_one(mode):
    assert (weights_of(OLD, OLD, mode=mode) == MASK).all()


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_with_one_token_the_two_levels_are_the_same(how):
    mask = np.eye(4, 5, dtype=bool)
    old = np.log(np.array([0.5, 0.95, 1.1, 1.5]))[:, None] * np.ones(5)
    token, sequence = (
        weights_of(old, np.zeros((4, 5)), mask, f"{level}_{how}", cap=1.2, floor=0.9)
        for level in ("token", "sequence")
    )
    assert (token == sequence).all()
    low, high = (0.9, 1.2) if how == "truncate" else (0.0, 0.0)
    assert np.allclose(token[mask], [low, 0.95, 1.1, high])


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e4])
def test_garbage_at_masked_positions(mode, garbage):
    old, sampler = (np.where(MASK, x, np.float32(garbage)) for x in (OLD, SAMPLER))
    clean = weights_of(mode=mode, cap=1.5)
    for dirty in (weights_of(old, mode=mode, cap=1.5), weights_of(old, sampler, mode=mode, cap=1.5)):
        assert (dirty == clean).all()
    assert (clean[~MASK] == 0).all()


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_no_gradient_flows(mode):
    def total(old, sampler):
        return importance_weights(old, sampler, mx.array(MASK), mode, cap=50.0).sum()

    for gradient in mx.grad(total, argnums=(0, 1))(mx.array(OLD), mx.array(SAMPLER)):
        assert not np.array(gradient).any()


def test_far_apart_stays_finite():
    one = np.ones((2, 3), dtype=bool)
    old = np.array([[30.0] * 3, [-30.0] * 3], dtype=np.float32)
    for mode in CORRECTIONS[1:]:
        weights = weights_of(old, np.zeros_like(old), one, mode, cap=1e9)
        assert np.allclose(weights, np.exp([[20.0], [-20.0]]), rtol=1e-5)


# --- expectations, over every completion of three tokens that two policies can write

VOCABULARY, LENGTH = 3, 3


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def every_completion():
    """All 27 completions, their logprobs per token under two policies, and a reward for each: float64."""
    pi, mu = log_softmax(RNG.normal(0, 0.2, size=(2, LENGTH, VOCABULARY)))
    completions = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # (27, 3)
    steps = np.arange(LENGTH)
    return pi[steps, completions], mu[steps, completions], RNG.normal(size=len(completions))


def test_the_sequence_weights_make_expectations_right():
    """E_mu[w f] = E_pi[f] while the cap is out of reach, and not without the weights."""
    pi, mu, rewards = every_completion()
    probability = np.exp(mu.sum(axis=1))
    truth = np.exp(pi.sum(axis=1)) @ rewards
    weights = weights_of(pi, mu, np.ones(pi.shape, dtype=bool), "sequence_truncate", cap=100.0)
    assert np.isclose(probability @ (weights[:, 0] * rewards), truth, atol=1e-6)
    assert abs(probability @ rewards - truth) > 0.005
    masked = weights_of(pi, mu, np.ones(pi.shape, dtype=bool), "sequence_mask", cap=100.0)
    assert (masked == weights).all()


def test_the_token_weights_make_the_expectation_of_a_token_right():
    """One step: E_mu[w f(y)] = E_pi[f(y)] at each position; and a cap within reach biases towards mu."""
    pi, mu = log_softmax(RNG.normal(0, 0.5, size=(2, LENGTH, VOCABULARY)))
    f = RNG.uniform(1.0, 2.0, size=(LENGTH, VOCABULARY))  # positive, so that a cap can only take away
    all_true = np.ones(pi.shape, dtype=bool)  # here a row is a position, a column a possible token
    weights = weights_of(pi, mu, all_true, "token_truncate", cap=100.0)
    truth = (np.exp(pi) * f).sum(axis=1)
    assert np.allclose((np.exp(mu) * weights * f).sum(axis=1), truth, atol=1e-6)
    assert weights.max() > 1.2
    capped = weights_of(pi, mu, all_true, "token_truncate", cap=1.2)
    assert ((np.exp(mu) * capped * f).sum(axis=1) < truth).any()
    assert ((np.exp(mu) * capped * f).sum(axis=1) <= truth + 1e-6).all()


# --- statistics


def test_statistics_by_hand():
    old = np.log(np.array([[0.5, 1.0, 4.0, 100.0]], dtype=np.float32))
    statistics = statistics_of(old, np.zeros_like(old), np.array([[True, True, True, False]]))
    expected = {
        "token_count": 3,
        "abs_difference_sum": np.log(2) + np.log(4),
        "abs_difference_max": np.log(4),
        "weight_sum": 5.5,
        "weight_square_sum": 0.25 + 1 + 16,
        "weight_min": 0.5,
        "weight_max": 4.0,
    }
    assert set(expected) == set(MismatchStatistics._fields)
    for name, value in expected.items():
        assert getattr(statistics, name).item() == pytest.approx(value, abs=1e-5), name
    assert effective_sample_size(statistics).item() == pytest.approx(5.5**2 / (3 * 17.25))


def test_merged_statistics_are_those_of_the_whole():
    def part(rows):
        return statistics_of(OLD[rows], SAMPLER[rows], MASK[rows])

    merged = part(slice(0, 1))
    for i in range(1, 4):  # the third row is empty
        merged = merged.merge(part(slice(i, i + 1)))
    assert isinstance(merged, MismatchStatistics)
    assert np.allclose(merged, statistics_of(), atol=1e-5)
    assert np.allclose(part(slice(2, 3)).merge(merged), merged, atol=1e-6)


def test_statistics_see_no_garbage():
    for garbage in (np.nan, np.inf, -np.inf):
        old, sampler = (np.where(MASK, x, np.float32(garbage)) for x in (OLD, SAMPLER))
        assert np.allclose(statistics_of(old, sampler), statistics_of(), atol=0)


def test_over_no_tokens_nothing_is_wrong():
    statistics = statistics_of(mask=np.zeros(MASK.shape, dtype=bool))
    assert [x.item() for x in statistics] == [0, 0, 0, 0, 0, np.inf, -np.inf]
    assert effective_sample_size(statistics).item() == 1.0


def test_the_effective_sample_size_counts_the_weights_that_count():
    mask, flat = np.ones((1, 4), dtype=bool), np.zeros((1, 4), dtype=np.float32)
    for shift in (0.0, 3.0, -3.0):  # equal weights of any size
        assert effective_sample_size(statistics_of(flat + shift, flat, mask)).item() == pytest.approx(1.0)
    alone = np.array([[0.0, -20.0, -20.0, -20.0]], dtype=np.float32)
    assert effective_sample_size(statistics_of(alone, flat, mask)).item() == pytest.approx(0.25)
    extreme = np.full((1, 4), 500.0, dtype=np.float32)  # limited, so nothing overflows
    assert effective_sample_size(statistics_of(extreme, flat, mask)).item() == pytest.approx(1.0)
    share = effective_sample_size(statistics_of()).item()
    w = np.exp((OLD - SAMPLER).astype(np.float64))[MASK]
    assert share == pytest.approx(w.sum() ** 2 / (w.size * (w**2).sum()), abs=1e-6)
    assert 0 < share < 1


def test_statistics_and_weights_work_inside_a_compiled_step():
    case = tuple(map(mx.array, (OLD, SAMPLER, MASK)))
    assert np.allclose(mx.compile(lambda *x: mismatch_statistics(*x))(*case), statistics_of(), atol=1e-5)
    compiled = mx.compile(lambda *x: importance_weights(*x, "sequence_mask", cap=1.5))(*case)
    assert np.allclose(np.array(compiled), weights_of(mode="sequence_mask", cap=1.5), atol=1e-6)


# --- wrong arguments


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=", ".join(CORRECTIONS)):
        weights_of(mode="truncate")
    for options in ({"cap": 0.0}, {"cap": 1.0, "floor": 1.5}, {"floor": -0.1}, {"cap": float("nan")}):
        with pytest.raises(ValueError, match=r"cap .* must be greater than 0 and floor .* between 0 and cap"):
            weights_of(**options)
    for mode in CORRECTIONS:
        with pytest.raises(ValueError, match=r"logprobs \(4, 4\), behaviour_logprobs \(4, 5\)"):
            weights_of(OLD[:, :4], mode=mode)
