"""The doubling scan against a plain loop backwards in time, and the identities between its three users."""

import mlx.core as mx
import numpy as np
import pytest

from advantage.discounted_sum import masked_discounted_sum, next_true_value
from advantage.gae_advantage import gae
from advantage.reward_to_go import reward_to_go
from advantage.td_error import td_error

RNG = np.random.default_rng(4)


def random_case(rows, length):
    mask = RNG.random((rows, length)) < 0.7
    mask[-1] = False  # an empty row
    if rows > 1:
        mask[0] = True  # a full one
    rewards, values = RNG.normal(size=(2, rows, length)).astype(np.float32)
    return rewards, values, mask


def arrays(*xs):
    return tuple(mx.array(x) for x in xs)


def loop_discounted_sum(x, mask, discount):
    y = np.zeros(x.shape)
    for row in range(x.shape[0]):
        following = 0.0
        for t in reversed(range(x.shape[1])):
            if mask[row, t]:
                following = y[row, t] = x[row, t] + discount * following
    return y


def loop_gae(rewards, values, mask, gamma, lam):
    """The recursion that skips: on masked-out steps V_next and A_next stay what they are."""
    advantages = np.zeros(rewards.shape)
    for row in range(rewards.shape[0]):
        value_next = advantage_next = 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[row, t]:
                delta = rewards[row, t] + gamma * value_next - values[row, t]
                advantage_next = advantages[row, t] = delta + gamma * lam * advantage_next
                value_next = values[row, t]
    return advantages, np.where(mask, advantages + values, 0)


def test_by_hand_with_a_hole():
    x = mx.array([[1.0, 100.0, 2.0, 4.0, 100.0]])
    mask = mx.array([[True, False, True, True, False]])
    # 4, then 2 + 4/2 = 4, then the hole costs no discount: 1 + 4/2 = 3
    assert np.array(masked_discounted_sum(x, mask, 0.5)).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]
    assert np.array(next_true_value(x, mask)).tolist() == [[2.0, 2.0, 4.0, 0.0, 0.0]]


def test_gae_by_hand():
    rewards, values = mx.array([[0.0, 0.0, 1.0]]), mx.array([[0.25, 0.5, 0.5]])
    mask = mx.ones((1, 3), dtype=mx.bool_)
    # gamma 1/2: delta = 0 + .25 - .25, 0 + .25 - .5, 1 + 0 - .5; gamma * lam = 1/4
    assert np.array(td_error(rewards, values, mask, 0.5)).tolist() == [[0.0, -0.25, 0.5]]
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert np.array(advantages).tolist() == [[-0.03125, -0.125, 0.5]]  # -.25 + .5/4, and a quarter of that
    assert np.array(returns).tolist() == [[0.21875, 0.375, 1.0]]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("discount", [1.0, 0.95, 0.5, 0.0])
