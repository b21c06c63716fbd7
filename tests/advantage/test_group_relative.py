"""Group comparisons against a loop over groups; shuffles, gaps, ties and singletons."""

import mlx.core as mx
import numpy as np
import pytest

from advantage.group_relative import (
    group_advantages,
    group_statistics,
    leave_one_out,
    length_weighted_advantages,
)

RNG = np.random.default_rng(5)
NAN = float("nan")
# Groups of 3, 4, 1 and 2, interleaved, with ids that are neither small nor sorted nor positive.
IDS = np.array([7, -3, 7, 900_001, -3, -3, 7, -3, 0, 0])
SCORES = RNG.normal(size=10).astype(np.float32)


def loop(scores, ids, scale, eps):
    scorable = ~np.isnan(scores)
    advantages = np.zeros(len(scores))
    for i in np.flatnonzero(scorable):
        group = scores[(ids == ids[i]) & scorable].astype(np.float64)
        others = scores[(ids == ids[i]) & scorable & (np.arange(len(ids)) != i)].astype(np.float64)
        if len(others) == 0:
            continue
        if scale == "leave_one_out":
            advantages[i] = scores[i] - others.mean()
            continue
        std = {"none": 1 - eps, "group": group.std(ddof=1), "batch": scores[scorable].std(ddof=1)}[scale]
        advantages[i] = (scores[i] - group.mean()) / (std + eps)
    return advantages


def compute(scores, ids, scale, eps=1e-4):
    scores, ids = mx.array(np.asarray(scores, dtype=np.float32)), mx.array(ids)
    return np.array(
        leave_one_out(scores, ids) if scale == "leave_one_out" else group_advantages(scores, ids, scale, eps)
    )


SCALES = ["group", "batch", "none", "leave_one_out"]


def test_one_right_answer_of_eight():
    scores = [1.0] + [0.0] * 7
    # mean 1/8; the Bessel variance is (49 + 7) / 64 / 7 = 1/8
    right, wrong = (7 / 8) / (np.sqrt(1 / 8) + 1e-4), (-1 / 8) / (np.sqrt(1 / 8) + 1e-4)
    assert np.allclose(compute(scores, np.zeros(8, dtype=int), "group"), [right] + [wrong] * 7)
    assert np.isclose(right, 2.474, atol=1e-3)
    assert np.allclose(compute(scores, np.zeros(8, dtype=int), "leave_one_out"), [1.0] + [-1 / 7] * 7)


