"""The moments of all scores so far, and scores scaled by them."""

import json

import mlx.core as mx
import numpy as np
import pytest

from reward_kl.running_moments import RunningMoments


def merged(*batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(mx.array(np.asarray(batch, dtype=np.float32)))
    return moments


def test_two_batches_by_hand():
    """1, 3 and then 2, 6, 8: mean 20 / 5 = 4, squared distances 9 + 1 + 4 + 4 + 16 = 34, variance 34 / 4."""
    moments = merged([1, 3])
    assert (moments.count, moments.mean) == (2, 2.0)
    assert moments.std == pytest.approx(2**0.5, rel=1e-12)
    moments.update(mx.array([2.0, 6.0, 8.0]))
    assert (moments.count, moments.mean) == (5, pytest.approx(4.0, rel=1e-12))
    assert moments.std == pytest.approx(8.5**0.5, rel=1e-12)


def test_batches_of_any_size_are_as_good_as_one():
    """Sizes, means and deviations that differ: each would show a wrong weight in the merge."""
    rng = np.random.default_rng(0)
    batches = [
        rng.normal(mean, std, size).astype(np.float32)
        for mean, std, size in [(3, 1, 7), (-20, 0.1, 1), (0, 50, 64), (1000, 5, 2), (3, 3, 33)]
    ]
    moments = RunningMoments()
    for i, batch in enumerate(batches, start=1):
        moments.update(mx.array(batch))
        so_far = np.concatenate(batches[:i]).astype(np.float64)
        assert moments.count == len(so_far)
        assert moments.mean == pytest.approx(so_far.mean(), rel=1e-12)
        assert moments.std == pytest.approx(so_far.std(ddof=1), rel=1e-12)


def test_a_large_mean_does_not_eat_the_deviation():
    """1e6 + (0, 1, 2, 3) has the deviation of 0..3, sqrt(5 / 3); a sum of float32 squares would lose it."""
    moments = merged([1e6, 1e6 + 1], [1e6 + 2, 1e6 + 3])
    assert moments.std == pytest.approx((5 / 3) ** 0.5, rel=1e-9)
    assert moments.mean == 1e6 + 1.5


def test_unscorable_rows_do_not_count():
    nan = float("nan")
    moments = merged([nan, 1, nan, 3], [nan, nan], [], [2, 6, 8])
    assert (moments.count, moments.mean) == (5, pytest.approx(4.0, rel=1e-12))
    assert moments.std == pytest.approx(8.5**0.5, rel=1e-12)
    scaled = np.array(moments.scale(mx.array([nan, 4.0]), "norm"))
    assert np.isnan(scaled[0])
    assert scaled[1] == 0.0


@pytest.mark.parametrize("mode", ["std", "norm"])
def test_scaling_over_several_batches_uses_all_of_them(mode):
    """The batch first joins the moments and is then scaled by them."""
    rng = np.random.default_rng(1)
    batches = [rng.normal(5, 3, size).astype(np.float32) for size in (4, 9, 2)]
    moments = RunningMoments()
    for i, batch in enumerate(batches, start=1):
        moments.update(mx.array(batch))
        scaled = moments.scale(mx.array(batch), mode)
        so_far = np.concatenate(batches[:i]).astype(np.float64)
        shift = so_far.mean() if mode == "norm" else 0.0
        np.testing.assert_allclose(
            np.array(scaled), (batch - shift) / so_far.std(ddof=1), rtol=1e-5, atol=1e-6
        )
        assert scaled.dtype == mx.float32


def test_equal_scores_are_not_divided():
    """0.1 is not exact in binary: a merge that rounds would leave a tiny deviation to divide by."""
    moments = merged([0.1, 0.1, 0.1], [0.1] * 7, [0.1])
    assert moments.std == 0.0
    scores = np.array([0.1, 5.0], dtype=np.float32)
    assert np.array(moments.scale(mx.array(scores), "std")).tolist() == scores.tolist()
    assert np.array(moments.scale(mx.array(scores), "norm"))[0] == 0.0


@pytest.mark.parametrize("batches", [[], [[3.0]]])
def test_one_score_or_none_has_no_deviation(batches):
    moments = merged(*batches)
    assert moments.std == 0.0
    assert np.array(moments.scale(mx.array([4.0]), "std")).tolist() == [4.0]
    assert np.array(moments.scale(mx.array([4.0]), "norm")).tolist() == [4.0 - sum(map(sum, batches))]


def test_epsilon_bounds_what_a_tiny_deviation_does():
    """Deviation sqrt(2) / 2 * 1e-12 against an epsilon of 1e-8: divided by the latter, within float32."""
    scores = mx.array([0.0, 1e-12])
    moments = merged([0.0, 1e-12])
    assert 0 < moments.std < 1e-11
    np.testing.assert_allclose(np.array(moments.scale(scores, "std")), [0.0, 1e-4], rtol=1e-3)


def test_scaling_changes_no_state():
    moments = merged([1, 3])
    before = moments.state_dict()
    moments.scale(mx.array([100.0, 200.0]), "norm")
    assert moments.state_dict() == before


def test_restored_moments_go_on_as_if_never_interrupted():
    straight = merged([1, 3, 0.1], [2, 6, 8])
    resumed = RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(merged([1, 3, 0.1]).state_dict())))
    assert isinstance(resumed.count, int)
    resumed.update(mx.array([2.0, 6.0, 8.0]))
    assert resumed.state_dict() == straight.state_dict()
    assert (resumed.count, resumed.mean, resumed.std) == (straight.count, straight.mean, straight.std)


def test_half_precision_scores_are_merged_in_float64():
    moments = RunningMoments()
    for _ in range(2):
        moments.update(mx.array([2048.0, 2050.0], dtype=mx.float16))
    assert moments.mean == 2049.0  # which float16 cannot hold
    assert moments.std == pytest.approx((4 / 3) ** 0.5, rel=1e-12)
    assert moments.scale(mx.array([2048.0], dtype=mx.float16), "norm").dtype == mx.float32


@pytest.mark.parametrize("infinite", [float("inf"), -float("inf")])
def test_an_infinite_score_is_refused_and_leaves_no_trace(infinite):
    moments = merged([1, 3])
    before = moments.state_dict()
    with pytest.raises(ValueError, match="infinite"):
        moments.update(mx.array([2.0, infinite]))
    assert moments.state_dict() == before


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"scores.*\(2, 3\)"):
        RunningMoments().update(mx.zeros((2, 3)))
    with pytest.raises(ValueError, match="'std' or 'norm', but it is 'none'"):
        RunningMoments().scale(mx.zeros((2,)), "none")
