"""The table of algorithms. A row says what is special; the trainer is blind to names.

``PPOTrainer(config, algorithm=Algorithm(...))`` runs a row of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from advantage.gae_advantage import gae
from advantage.group_relative import group_advantages
from config.declaration import nearest
from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from reward_kl.kl_divergence import Estimator
from token_attribution.masking import masked_whiten
from training.policy_loss import Aggregation, RatioLevel, Surrogate


class Scored(NamedTuple):
    """A batch of rollouts after scoring: what an advantage may be computed from."""

    scores: mx.array  # (B,) float32, NaN for a row that no reward applied to
    rewards: mx.array  # (B, T) float32, the score on the last token, KL penalties where the row puts them
    values: mx.array | None  # (B, T) float32, with a critic
    mask: mx.array  # (B, T) bool
    group_ids: mx.array  # (B,) int32, equal for completions of one prompt


class Credit(NamedTuple):
    """What the update learns from."""

    advantages: mx.array  # (B, T) float32
    returns: mx.array | None  # (B, T) float32, the value network's target


@dataclass(frozen=True)
class Algorithm:
    """One row: functions and choices, no state."""

    name: str
    credit: Callable[[Scored, PPOConfig], Credit]  # Â and the value targets
    needs_critic: bool = False
    needs_groups: bool = False  # compares completions of one prompt, so it needs at least two
    ratio: RatioLevel = "token"
    surrogate: Surrogate = "clipped"
    reduction: Aggregation = "token_mean"
    kl_placement: Literal["reward", "loss", "none"] = "none"
    kl_estimator: Estimator = "k1"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of PPOConfig's fields, where nobody set them


def whitened_gae(batch: Scored, config: PPOConfig) -> Credit:
    """Generalised advantage estimation, whitened over all tokens of the batch; returns from the raw ones."""
    assert batch.values is not None
    advantages, returns = gae(batch.rewards, batch.values, batch.mask, config.gamma, config.lam)
    return Credit(masked_whiten(advantages, batch.mask), returns)


def group_normalised(batch: Scored, config: PPOConfig) -> Credit:
    """(score − mean of the group) / (standard deviation of the group + 10⁻⁴), the same for every token."""
    advantages = group_advantages(batch.scores, batch.group_ids, scale="group")  # (B,)
    return Credit(advantages[:, None] * batch.mask, None)


PPO = Algorithm(
    name="ppo",
    credit=whitened_gae,
    needs_critic=True,
    kl_placement="reward",
    kl_estimator="k1",
    defaults={"num_epochs_per_rollout": 4},
)
"""Proximal policy optimisation with a value network (Schulman et al. 2017, https://arxiv.org/abs/1707.06347,
eq. 7; for language models Ziegler et al. 2019, https://arxiv.org/abs/1909.08593). The KL to the reference is a
penalty on every token's reward (k1, whose expected gradient there is the reverse KL's). Four epochs per batch."""

GRPO = Algorithm(
    name="grpo",
    credit=group_normalised,
    needs_groups=True,
    reduction="sequence_mean",
    kl_placement="loss",
    kl_estimator="k3",
    defaults={"group_size": 8, "kl_coef": 0.04, "num_epochs_per_rollout": 1},
)
"""Group relative policy optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3), without a
critic. The KL term is k3 times the differentiable ratio, because plain k3 in the loss has the gradient of the
forward KL, not of the reverse KL that the paper writes down."""

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in (PPO, GRPO)}


def find_algorithm(name: str) -> Algorithm:
    """The row of this name."""
    if name not in ALGORITHMS:
        raise InvalidConfigurationError(
            f'algorithm: there is no "{name}"{nearest(name, ALGORITHMS)} (there are: {", ".join(ALGORITHMS)})'
        )
    return ALGORITHMS[name]


def resolve_config(config: PPOConfig, algorithm: Algorithm) -> PPOConfig:
    """The config with the row's own defaults filled in, checked against what the row needs."""
    config = config.with_defaults({"algorithm": algorithm.name, **algorithm.defaults})
    if algorithm.needs_groups and config.group_size < 2:
        raise InvalidConfigurationError(
            f"group_size: {algorithm.name} compares the completions of one prompt and needs at least 2, "
            f"found {config.group_size}"
        )
    if config.value_warmup_steps and config.value_network == "shared":
        raise InvalidConfigurationError(
            "value_warmup_steps: a head on the policy's trunk cannot learn without the policy; set it to 0, or "
            'value_network to "separate"'
        )
    if config.kl_target is not None and config.kl_coef == 0:
        raise InvalidConfigurationError(
            "kl_target: the controller multiplies kl_coef, and 0 stays 0; set kl_coef to where it should start"
        )
    completions = config.batch_size * config.group_size
    if config.kl_target is not None and config.kl_horizon <= 0.2 * completions:
        # One step of the controller could take the coefficient to 0, and from there it never returns.
        raise InvalidConfigurationError(
            f"kl_horizon: {config.kl_horizon} is too short for batches of {completions} completions; "
            f"more than {0.2 * completions:g} is needed"
        )
    return config
