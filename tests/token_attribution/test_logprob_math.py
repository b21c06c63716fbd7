"""Logprobs and entropies from logits, against float64 NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from token_attribution.logprob_computer import entropy_from_logits, logprobs_from_logits

RNG = np.random.default_rng(1)


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def test_two_tokens_by_hand():
    logits = mx.array([[0.0, np.log(3.0)]])  # probabilities 1/4, 3/4
    assert np.isclose(logprobs_from_logits(logits, mx.array([1])).item(), np.log(0.75))
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert np.isclose(entropy_from_logits(logits).item(), entropy)
    # At temperature 1/2 the odds are squared: 1/10, 9/10.
    assert np.isclose(logprobs_from_logits(logits, mx.array([0]), temperature=0.5).item(), np.log(0.1))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_against_numpy_at_any_leading_shape(shape, temperature):
    logits = RNG.normal(scale=3, size=(*shape, 11)).astype(np.float32)
    ids = RNG.integers(0, 11, size=shape)
    logp = log_softmax(logits.astype(np.float64) / temperature)
    chosen = np.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]

    result = logprobs_from_logits(mx.array(logits), mx.array(ids), temperature)
    entropy = entropy_from_logits(mx.array(logits), temperature)
    assert result.shape == shape
    assert entropy.shape == shape
    assert np.allclose(np.array(result), chosen, atol=2e-6)
    assert np.allclose(np.array(entropy), -(np.exp(logp) * logp).sum(axis=-1), atol=3e-6)


def test_bfloat16_logits_are_cast_before_the_logsumexp():
    logits = mx.array(RNG.normal(size=(5, 128))).astype(mx.bfloat16)
    ids = mx.array(RNG.integers(0, 128, size=(5,)))
    result = logprobs_from_logits(logits, ids, 0.7)
    assert result.dtype == mx.float32
    assert entropy_from_logits(logits).dtype == mx.float32
    exact = log_softmax(np.array(logits.astype(mx.float32), dtype=np.float64) / 0.7)
    assert np.allclose(np.array(result), exact[np.arange(5), np.array(ids)], atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_have_their_closed_forms(temperature):
    logits = RNG.normal(size=(3, 7)).astype(np.float32)
    ids = np.array([0, 6, 3])
    logp = log_softmax(logits.astype(np.float64) / temperature)
    p = np.exp(logp)

    gradient = mx.grad(lambda z: logprobs_from_logits(z, mx.array(ids), temperature).sum())(mx.array(logits))
    assert np.allclose(np.array(gradient), (np.eye(7)[ids] - p) / temperature, atol=1e-6)

    entropy = -(p * logp).sum(axis=-1, keepdims=True)
    gradient = mx.grad(lambda z: entropy_from_logits(z, temperature).sum())(mx.array(logits))
    assert np.allclose(np.array(gradient), -p * (logp + entropy) / temperature, atol=1e-6)


def test_a_forbidden_token_has_no_share_in_the_entropy():
    allowed = mx.array([[0.3, -1.0, 2.0]])
    logits = mx.array([[0.3, -1.0, 2.0, -np.inf]])
    assert np.isclose(entropy_from_logits(logits).item(), entropy_from_logits(allowed).item())
    gradient = np.array(mx.grad(lambda z: entropy_from_logits(z).sum())(logits))
    assert np.isfinite(gradient).all()
    assert gradient[0, 3] == 0
    assert logprobs_from_logits(logits, mx.array([3])).item() == -np.inf


def test_logits_far_from_zero_do_not_overflow():
    logits = mx.array([[1e4, 1e4 + 1.0], [-1e4, -1e4]])
    expected = [np.log(1 / (1 + np.e)), np.log(0.5)]
    assert np.allclose(np.array(logprobs_from_logits(logits, mx.array([0, 1]))), expected, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    logits = mx.zeros((2, 3))
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        logprobs_from_logits(logits, mx.array([0, 1]), temperature)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        entropy_from_logits(logits, temperature)


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) must be ids \(2, 4\)"):
        logprobs_from_logits(mx.zeros((2, 3, 5)), mx.zeros((2, 4), dtype=mx.int32))