def test_the_scan_equals_the_loop_at_every_length(length, discount):
    x, _, mask = random_case(4, length)
    y = masked_discounted_sum(*arrays(x, mask), discount)
    assert y.dtype == mx.float32
    assert y.shape == x.shape
    assert np.allclose(np.array(y), loop_discounted_sum(x, mask, discount), atol=1e-5)
    assert (np.array(y)[~mask] == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_equals_the_loop(gamma, lam):
    rewards, values, mask = random_case(6, 33)
    advantages, returns = gae(*arrays(rewards, values, mask), gamma, lam)
    expected_advantages, expected_returns = loop_gae(rewards, values, mask, gamma, lam)
    assert np.allclose(np.array(advantages), expected_advantages, atol=1e-5)
    assert np.allclose(np.array(returns), expected_returns, atol=1e-5)


def test_lam_one_makes_the_returns_the_reward_to_go_whatever_the_values():
    rewards, values, mask = random_case(5, 40)
    for gamma in (1.0, 0.9):
        _, returns = gae(*arrays(rewards, 10 * values, mask), gamma, 1.0)
        expected = reward_to_go(*arrays(rewards, mask), gamma)
        assert np.allclose(np.array(returns), np.array(expected), atol=1e-4)


def test_lam_zero_is_the_td_error():
    case = arrays(*random_case(5, 40))
    assert np.array_equal(np.array(gae(*case, 0.9, 0.0)[0]), np.array(td_error(*case, 0.9)))


def test_values_of_zero_make_gae_a_reward_to_go_at_gamma_lam():
    rewards, _, mask = random_case(5, 40)
    advantages, _ = gae(*arrays(rewards, np.zeros_like(rewards), mask), 0.9, 0.5)
    assert np.allclose(np.array(advantages), np.array(reward_to_go(*arrays(rewards, mask), 0.45)), atol=1e-6)


def test_cutting_the_holes_out_changes_nothing():
    """A row with tool output in it is the same row without: holes neither decay nor bootstrap."""
    rewards, values, mask = random_case(1, 30)
    mask[0] = RNG.random(30) < 0.6
    kept = mask[0]
    advantages, returns = gae(*arrays(rewards, values, mask), 0.9, 0.8)
    compact = gae(*arrays(rewards[:, kept], values[:, kept], mask[:, kept]), 0.9, 0.8)
    assert np.allclose(np.array(advantages)[:, kept], np.array(compact[0]), atol=1e-6)
    assert np.allclose(np.array(returns)[:, kept], np.array(compact[1]), atol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_garbage_in_holes_and_padding(garbage):
    rewards, values, mask = random_case(4, 17)
    weights = mx.array(RNG.normal(size=(4, 17)).astype(np.float32))

    def value_and_grad(rewards, values):
        def total(rewards, values):
            advantages, returns = gae(rewards, values, mx.array(mask), 0.99, 0.9)
            to_go = reward_to_go(rewards, mx.array(mask), 0.9)
            return mx.sum(weights * (advantages + 2 * returns + to_go))

        value, gradients = mx.value_and_grad(total, argnums=(0, 1))(mx.array(rewards), mx.array(values))
        return value.item(), *(np.array(gradient) for gradient in gradients)

    clean = value_and_grad(rewards, values)
    dirty = value_and_grad(
        np.where(mask, rewards, garbage).astype(np.float32),
        np.where(mask, values, garbage).astype(np.float32),
    )
    assert clean[0] == dirty[0]
    for gradient, other in zip(clean[1:], dirty[1:], strict=True):
        assert (gradient == other).all()
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).all()


def test_an_all_masked_batch_is_all_zero():
    x = mx.full((2, 5), np.nan)
    advantages, returns = gae(x, x, mx.zeros((2, 5), dtype=mx.bool_), 0.9, 0.9)
    assert not np.array(advantages).any()
    assert not np.array(returns).any()


def test_bfloat16_values_are_summed_in_float32():
    rewards, values, mask = random_case(2, 200)
    low = mx.array(values).astype(mx.bfloat16)
    advantages, returns = gae(mx.array(rewards), low, mx.array(mask), 1.0, 1.0)
    assert advantages.dtype == mx.float32
    assert returns.dtype == mx.float32
    expected, _ = loop_gae(rewards, np.array(low.astype(mx.float32)), mask, 1.0, 1.0)
    assert np.allclose(np.array(advantages), expected, atol=1e-4)


def test_it_compiles():
    case = arrays(*random_case(3, 12))
    compiled = mx.compile(lambda rewards, values, mask: gae(rewards, values, mask, 0.9, 0.8))
    assert np.allclose(np.array(compiled(*case)[0]), np.array(gae(*case, 0.9, 0.8)[0]), atol=1e-6)


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), values \(2, 4\), mask \(2, 3\)"):
        gae(mx.zeros((2, 3)), mx.zeros((2, 4)), mx.ones((2, 3), dtype=mx.bool_), 1.0, 1.0)
