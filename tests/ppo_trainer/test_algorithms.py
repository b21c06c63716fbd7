"""The table of algorithms."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from ppo_trainer.algorithms import ALGORITHMS, GRPO, PPO, Algorithm, find_algorithm
from ppo_trainer.credit import Scored, assign_credit
from ppo_trainer.resolution import resolve_config
from reward_kl.reward_computer import token_rewards


@pytest.mark.parametrize("row", ALGORITHMS.values(), ids=lambda row: row.name)
def test_the_rows_defaults_fill_in_what_nobody_set(row: Algorithm) -> None:
    resolved = resolve_config(PPOConfig(), row)
    columns = row.columns()
    assert {name: getattr(resolved, name) for name in columns} == columns
    untouched = [f.name for f in dataclasses.fields(PPOConfig) if f.name not in columns]
    assert all(getattr(resolved, name) == getattr(PPOConfig(), name) for name in untouched)


def test_a_value_that_was_set_wins_over_the_row_even_when_it_equals_the_declared_default() -> None:
    declared = PPOConfig()
    assert GRPO.defaults["kl_coef"] != declared.kl_coef
    resolved = resolve_config(PPOConfig(kl_coef=declared.kl_coef, group_size=3), GRPO)
    assert (resolved.kl_coef, resolved.group_size) == (declared.kl_coef, 3)
    assert resolve_config(PPOConfig(num_epochs_per_rollout=1), PPO).num_epochs_per_rollout == 1


def test_an_unknown_algorithm_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(InvalidConfigurationError, match='did you mean "grpo"') as caught:
        find_algorithm("gprpo")
    assert all(name in str(caught.value) for name in ALGORITHMS)


def test_a_method_that_compares_a_group_refuses_a_group_of_one() -> None:
    with pytest.raises(InvalidConfigurationError, match=r"group_size: grpo .* at least 2, found 1"):
        resolve_config(PPOConfig(group_size=1), GRPO)
    assert resolve_config(PPOConfig(group_size=1), PPO).group_size == 1


def test_a_row_whose_defaults_name_no_field_is_refused() -> None:
    row = dataclasses.replace(GRPO, name="mine", defaults={"group_sise": 4})
    with pytest.raises(InvalidConfigurationError, match='did you mean "group_size"'):
        resolve_config(PPOConfig(), row)


@pytest.mark.parametrize("row", ALGORITHMS.values(), ids=lambda row: row.name)
def test_credit_is_zero_where_the_mask_is_and_ignores_what_stands_there(row: Algorithm) -> None:
    mask = mx.array([[True, True, False], [True, False, False], [True, True, True], [False, True, True]])
    rewards = mx.array(np.random.default_rng(0).normal(size=(4, 3)), dtype=mx.float32)
    values = rewards * 0.5
    scores, groups = mx.array([1.0, 0.0, 0.5, 2.0]), mx.array([7, 7, 3, 3])

    components = mx.stack([scores, mx.zeros(4)], axis=1)

    def credit(garbage: float) -> tuple[mx.array, mx.array | None]:
        dirty = [mx.where(mask, x, garbage) for x in (rewards, values)]
        batch = Scored(scores, *dirty, mask, groups, components, mx.ones(2), scores * 0.5)
        return assign_credit(row.credit, batch, resolve_config(PPOConfig(), row))

    clean, dirty = credit(0.0), credit(1e6)
    assert mx.array_equal(clean[0], dirty[0])
    assert float(mx.max(mx.abs(mx.where(mask, 0.0, clean[0])))) == 0.0
    assert (clean[1] is not None) == row.needs_critic


def test_ppo_learns_values_from_raw_returns_and_the_policy_from_whitened_advantages() -> None:
    """gamma = lam = 1 makes the return of a token the sum of the rewards from it on."""
    mask = mx.array([[True, True, True], [True, True, False]])
    rewards = mx.array([[0.5, -1.0, 3.0], [2.0, 10.0, 0.0]])
    values = mx.array([[0.2, 0.4, -0.3], [4.0, 1.0, 0.0]])
    config = resolve_config(PPOConfig(gamma=1, lam=1), PPO)
    credit = assign_credit(PPO.credit, Scored(mx.zeros(2), rewards, values, mask, mx.arange(2)), config)
    returns = np.array([[2.5, 2.0, 3.0], [12.0, 10.0, 0.0]])
    assert credit.returns is not None
    np.testing.assert_allclose(np.array(credit.returns), returns, atol=1e-5)
    raw = (returns - np.array(values))[np.array(mask)]
    white = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(np.array(credit.advantages)[np.array(mask)], white, atol=1e-5)


def test_grpo_gives_every_token_of_a_row_its_score_against_its_own_group() -> None:
    """Scores 1, 2, 3 have mean 2 and standard deviation 1; the group of 10 and 10 teaches nothing."""
    mask = mx.array([[True, True], [True, False], [False, True], [True, True], [True, True]])
    scores, groups = mx.array([1.0, 10.0, 2.0, 3.0, 10.0]), mx.array([5, 9, 5, 5, 9])
    rewards = token_rewards(scores, None, mask, 0.0)
    credit = GRPO.credit(Scored(scores, rewards, None, mask, groups), PPOConfig())
    expected = np.array([[-1, -1], [0, 0], [0, 0], [1, 1], [0, 0]]) / (1 + 1e-4)
    np.testing.assert_allclose(np.array(credit.advantages), expected * np.array(mask), atol=1e-6)
    assert credit.returns is None
