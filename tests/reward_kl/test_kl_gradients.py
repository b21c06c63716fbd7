"""Which KL a training run minimises depends on the estimator AND on where it stands.

Over a small vocabulary the expectation over samples is a sum, so the expected gradient with respect to the
logits can be computed exactly and compared with that of the true reverse KL, KL(pi || pi_ref). Each test
below is one cell of the table at the head of reward_kl/kl_divergence.py.
"""

import mlx.core as mx
import numpy as np
import pytest

from reward_kl.kl_divergence import kl_full, kl_per_token
from reward_kl.reward_computer import token_rewards
from training.policy_loss import importance_ratio, policy_loss

RNG = np.random.default_rng(3)
V = 12
LOGITS, REF_LOGITS, OLD_LOGITS = (mx.array(RNG.normal(size=(V,)).astype(np.float32)) for _ in range(3))
EVERY_TOKEN = mx.ones((V, 1), dtype=mx.bool_)  # V completions of one token: each token of the vocabulary once


def log_softmax(logits):
    return logits - mx.logsumexp(logits)


def logprobs_of_every_token(logits):
    return log_softmax(logits)[:, None]  # (V, 1)


REVERSE = np.array(mx.grad(lambda z: kl_full(z, REF_LOGITS))(LOGITS))
FORWARD = np.array(
    mx.grad(lambda z: mx.sum(mx.softmax(REF_LOGITS) * (log_softmax(REF_LOGITS) - log_softmax(z))))(LOGITS)
)


def expected_gradient(per_token_loss, sampler_logits):
    """Gradient of E over tokens y of the sampler of loss(y); the sampling probabilities are constants."""
    probabilities = mx.stop_gradient(mx.softmax(sampler_logits))[:, None]  # (V, 1)
    return np.array(mx.grad(lambda z: mx.sum(probabilities * per_token_loss(z)))(LOGITS))


def in_reward(estimator, old_logits):
    """The KL is subtracted from a reward of 0; the (unclipped) policy gradient does the rest."""

    def loss(z):
        logprobs, old = logprobs_of_every_token(z), logprobs_of_every_token(old_logits)
        kl = mx.stop_gradient(kl_per_token(logprobs, logprobs_of_every_token(REF_LOGITS), estimator))
        rewards = token_rewards(mx.zeros((V,)), kl, EVERY_TOKEN, kl_coef=1.0)
        return policy_loss(logprobs, old, rewards, EVERY_TOKEN, surrogate="unclipped")

    return expected_gradient(loss, old_logits)


def in_loss(estimator, old_logits, times_ratio):
    def loss(z):
        logprobs = logprobs_of_every_token(z)
        kl = kl_per_token(logprobs, logprobs_of_every_token(REF_LOGITS), estimator, mask=EVERY_TOKEN)
        if times_ratio:
            kl = kl * importance_ratio(logprobs, logprobs_of_every_token(old_logits), EVERY_TOKEN)
        return kl

    return expected_gradient(loss, old_logits)


def equal(gradient, other):
    return np.abs(gradient - other).max() < 2e-6


def test_the_two_divergences_differ_here():
    assert np.linalg.norm(REVERSE) > 0.1
    assert np.linalg.norm(REVERSE - FORWARD) > 0.05


@pytest.mark.parametrize("old_logits", [LOGITS, OLD_LOGITS], ids=["on-policy", "off-policy"])
def test_k1_in_the_reward_is_the_reverse_kl(old_logits):
    assert equal(in_reward("k1", old_logits), REVERSE)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_are_not(estimator):
    assert not equal(in_reward(estimator, LOGITS), REVERSE)


@pytest.mark.parametrize("old_logits", [LOGITS, OLD_LOGITS], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_times_the_ratio_in_the_loss_are_the_reverse_kl(estimator, old_logits):
    assert equal(in_loss(estimator, old_logits, times_ratio=True), REVERSE)


def test_plain_k3_in_the_loss_is_the_forward_kl():
    assert equal(in_loss("k3", LOGITS, times_ratio=False), FORWARD)


def test_k2_in_the_loss_is_the_reverse_kl_on_policy_only():
    assert equal(in_loss("k2", LOGITS, times_ratio=False), REVERSE)
    assert not equal(in_loss("k2", OLD_LOGITS, times_ratio=False), REVERSE)
    assert not equal(in_loss("k2", LOGITS, times_ratio=True), REVERSE)


def test_plain_k1_in_the_loss_does_nothing_at_all():
    assert np.abs(in_loss("k1", LOGITS, times_ratio=False)).max() < 1e-6
