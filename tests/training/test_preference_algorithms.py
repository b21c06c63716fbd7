"""Each preference loss against its paper's formula in float64 NumPy, its gradient against differences, and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from training.preference_algorithms import PREFERENCE_ALGORITHMS, Answers, kto, kto_baseline, log_odds

LENGTHS_C, LENGTHS_R = np.array([3.0, 7.0, 1.0, 12.0]), np.array([5.0, 2.0, 4.0, 12.0])
RNG = np.random.default_rng(4)
#: Sums over the answers' tokens of one nat or so each.
C, R, REF_C, REF_R = (
    -n * RNG.uniform(0.2, 1.5, size=4) for n in (LENGTHS_C, LENGTHS_R, LENGTHS_C, LENGTHS_R)
)


def sigma(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def odds(logp: Any) -> Any:
    p = np.exp(logp)
    return p / (1 - p)


def dpo(c: Any, r: Any) -> Any:
    h = 0.3 * ((c - REF_C) - (r - REF_R))
    return -0.9 * np.log(sigma(h)) - 0.1 * np.log(sigma(-h))


def ipo(c: Any, r: Any) -> Any:
    return ((c - REF_C) - (r - REF_R) - 1 / (2 * 0.3)) ** 2


def simpo(c: Any, r: Any) -> Any:
    return -np.log(sigma(2.5 * c / LENGTHS_C - 2.5 * r / LENGTHS_R - 0.7))


def orpo(c: Any, r: Any) -> Any:
    mean_c, mean_r = c / LENGTHS_C, r / LENGTHS_R
    return -mean_c - 0.4 * np.log(sigma(np.log(odds(mean_c) / odds(mean_r))))


def cpo(c: Any, r: Any) -> Any:
    return -np.log(sigma(0.2 * c - 0.2 * r)) - 0.6 * c


CASES: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "dpo": (dpo, {"preference_beta": 0.3, "label_smoothing": 0.1}),
    "ipo": (ipo, {"preference_beta": 0.3}),
    "simpo": (simpo, {"preference_beta": 2.5, "target_margin": 0.7}),
    "orpo": (orpo, {"preference_beta": 0.4}),
    "cpo": (cpo, {"preference_beta": 0.2, "nll_weight": 0.6}),
}


def array(x: Any) -> mx.array:
    return mx.array(np.asarray(x, dtype=np.float32))


def losses_of(name: str, c: mx.array, r: mx.array, options: dict[str, float]) -> mx.array:
    loss = PREFERENCE_ALGORITHMS[name].loss
    assert loss is not None
    return loss(
        Answers(c, array(REF_C), array(LENGTHS_C)), Answers(r, array(REF_R), array(LENGTHS_R)), options
    )


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_papers(name: str) -> None:
    formula, options = CASES[name]
    assert options.keys() == PREFERENCE_ALGORITHMS[name].options.keys()
    ours = losses_of(name, array(C), array(R), options)
    np.testing.assert_allclose(np.array(ours), formula(C, R), rtol=2e-5, atol=1e-5)
    gradients = mx.grad(lambda c, r: mx.sum(losses_of(name, c, r, options)), argnums=(0, 1))(
        array(C), array(R)
    )
    h = 1e-6  # central differences in float64, row by row: the losses of rows are independent
    by_differences = (formula(C + h, R) - formula(C - h, R)) / (2 * h), (
        formula(C, R + h) - formula(C, R - h)
    ) / (2 * h)
    for mine, theirs in zip(gradients, by_differences, strict=True):
        np.testing.assert_allclose(np.array(mine), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_likelier_chosen_and_unlikelier_rejected_answers_cost_less(name: str) -> None:
    """The sign: at the start of training every algorithm pushes the two apart (IPO, until its target)."""
    options = PREFERENCE_ALGORITHMS[name].options
    chosen, rejected = mx.grad(lambda c, r: mx.sum(losses_of(name, c, r, dict(options))), argnums=(0, 1))(
        array(REF_C), array(REF_R)
    )
    assert (np.array(chosen) < 0).all()
    assert (np.array(rejected) > 0).all()


def test_ipo_is_content_at_its_target_and_pushes_back_beyond() -> None:
    start = Answers(array([0.0]), array([0.0]), array([1.0]))
    for lead, sign in ((4.9, -1), (5.0, 0), (5.1, 1)):  # 1 / (2 · 0.1) = 5
        gradient = mx.grad(
            lambda c: PREFERENCE_ALGORITHMS["ipo"]
            .loss(start._replace(logprobs=c), start, {"preference_beta": 0.1})  # type: ignore[misc]
            .sum()
        )(array([lead]))
        assert np.sign(np.round(gradient.item(), 4)) == sign


def test_cpo_without_its_sft_term_is_dpo_against_a_uniform_reference() -> None:
    flat = [Answers(array(x), array(np.zeros(4)), array(n)) for x, n in ((C, LENGTHS_C), (R, LENGTHS_R))]
    dpo_row, cpo_row = PREFERENCE_ALGORITHMS["dpo"].loss, PREFERENCE_ALGORITHMS["cpo"].loss
    assert dpo_row is not None
    assert cpo_row is not None
    theirs = dpo_row(*flat, {"preference_beta": 0.2, "label_smoothing": 0.0})
    assert np.allclose(
        np.array(cpo_row(*flat, {"preference_beta": 0.2, "nll_weight": 0.0})), np.array(theirs)
    )


KTO = {"preference_beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
GOOD = np.array([True, False, True, False])


def test_kto_by_hand_and_its_gradient() -> None:
    def formula(x: Any) -> Any:
        r = x - REF_C
        return np.where(GOOD, 1.3 * (1 - sigma(0.3 * (r - 0.9))), 0.8 * (1 - sigma(0.3 * (0.9 - r))))

    def ours(x: mx.array) -> mx.array:
        return kto(Answers(x, array(REF_C), array(LENGTHS_C)), mx.array(GOOD), array(0.9), KTO)

    np.testing.assert_allclose(np.array(ours(array(C))), formula(C), rtol=1e-5)
    gradient = np.array(mx.grad(lambda x: ours(x).sum())(array(C)))
    h = 1e-6
    np.testing.assert_allclose(gradient, (formula(C + h) - formula(C - h)) / (2 * h), rtol=1e-4, atol=1e-6)
    assert (gradient[GOOD] < 0).all()
    assert (gradient[~GOOD] > 0).all()


def test_the_baseline_of_kto_is_a_kl_never_negative_and_without_gradient() -> None:
    assert kto_baseline(array([1.0, 3.0]), array([0.0, 1.0])).item() == pytest.approx(1.5)
    assert kto_baseline(array([1.0, -3.0]), array([0.0, 1.0])).item() == 0
    assert not np.array(mx.grad(lambda x: kto_baseline(x, array([0.0])))(array([2.0]))).any()


def test_no_gradient_of_kto_goes_through_its_baseline() -> None:
    answers = Answers(array(C), array(REF_C), array(LENGTHS_C))
    slope = mx.grad(lambda z: kto(answers, mx.array(GOOD), z, KTO).sum())(mx.array(0.9))
    assert slope.item() == 0


def test_no_gradient_of_any_loss_goes_to_the_reference() -> None:
    for name in ("dpo", "ipo"):
        loss, options = PREFERENCE_ALGORITHMS[name].loss, dict(PREFERENCE_ALGORITHMS[name].options)
        assert loss is not None
        rejected = Answers(array(R), array(REF_R), array(LENGTHS_R))

        def total(
            ref: mx.array, loss: Any = loss, options: Any = options, rejected: Any = rejected
        ) -> mx.array:
            return mx.sum(loss(Answers(array(C), ref, array(LENGTHS_C)), rejected, options))

        assert not np.array(mx.grad(total)(array(REF_C))).any()


def test_log_odds_are_right_near_certainty_and_finite_at_it() -> None:
    for p in (1e-6, 0.3, 0.5, 0.999):
        assert log_odds(array([np.log(p)])).item() == pytest.approx(np.log(p / (1 - p)), rel=1e-3, abs=1e-6)
    value, gradient = mx.value_and_grad(lambda x: log_odds(x).sum())(array([0.0, -1e4]))
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()


def test_extreme_logprobs_stay_finite() -> None:
    far = array([-1e4, -1.0, -1e4, -1e-3])
    for name in CASES:
        options = dict(PREFERENCE_ALGORITHMS[name].options)
        value, gradient = mx.value_and_grad(
            lambda c, name=name, options=options: losses_of(name, c, far[::-1], options).sum()
        )(far)
        assert np.isfinite(value.item()), name
        assert np.isfinite(np.array(gradient)).all(), name
