"""The values of the KL estimators, and the controllers of the coefficient."""

import mlx.core as mx
import numpy as np
import pytest

from reward_kl.kl_divergence import AdaptiveKLController, FixedKLController, kl_full, kl_per_token

RNG = np.random.default_rng(2)
MASK = np.array([[True, True, False, False], [False, True, True, False]])


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -0.5, 0.0]),
        ("k2", [0.125, 0.125, 0.0]),
        ("k3", [np.exp(-0.5) - 1 + 0.5, np.exp(0.5) - 1 - 0.5, 0.0]),
        ("abs", [0.5, 0.5, 0.0]),
        ("mse", [0.125, 0.125, 0.0]),
    ],
)
def test_by_hand(estimator, expected):
    logprobs, ref_logprobs = mx.array([[-1.0, -2.0, -3.0]]), mx.array([[-1.5, -1.5, -3.0]])
    assert np.allclose(np.array(kl_per_token(logprobs, ref_logprobs, estimator)), [expected], atol=1e-7)


def test_expectations_over_a_small_vocabulary():
    z, ref = RNG.normal(size=(2, 12))
    logp, ref_logp = log_softmax(z), log_softmax(ref)
    p, exact = np.exp(logp), (np.exp(logp) * (logp - ref_logp)).sum()

    def expectation(estimator):
        values = kl_per_token(mx.array(logp[None]), mx.array(ref_logp[None]), estimator)
        return (p * np.array(values)[0]).sum()

    assert np.isclose(expectation("k1"), exact, atol=1e-6)
    assert np.isclose(expectation("k3"), exact, atol=1e-6)
    assert abs(expectation("k2") - exact) > 0.01  # biased
    assert np.isclose(kl_full(mx.array(z), mx.array(ref)).item(), exact, atol=1e-6)


def test_k3_keeps_its_digits_near_zero_and_is_never_negative_elsewhere():
    small = mx.array([[1e-3, -1e-3, 1e-4]])
    k3 = np.array(kl_per_token(small, mx.zeros((1, 3)), "k3"), dtype=np.float64)
    d = np.array([1e-3, -1e-3, 1e-4])
    # The rounding of expm1 leaves a thousandth; exp - 1 would be off by several times the value.
    assert np.allclose(k3[0], d**2 / 2 - d**3 / 6, rtol=5e-3, atol=0)
    d = mx.array(RNG.normal(scale=5, size=(1, 100)))
    assert (np.array(kl_per_token(d, mx.zeros((1, 100)), "k3")) >= 0).all()


def test_k3_does_not_overflow():
    logprobs, ref_logprobs = mx.array([[-500.0, -1.0]]), mx.array([[-1.0, -500.0]])
    value, gradient = mx.value_and_grad(lambda x: kl_per_token(x, ref_logprobs, "k3").sum())(logprobs)
    assert np.isfinite(value.item())
    # Constant beyond the limit; on the other side the slope of k1.
    assert np.array(gradient).tolist() == [[0.0, 1.0]]
    assert kl_per_token(logprobs, ref_logprobs, "k3")[0, 1].item() == 498.0  # d - 1: nothing limited there


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e4])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "mse"])
def test_garbage_at_masked_positions(estimator, garbage):
    clean, ref = RNG.normal(size=(2, *MASK.shape)).astype(np.float32)
    dirty, dirty_ref = np.where(MASK, clean, garbage), np.where(MASK, ref, -garbage)

    def value_and_grad(x, ref):
        def total(x):
            return kl_per_token(x, mx.array(ref), estimator, mask=mx.array(MASK)).sum()

        value, gradient = mx.value_and_grad(total)(mx.array(x))
        return value.item(), np.array(gradient)

    value, gradient = value_and_grad(clean, ref)
    other_value, other_gradient = value_and_grad(dirty.astype(np.float32), dirty_ref.astype(np.float32))
    assert value == other_value
    assert (gradient == other_gradient).all()
    assert (gradient[~MASK] == 0).all()
    assert (gradient[MASK] != 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "mse"])
