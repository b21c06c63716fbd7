"""Rollouts from another distribution than the policy's: the right optimum is reached only with the correction.

Both bandits have an optimum that can be written down (see test_bandit.py), and both are run with and without
weights, everything else equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_trainer.objective import PolicyObjective
from tests.tabular import Bandit


def unseen_tail() -> Bandit:
    """Two rare actions that top-p 0.8 never samples, each worth what the others earn on average at the optimum.

    What is never sampled cannot teach, with or without weights; this is the tail for which that does no harm.
    """
    reference, scores = [1.7, -0.1, -0.3, -0.6, -0.6], np.array([0.25, 1.75, 1.25, 0.0, 0.0])
    for _ in range(200):
        optimum = Bandit(reference, scores.tolist()).optimum(1.0)
        scores[3:] = optimum[:3] @ scores[:3] / optimum[:3].sum()
    return Bandit(reference, scores.tolist())


def test_top_p_needs_its_weights(tmp_path: Path) -> None:
    """Kept tokens are sampled 1 / mass too often, so scores count too much beside a KL that is not sampled."""
    bandit = unseen_tail()
    best = bandit.optimum(1.0)
    first = np.exp(bandit.reference) / np.exp(bandit.reference).sum()
    for policy in (first, best):  # on the whole way the first three are the nucleus
        assert policy[:3].min() > policy[3:].max()
        assert np.sort(policy)[::-1][:2].sum() < 0.8 < policy[:3].sum()
    options = {"top_p": 0.8, "kl_coef": 1.0, "kl_estimator": "full"}
    corrected = bandit.learn(tmp_path, "dr_grpo", importance_correction="token_truncate", **options)
    uncorrected = bandit.learn(tmp_path, "dr_grpo", allow_truncated_sampling=True, **options)
    np.testing.assert_allclose(bandit.probabilities(corrected), best, atol=0.02)
    assert np.abs(bandit.probabilities(uncorrected) - best).max() > 0.045


QUANTISED = Bandit([0.0, 0.5, -0.5, 1.0], [2.0, 1.0, 1.6, 1.2])
FOUR_BITS = {
    "kl_coef": 0.5,
    "quantize_for_rollouts": True,
    "importance_cap": 20.0,
    "steps": 120,
    "group_size": 256,
    "learning_rate": 0.1,
    "elsewhere": 6.0,  # what else is in a quantisation group makes the steps of 4 bits coarse
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("reinforce_pp", {"whiten_advantages": False}),  # no baseline; the KL in the reward
        ("dr_grpo", {}),  # a baseline; an estimated KL in the loss
    ],
)
def test_a_quantised_copy_needs_its_weights(tmp_path: Path, algorithm: str, options: dict[str, Any]) -> None:
    options = {**FOUR_BITS, **options}
    best = QUANTISED.optimum(0.5)
    corrected = QUANTISED.learn(tmp_path, algorithm, importance_correction="token_truncate", **options)
    np.testing.assert_allclose(QUANTISED.probabilities(corrected), best, atol=0.02)
    uncorrected = QUANTISED.learn(
        tmp_path, algorithm, importance_correction="none", allow_truncated_sampling=True, **options
    )
    assert np.abs(QUANTISED.probabilities(uncorrected) - best).max() > 0.06


def test_an_estimated_kl_needs_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean is over sampled tokens like that of the rest: without its weight it is not the policy's KL."""
    whole = PolicyObjective._kl

    def as_if_it_were_exact(self: PolicyObjective, *arguments: Any) -> Any:
        return whole(self, *arguments)[0], False

    monkeypatch.setattr(PolicyObjective, "_kl", as_if_it_were_exact)
    trainer = QUANTISED.learn(tmp_path, "dr_grpo", importance_correction="token_truncate", **FOUR_BITS)
    # 0.027 where the whole loss weighted, as above, ends 0.007 away.
    assert np.abs(QUANTISED.probabilities(trainer) - QUANTISED.optimum(0.5)).max() > 0.02