@pytest.mark.parametrize("scale", SCALES)
def test_against_a_loop_over_groups(scale):
    assert np.allclose(compute(SCORES, IDS, scale), loop(SCORES, IDS, scale, 1e-4), atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_unscorable_rows_are_left_out_not_counted_as_zero(scale):
    scores = SCORES.copy()
    scores[[2, 4]] = NAN
    advantages = compute(scores, IDS, scale)
    assert (advantages[[2, 4]] == 0).all()
    assert np.allclose(advantages, loop(scores, IDS, scale, 1e-4), atol=1e-6)
    kept = ~np.isnan(scores)
    assert np.allclose(advantages[kept], compute(scores[kept], IDS[kept], scale), atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_shuffling_rows_with_their_ids_permutes_the_advantages(scale):
    order = RNG.permutation(10)
    assert np.allclose(
        compute(SCORES[order], IDS[order], scale), compute(SCORES, IDS, scale)[order], atol=1e-6
    )


@pytest.mark.parametrize("scale", SCALES)
def test_each_group_sums_to_zero(scale):
    advantages = compute(SCORES, IDS, scale)
    for group in np.unique(IDS):
        assert abs(advantages[group == IDS].sum()) < 1e-5


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("score", [0.1, -0.3, 1e6 / 3, 0.0])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_scores_are_exactly_zero(scale, score, size):
    scores, ids = np.append(np.full(size, score), [5.0, 6.0]), np.append(np.zeros(size, dtype=int), [1, 1])
    for eps in (1e-4, 0.0):
        assert (compute(scores, ids, scale, eps)[:size] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_singletons_and_wholly_unscorable_batches_are_zero(scale):
    assert compute([3.0, NAN, 5.0], np.array([0, 0, 1]), scale).tolist() == [0.0, 0.0, 0.0]
    assert compute([NAN, NAN], np.array([0, 1]), scale).tolist() == [0.0, 0.0]


def test_leave_one_out_is_grpo_without_std_times_g_over_g_minus_one():
    ids = np.repeat([4, 2], 5)
    assert np.allclose(compute(SCORES, ids, "leave_one_out"), compute(SCORES, ids, "none") * 5 / 4, atol=1e-6)


def test_batch_scale_divides_every_group_by_the_same():
    ratio = compute(SCORES, IDS, "none")[IDS != 900_001] / compute(SCORES, IDS, "batch")[IDS != 900_001]
    assert np.allclose(ratio, SCORES.std(ddof=1) + 1e-4, atol=1e-5)


# OPO: a baseline weighted by length ------------------------------------------------------------------------


def weighted(scores, lengths, ids):
    found = length_weighted_advantages(
        mx.array(np.asarray(scores, dtype=np.float32)),
        mx.array(np.asarray(lengths)),
        mx.array(np.asarray(ids)),
    )
    assert found.dtype == mx.float32
    return np.array(found)


def test_long_completions_weigh_more_in_the_baseline():
    """Baselines (1 * 1 + 3 * 5) / 4 = 4, where the plain mean is 3, and (2 * 10 + 2 * 30 + 6 * 0) / 10 = 8."""
    found = weighted([1, 10, 5, 30, 0], [1, 2, 3, 2, 6], [7, -3, 7, -3, -3])
    assert found == pytest.approx([-3.0, 2.0, 1.0, 22.0, -8.0], abs=1e-5)


def test_length_weights_against_a_loop_over_groups():
    lengths = np.array([3, 50, 1, 7, 2, 9, 120, 4, 1, 1])
    for gaps in ([], [2, 4], [3]):
        scores = SCORES.copy()
        scores[gaps] = NAN
        scorable, expected = ~np.isnan(scores), np.zeros(10)
        for i in np.flatnonzero(scorable):
            group = (IDS[i] == IDS) & scorable
            expected[i] = scores[i] - np.average(scores[group].astype(np.float64), weights=lengths[group])
        assert np.allclose(weighted(scores, lengths, IDS), expected, atol=1e-6)


def test_an_unscorable_row_has_no_weight_whatever_its_length():
    """Of 2, NaN and 6 with lengths 1, 1000 and 3 the baseline is (2 + 18) / 4 = 5."""
    assert weighted([2, NAN, 6], [1, 1000, 3], [0, 0, 0]).tolist() == [-3.0, 0.0, 1.0]
    assert weighted([NAN, NAN, 4], [5, 5, 5], [0, 0, 1]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("score", [0.1, -0.3, 1e6 / 3, 0.0])
def test_equal_scores_are_exactly_zero_whatever_their_lengths(score):
    found = weighted([score] * 7 + [5.0, 6.0], [1, 2, 3, 50, 7, 11, 13, 1, 2], [0] * 7 + [1, 1])
    assert (found[:7] == 0).all()
    assert found[7:] == pytest.approx([5 - 17 / 3, 6 - 17 / 3], abs=1e-6)


def test_equal_lengths_give_the_plain_mean():
    assert np.allclose(weighted(SCORES, np.full(10, 17), IDS), compute(SCORES, IDS, "none"), atol=1e-6)


def test_length_weighted_advantages_sum_to_zero_over_tokens():
    lengths = np.array([3, 50, 1, 7, 2, 9, 120, 4, 1, 1])
    found = weighted(SCORES, lengths, IDS)
    for group in np.unique(IDS):
        assert abs((found * lengths)[group == IDS].sum()) < 1e-4
    with pytest.raises(ValueError, match=r"scores \(2,\), lengths \(3,\)"):
        length_weighted_advantages(mx.zeros((2,)), mx.array([1, 2, 3]), mx.array([0, 0]))


def test_statistics():
    scores = mx.array([1.0, 3.0, NAN, 2.0, 2.0, 7.0, NAN])
    statistics = group_statistics(scores, mx.array([0, 0, 0, 1, 1, 2, 3]))
    assert np.allclose(np.array(statistics.mean), [2, 2, 2, 2, 2, 7, 0])
    root2 = np.sqrt(2.0)  # Bessel: ((1 - 2)^2 + (3 - 2)^2) / 1
    assert np.allclose(np.array(statistics.std), [root2, root2, root2, 0, 0, 0, 0])
    assert np.array(statistics.size).tolist() == [2, 2, 2, 2, 2, 1, 0]
    # Of the 5 scorable rows, the equal pair and the singleton.
    assert np.isclose(statistics.frac_zero_std.item(), 3 / 5)


def test_scores_of_low_precision_and_integers():
    ids = mx.array([0, 0, 1, 1])
    for dtype in (mx.bfloat16, mx.int32):
        advantages = group_advantages(mx.array([1, 3, 5, 5]).astype(dtype), ids, "none")
        assert advantages.dtype == mx.float32
        assert np.array(advantages).tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="group, batch, none"):
        group_advantages(mx.zeros((2,)), mx.array([0, 0]), "token")
    with pytest.raises(ValueError, match=r"scores \(2,\), group_ids \(3,\)"):
        leave_one_out(mx.zeros((2,)), mx.array([0, 0, 0]))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        group_statistics(mx.zeros((2, 2)), mx.zeros((2, 2), dtype=mx.int32))