def test_the_reference_gets_no_gradient(estimator):
    logprobs = mx.array([[-1.0, -2.0]])
    gradient = mx.grad(lambda ref: kl_per_token(logprobs, ref, estimator).sum())(mx.array([[-1.5, -1.0]]))
    assert np.array(gradient).tolist() == [[0.0, 0.0]]
    gradient = mx.grad(lambda ref: kl_full(mx.array([0.0, 1.0]), ref))(mx.array([1.0, 0.0]))
    assert np.array(gradient).tolist() == [0.0, 0.0]


def test_bfloat16_is_subtracted_in_float32():
    logprobs, ref = mx.array([[-7.0]]).astype(mx.bfloat16), mx.array([[-7.01]])
    kl = kl_per_token(logprobs, ref)
    assert kl.dtype == mx.float32
    assert np.isclose(kl.item(), 0.01, atol=1e-5)


def test_kl_full_with_temperature_and_forbidden_tokens():
    z, ref = RNG.normal(size=(2, 3, 5, 8)).astype(np.float32)
    logp, ref_logp = log_softmax(z / 0.7), log_softmax(ref / 0.7)
    expected = (np.exp(logp) * (logp - ref_logp)).sum(axis=-1)
    assert np.allclose(np.array(kl_full(mx.array(z), mx.array(ref), 0.7)), expected, atol=1e-5)

    forbidden = mx.array([0.0, 1.0, -np.inf])
    value, gradient = mx.value_and_grad(lambda z: kl_full(z, mx.array([1.0, 0.0, -np.inf])))(forbidden)
    assert np.isclose(value.item(), kl_full(mx.array([0.0, 1.0]), mx.array([1.0, 0.0])).item())
    assert np.isfinite(np.array(gradient)).all()
    assert kl_full(mx.array([0.0, 0.0]), mx.array([0.0, -np.inf])).item() == np.inf


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="k1, k2, k3, abs, mse"):
        kl_per_token(mx.zeros((1, 1)), mx.zeros((1, 1)), "k4")
    with pytest.raises(ValueError, match=r"logprobs \(1, 2\), ref_logprobs \(1, 3\)"):
        kl_per_token(mx.zeros((1, 2)), mx.zeros((1, 3)), "k1")
    with pytest.raises(ValueError, match="temperature"):
        kl_full(mx.zeros((2,)), mx.zeros((2,)), 0.0)


def test_a_fixed_coefficient_stays():
    controller = FixedKLController(0.05)
    controller.update(100.0, 64)
    assert controller.value == 0.05
    assert controller.unit == "sequence"


def test_the_adaptive_controller_follows_ziegler():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    controller.update(6.6, 64)  # 10% too high
    assert np.isclose(controller.value, 0.2 * (1 + 0.1 * 64 / 10_000))
    controller.value = 0.2
    controller.update(60.0, 64)  # far too high: the error is limited to 20%
    assert np.isclose(controller.value, 0.2 * (1 + 0.2 * 64 / 10_000))
    controller.value = 0.2
    controller.update(0.0, 64)
    assert np.isclose(controller.value, 0.2 * (1 - 0.2 * 64 / 10_000))
    controller.value = 0.2
    controller.update(6.0, 64)
    assert controller.value == 0.2


def test_the_adaptive_controller_finds_the_coefficient_that_holds_the_target():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=200)
    for _ in range(200):
        controller.update(3.0 / controller.value, 64)  # a world in which the KL is 3 / coefficient
    assert np.isclose(controller.value, 0.5, rtol=1e-3)


def test_controllers_restore_their_state():
    for make in (lambda: FixedKLController(0.1), lambda: AdaptiveKLController(0.1, 6.0, 1000, unit="token")):
        controller, resumed = make(), make()
        controller.value = 0.123
        resumed.load_state_dict(controller.state_dict())
        assert resumed.value == 0.123
    assert resumed.unit == "token"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKLController(-0.1), "kl_coef"),
        (lambda: FixedKLController(float("nan")), "kl_coef"),
        (lambda: FixedKLController(0.1, unit="row"), "'sequence' or 'token'"),
        (lambda: AdaptiveKLController(0.1, target=0.0, horizon=10), "target"),
        (lambda: AdaptiveKLController(0.1, target=1.0, horizon=0), "horizon"),
        (lambda: AdaptiveKLController(0.1, target=1.0, horizon=10_000).update(float("nan"), 8), "KL of nan"),
        (
            lambda: AdaptiveKLController(0.1, target=1.0, horizon=10).update(1.0, 64),
            "horizon 10 is too short",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
