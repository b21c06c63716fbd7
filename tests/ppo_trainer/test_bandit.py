"""One prompt, one-token answers, and an optimum that can be written down: what a row converges to, KL and all.

With a KL of weight beta to the reference the best policy is ref(a) exp(r(a) / beta) / Z. Rows that divide the
scores by their standard deviation sigma, but not the KL, have sigma beta in its place, sigma being the deviation
under the policy they end at.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppo_trainer.algorithms import ALGORITHMS, find_algorithm
from tests.tabular import Bandit

BANDIT = Bandit(reference=[0.0, 0.5, -0.5, 1.0], scores=[1.0, 0.0, 0.6, 0.2])
START = np.exp(BANDIT.reference) / np.exp(BANDIT.reference).sum()
BETA = 0.5

#: Rows whose scores are divided by their deviation beside a KL that is not.
NORMALISED = ("grpo", "bnpo", "dapo", "gspo", "luspo", "cispo", "sapo", "gdpo", "reinforce_pp_baseline")


def normalised_optimum(beta: float) -> np.ndarray:
    """The optimum for sigma beta, sigma found by going round until it stays."""
    policy, sigma = START, 1.0
    for _ in range(500):
        policy = 0.5 * policy + 0.5 * BANDIT.optimum(beta * sigma)
        sigma = float(np.sqrt(policy @ (BANDIT.scores - policy @ BANDIT.scores) ** 2))
    return policy


def test_the_optimum_is_the_closed_form() -> None:
    """Checked by search: no policy nearby has a larger E[r] - beta KL."""

    def objective(policy: np.ndarray) -> float:
        return float(policy @ BANDIT.scores - BETA * policy @ np.log(policy / START))

    best, random = BANDIT.optimum(BETA), np.random.default_rng(0)
    for _ in range(200):
        other = best * np.exp(0.1 * random.normal(size=4))
        assert objective(other / other.sum()) < objective(best) + 1e-12


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_with_a_kl_reaches_its_closed_form(tmp_path: Path, name: str) -> None:
    """Asked for a KL, the rows that have none of their own put it in the loss."""
    row = find_algorithm(name)
    beta = 1.0 if name in NORMALISED else BETA
    trainer = BANDIT.learn(tmp_path, name, kl_coef=beta)
    assert trainer.config.kl_placement == (row.kl_placement if row.kl_placement != "none" else "loss")
    expected = normalised_optimum(beta) if name in NORMALISED else BANDIT.optimum(beta)
    np.testing.assert_allclose(BANDIT.probabilities(trainer), expected, atol=0.02)
    assert np.abs(expected - START).max() > 0.1  # somewhere else than it began
    assert expected.max() < 0.9  # and than without a KL


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_the_other_right_estimators_in_the_loss_reach_it_too(tmp_path: Path, estimator: str) -> None:
    trainer = BANDIT.learn(tmp_path, "dr_grpo", kl_coef=BETA, kl_estimator=estimator)
    np.testing.assert_allclose(BANDIT.probabilities(trainer), BANDIT.optimum(BETA), atol=0.02)


def test_plain_k3_in_the_loss_ends_where_the_forward_kl_does(tmp_path: Path) -> None:
    """GRPO's own KL: the gradient of KL(ref || pi), so pi (r - mean) = beta (pi - ref) at its end."""
    trainer = BANDIT.learn(tmp_path, "dr_grpo", kl_coef=BETA, kl_estimator="k3_plain")
    found = BANDIT.probabilities(trainer)
    assert np.abs(found - BANDIT.optimum(BETA)).max() > 0.05
    pull = found * (BANDIT.scores - found @ BANDIT.scores)
    np.testing.assert_allclose(pull, BETA * (found - START), atol=0.02)
