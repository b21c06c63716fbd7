"""Bradley-Terry and DPO by hand, their symmetry, and their behaviour at the extremes."""

import mlx.core as mx
import numpy as np
import pytest

from training.preference_loss import bradley_terry_loss, dpo_loss, implicit_reward, preference_accuracy

RNG = np.random.default_rng(8)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = RNG.normal(size=(4, 6)).astype(np.float32)


def arrays(*xs):
    return tuple(mx.array(np.asarray(x, dtype=np.float32)) for x in xs)


def softplus(x):
    return np.log1p(np.exp(x))


def test_bradley_terry_by_hand():
    # sigmoid(log 3) = 3/4; a margin of log 3 is subtracted and leaves a coin toss
    log3 = np.log(3.0)
    assert np.isclose(bradley_terry_loss(*arrays([log3 + 1], [1.0])).item(), -np.log(0.75))
    assert np.isclose(bradley_terry_loss(*arrays([log3 + 1], [1.0], [log3])).item(), np.log(2.0))
    centred = bradley_terry_loss(*arrays([log3 + 1], [1.0]), centering=0.01).item()
    assert np.isclose(centred, -np.log(0.75) + 0.01 * (log3 + 2) ** 2)


def test_the_gradient_is_the_probability_of_being_wrong():
    gradient = mx.grad(bradley_terry_loss, argnums=(0, 1))(*arrays(CHOSEN, REJECTED))
    wrong = 1 / (1 + np.exp(CHOSEN - REJECTED))
    assert np.allclose(np.array(gradient[0]), -wrong / 6, atol=1e-6)
    assert np.allclose(np.array(gradient[1]), wrong / 6, atol=1e-6)


def test_swapping_the_pair_maps_delta_to_minus_delta():
    delta = CHOSEN - REJECTED
    assert np.isclose(
        bradley_terry_loss(*arrays(CHOSEN, REJECTED)).item(), softplus(-delta).mean(), atol=1e-6
    )
    assert np.isclose(bradley_terry_loss(*arrays(REJECTED, CHOSEN)).item(), softplus(delta).mean(), atol=1e-6)

    delta = 0.3 * ((CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED))
    straight = dpo_loss(*arrays(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED), beta=0.3)
    swapped = dpo_loss(*arrays(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN), beta=0.3)
    assert np.isclose(straight.item(), softplus(-delta).mean(), atol=1e-6)
    assert np.isclose(swapped.item(), softplus(delta).mean(), atol=1e-6)


def test_dpo_starts_at_log_two_and_its_reference_receives_no_gradient():
    case = arrays(CHOSEN, REJECTED, CHOSEN, REJECTED)
    assert np.isclose(dpo_loss(*case, beta=0.1).item(), np.log(2.0), atol=1e-7)
    gradients = mx.grad(lambda *logprobs: dpo_loss(*logprobs, beta=0.1), argnums=(0, 1, 2, 3))(*case)
    assert np.allclose(np.array(gradients[0]), -0.1 * 0.5 / 6)
    assert np.allclose(np.array(gradients[1]), 0.1 * 0.5 / 6)
    assert not np.array(gradients[2]).any()
    assert not np.array(gradients[3]).any()
    assert np.allclose(
        np.array(implicit_reward(*arrays(CHOSEN, REF_CHOSEN), 0.1)), 0.1 * (CHOSEN - REF_CHOSEN)
    )


def test_the_margin_receives_no_gradient():
    gradient = mx.grad(bradley_terry_loss, argnums=2)(*arrays(CHOSEN, REJECTED, REF_CHOSEN))
    assert not np.array(gradient).any()


def test_extreme_differences_stay_finite():
    chosen, rejected = arrays([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0])
    value, gradient = mx.value_and_grad(bradley_terry_loss)(chosen, rejected)
    assert np.isclose(value.item(), (0 + 2e4 + np.log(2)) / 3)
    assert np.allclose(np.array(gradient), [0.0, -1 / 3, -1 / 6])


def test_low_precision_scores_give_float32():
    low = [x.astype(mx.bfloat16) for x in arrays([0.25], [100.0])]
    loss = bradley_terry_loss(*low)
    assert loss.dtype == mx.float32
    assert loss.item() == 99.75  # bfloat16 would make it 100
    assert dpo_loss(*low, *arrays([0.0], [0.0]), beta=1.0).item() == 99.75


def test_micro_batches_add_up():
    whole = bradley_terry_loss(*arrays(CHOSEN, REJECTED), centering=0.1).item()
    parts = [
        bradley_terry_loss(*arrays(CHOSEN[i], REJECTED[i]), centering=0.1, denominator=6).item()
        for i in (slice(0, 1), slice(1, 6))
    ]
    assert np.isclose(sum(parts), whole, atol=1e-6)
    case = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    parts = [
        dpo_loss(*arrays(*(x[i] for x in case)), beta=0.3, denominator=6).item()
        for i in (slice(0, 4), slice(4, 6))
    ]
    assert np.isclose(sum(parts), dpo_loss(*arrays(*case), beta=0.3).item(), atol=1e-6)


def test_ties_count_as_half():
    assert preference_accuracy(*arrays([2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 2.0, 0.0])).item() == 0.5
    assert preference_accuracy(*arrays([2.0, 3.0, 1.0, 0.0], [1.0, 1.0, 2.0, 0.0])).item() == 0.625
    assert preference_accuracy(*arrays([2.0], [1.0]), denominator=4).item() == 0.25


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"chosen \(2,\), rejected \(3,\)"):
        bradley_terry_loss(mx.zeros((2,)), mx.zeros((3,)))
    with pytest.raises(ValueError, match=r"chosen \(2,\), margin \(3,\)"):
        bradley_terry_loss(mx.zeros((2,)), mx.zeros((2,)), mx.zeros((3,)))
    with pytest.raises(ValueError, match=r"logprobs \(2,\), ref_logprobs \(3,\)"):
        dpo_loss(mx.zeros((2,)), mx.zeros((2,)), mx.zeros((3,)), mx.zeros((2,)), 0.1)
