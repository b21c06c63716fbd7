"""The table of algorithms. A row says what is special; the trainer is blind to names.

A row's columns are: how credit is assigned, how the policy ratio is formed and bounded, how tokens become one loss,
where the KL to the reference goes and how it is estimated, and defaults for options that nobody set. Each row's
docstring names its paper and what it reduces to. ``PPOTrainer(config, algorithm=Algorithm(...))`` runs a row of
your own. ``docs/algorithms.md`` has the table with what each row reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from config.declaration import nearest
from config.errors import InvalidConfigurationError
from ppo_trainer.credit import (
    CreditFunction,
    from_critic,
    from_each_reward,
    from_group,
    from_length_weighted_group,
    from_others_of_group,
    from_return,
    from_return_and_greedy,
    from_return_and_others,
)
from training.policy_loss import Aggregation, RatioLevel, Surrogate


@dataclass(frozen=True)
class Algorithm:
    """One row: functions and choices, no state. A config's option of the same name overrides a column."""

    name: str
    credit: CreditFunction  # Â and the value targets
    needs_critic: bool = False
    needs_groups: bool = False  # compares completions of one prompt, so it needs at least two
    needs_others: bool = False  # compares completions of one batch, so it needs at least two
    weighs_rewards_apart: bool = False  # normalises each reward by itself, so their sum has no scale
    needs_greedy: bool = False  # compares with the likeliest answer to the same prompt
    ratio: RatioLevel = "token"
    surrogate: Surrogate = "clipped"
    reduction: Aggregation = "token_mean"
    kl_placement: Literal["reward", "loss", "none"] = "none"
    kl_estimator: Literal["k1", "k2", "k3", "k3_plain", "abs", "mse", "full"] = "k3"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of PPOConfig's fields, where nobody set them

    @property
    def advantage(self) -> str:
        """What its credit is called, for ``config.formula`` to write down."""
        return getattr(self.credit, "__name__", type(self.credit).__name__)

    def columns(self) -> dict[str, Any]:
        """The options of ``PPOConfig`` that this row answers: its columns, then its further defaults."""
        names = ("ratio", "surrogate", "reduction", "kl_placement", "kl_estimator")
        return {"algorithm": self.name, **{name: getattr(self, name) for name in names}, **self.defaults}


PPO = Algorithm(
    name="ppo",
    credit=from_critic,
    needs_critic=True,
    kl_placement="reward",
    kl_estimator="k1",
    defaults={"num_epochs_per_rollout": 4, "whiten_advantages": True},
)
"""Proximal policy optimisation with a value network (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7;
for language models Ziegler et al. 2019, https://arxiv.org/abs/1909.08593).

    Â = whiten(GAE(r, V)),   r_t = −β k1_t + [t = last] score,   L = mean over tokens of −min(ρÂ, clip(ρ, 1±ε)Â)

Assumes that the value network foretells well enough to tell tokens of one completion apart. With values of 0 and
λ = γ = 1 it is ``reinforce_pp`` with several epochs. ``value_network = "shared"`` puts the value head on the
policy's trunk."""

GRPO = Algorithm(
    name="grpo",
    credit=from_group,
    needs_groups=True,
    reduction="sequence_mean",
    kl_placement="loss",
    kl_estimator="k3",
    defaults={"group_size": 8, "kl_coef": 0.04},
)
"""Group relative policy optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3), without a critic.

    Â_i = (s_i − mean_g) / (std_g + ε_A),   L = mean over completions of the mean over their tokens of
    −min(ρÂ, clip(ρ, 1±ε)Â) + β ρ k3

Assumes one score per completion: every token shares it. The paper writes plain k3, whose gradient is that of the
forward KL; ``kl_estimator = "k3_plain"`` is the paper's. The division by std_g weighs prompts of nearly equal
scores up, and the mean over a completion's own tokens favours short right and long wrong answers: ``dr_grpo``
does without both."""

DR_GRPO = Algorithm(
    name="dr_grpo",
    credit=from_group,
    needs_groups=True,
    reduction="fixed_length",
    defaults={"group_size": 8, "scale_rewards": "none", "kl_coef": 0.0},
)
"""GRPO done right (Liu et al. 2025, https://arxiv.org/abs/2503.20783, section 3.2): no division by std_g, and tokens
are summed and divided by the constant B · max_new_tokens, so neither length nor spread weighs anything.

    Â_i = s_i − mean_g,   L = Σ over tokens of −min(ρÂ, clip(ρ, 1±ε)Â) / (B · max_new_tokens)

No KL. Up to the factors G/(G−1) and max_new_tokens it is ``rloo`` with the clipped token ratio."""

BNPO = Algorithm(
    name="bnpo",
    credit=from_group,
    needs_groups=True,
    reduction="micro_batch_mean",
    defaults={"group_size": 8, "kl_coef": 0.0},
)
"""GRPO with the token mean taken over each micro-batch, which is what TRL's ``loss_type="bnpo"`` computes. (The beta
normalisation of the paper of that name, Xiao et al. 2025, https://arxiv.org/abs/2506.02864, is not part of it.)

Its gradient depends on how a batch is split into micro-batches; with one micro-batch it is ``dapo``'s loss with
equal clips. Here for those who compare with TRL."""

DAPO = Algorithm(
    name="dapo",
    credit=from_group,
    needs_groups=True,
    defaults={
        "group_size": 16,
        "clip_epsilon": 0.2,
        "clip_epsilon_high": 0.28,
        "dynamic_sampling": True,
        "overlong_buffer": 0.2,
        "kl_coef": 0.0,
    },
)
"""Decoupled clip and dynamic sampling (Yu et al. 2025, https://arxiv.org/abs/2503.14476, eq. 8-13).

    GRPO's Â;  clip(ρ, 1−0.2, 1+0.28);  mean over all tokens of the optimiser step;  groups whose raw scores are all
    equal are replaced by further prompts';  a penalty rises from 0 to 1 over the last fifth of max_new_tokens

Assumes that some prompts are neither too easy nor too hard. No KL. With equal clips, completions of one length and
no dynamic sampling it is ``grpo`` without KL."""

GSPO = Algorithm(
    name="gspo",
    credit=from_group,
    needs_groups=True,
    ratio="sequence",
    reduction="sequence_mean",
    defaults={"group_size": 8, "clip_epsilon": 3e-4, "clip_epsilon_high": 4e-4, "kl_coef": 0.0},
)
"""Group sequence policy optimisation (Zheng et al. 2025, https://arxiv.org/abs/2507.18071, eq. 5-7): the ratio of a
completion is the geometric mean of its tokens', clipped as one.

    s_i = exp(mean over tokens of log π − log π_old),   L = mean over completions of −min(s_i Â_i, clip(s_i)Â_i)

The clip range is tiny because a mean of log ratios moves little. No KL. For completions of one token it is ``grpo``.
A batch used for a single update has s_i = 1 and nothing to clip: set ``minibatch_size`` (the paper makes four)."""

LUSPO = Algorithm(
    name="luspo",
    credit=from_group,
    needs_groups=True,
    ratio="sequence",
    reduction="sequence_sum",
    defaults={"group_size": 8, "clip_epsilon": 2e-3, "clip_epsilon_high": 2.5e-3, "kl_coef": 0.0},
)
"""Length-unbiased GSPO (https://arxiv.org/abs/2602.05261): GSPO with each completion's loss times its length, so that a
token of a long completion weighs as much as one of a short one.

    L = mean over completions of n_i · −min(s_i Â_i, clip(s_i)Â_i)

For completions of one length n it is n times ``gspo``."""

CISPO = Algorithm(
    name="cispo",
    credit=from_group,
    needs_groups=True,
    surrogate="cispo",
    defaults={"group_size": 8, "ratio_cap": 5.0, "kl_coef": 0.0},
)
"""Clipped importance-sampling policy optimisation (MiniMax 2025, https://arxiv.org/abs/2506.13585, eq. 4-5): the weight
is capped, and every token keeps a gradient.

    L = mean over tokens of −sg[min(ρ, cap)] Â log π

Below the cap its gradient is REINFORCE's times the ratio. The paper tunes the cap and does not print it; 5 is that of
https://arxiv.org/abs/2510.13786 and TRL. The cap bounds the weight and not the step: with several updates per batch
use a small learning rate (docs/algorithms.md)."""

SAPO = Algorithm(
    name="sapo",
    credit=from_group,
    needs_groups=True,
    surrogate="sapo",
    reduction="sequence_mean",
    defaults={"group_size": 8, "kl_coef": 0.0},
)
"""Soft adaptive policy optimisation (Gao et al. 2025, https://arxiv.org/abs/2511.20347): a smooth gate in place of the
clip, steeper where the advantage is negative.

    L = mean over completions of the mean over tokens of −(4/τ) σ(τ(ρ − 1)) Â,   τ = 1 if Â > 0, else 1.05

At ρ = 1 its gradient is ``grpo``'s."""

GDPO = Algorithm(
    name="gdpo",
    credit=from_each_reward,
    weighs_rewards_apart=True,
    needs_groups=True,
    reduction="sequence_mean",
    defaults={"group_size": 8, "kl_coef": 0.0},
)
"""Group reward-decoupled normalisation (NVIDIA 2026, https://arxiv.org/abs/2601.05242): with several rewards each is
normalised in its group by itself before the weighted sum, and the sum over the batch, so that a reward of small
spread is still heard.

    Â_i = normalise over the batch( Σ_k w_k (s_ik − mean_gk) / (std_gk + ε) )

With one reward it is ``grpo`` with advantages rescaled by one number per batch."""

OPO = Algorithm(
    name="opo",
    credit=from_length_weighted_group,
    needs_groups=True,
    surrogate="unclipped",
    reduction="sequence_sum",
    defaults={"group_size": 8, "kl_coef": 0.0},
)
"""On-policy optimisation with the optimal baseline (Hao et al. 2025, https://arxiv.org/abs/2505.23585): the baseline is
the group's mean score weighted by length.

    Â_i = s_i − Σ_j n_j s_j / Σ_j n_j,   L = mean over completions of Σ over tokens of −ρÂ

Assumes strictly on-policy updates and no KL. With equal lengths Â is ``dr_grpo``'s."""

RLOO = Algorithm(
    name="rloo",
    credit=from_others_of_group,
    needs_groups=True,
    ratio="sequence_product",
    surrogate="unclipped",
    reduction="sequence_mean",
    kl_placement="reward",
    kl_estimator="k1",
    defaults={"group_size": 4, "kl_coef": 0.03},
)
"""REINFORCE leave-one-out (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 2.3): a completion is one
action, and its baseline is the mean of the others of its group.

    R_i = s_i − β Σ_t k1_t,   Â_i = R_i − mean_{j≠i} R_j,   L = mean over completions of −Â_i exp(Σ_t log π − log π_old)

Unbiased, for one update per batch. Â is G/(G−1) times ``dr_grpo``'s. TRL's RLOO clips the sequence ratio:
``surrogate = "clipped"``."""

REINFORCE = Algorithm(
    name="reinforce",
    credit=from_return_and_others,
    needs_others=True,
    surrogate="unclipped",
    reduction="sequence_sum",
    kl_placement="reward",
    kl_estimator="k1",
    defaults={"gamma": 1.0, "kl_coef": 0.03},
)
"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696) with the mean outcome of the batch's other completions
as its baseline, which is independent of the completion and so keeps the gradient unbiased.

    Â_t = Σ_{k≥t} r_k − mean_{j≠i} R_j,   L = mean over completions of Σ over tokens of −ρÂ

For one update per batch. With a single prompt and no KL its Â is ``rloo``'s."""

REINFORCE_PP = Algorithm(
    name="reinforce_pp",
    credit=from_return,
    kl_placement="reward",
    kl_estimator="k1",
    defaults={"gamma": 1.0, "whiten_advantages": True, "kl_coef": 0.01},
)
"""REINFORCE++ (Hu et al. 2025, https://arxiv.org/abs/2501.03262): PPO without its critic.

    Â = whiten over the batch's tokens(Σ_{k≥t} r_k),   r_t = −β k1_t + [t = last] score,   PPO's clipped loss

One completion per prompt will do: the batch is the baseline. It is ``ppo`` with values of 0 and λ = γ = 1."""

REINFORCE_PP_BASELINE = Algorithm(
    name="reinforce_pp_baseline",
    credit=from_group,
    needs_groups=True,
    kl_placement="loss",
    kl_estimator="k2",
    defaults={"group_size": 8, "scale_rewards": "none", "whiten_advantages": True, "kl_coef": 0.01},
)
"""REINFORCE++ with a group baseline (same paper): the score minus its group's mean, divided by the deviation over the
whole batch rather than the group's, and k2 in the loss (section 3.2).

    Â = whiten over the batch's tokens(s_i − mean_g),   L = mean over tokens of −min(ρÂ, clip(ρ, 1±ε)Â) + β k2

k2 in the loss has the reverse KL's gradient on-policy only: for several updates per batch set
``kl_estimator = "k3"``. The paper prints no coefficient for it; 0.01 is ours (the authors' scripts have 1e-5 and 1e-4).
Mean and deviation are taken over tokens, as in OpenRLHF and verl."""

REMAX = Algorithm(
    name="remax",
    credit=from_return_and_greedy,
    needs_greedy=True,
    surrogate="unclipped",
    reduction="sequence_sum",
    kl_placement="reward",
    kl_estimator="k1",
    defaults={"gamma": 1.0, "kl_coef": 0.1},
)
"""ReMax (Li et al. 2023, https://arxiv.org/abs/2310.10505): REINFORCE whose baseline is the score of the
likeliest answer to the same prompt, which costs one more decoding per prompt.

    Â_t = Σ_{k≥t} r_k − score(greedy),   L = mean over completions of Σ over tokens of −ρÂ

For one update per batch. Once the policy is nearly deterministic Â is 0 almost everywhere. The KL of later tokens
counts for earlier ones, as in every return; the authors' code takes each token's own alone."""

ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        PPO,
        GRPO,
        DR_GRPO,
        BNPO,
        DAPO,
        GSPO,
        LUSPO,
        CISPO,
        SAPO,
        GDPO,
        OPO,
        RLOO,
        REINFORCE,
        REINFORCE_PP,
        REINFORCE_PP_BASELINE,
        REMAX,
    )
}


def find_algorithm(name: str) -> Algorithm:
    """The row of this name."""
    if name not in ALGORITHMS:
        raise InvalidConfigurationError(
            f'algorithm: there is no "{name}"{nearest(name, ALGORITHMS)} (there are: {", ".join(ALGORITHMS)})'
        )
    return ALGORITHMS[name]
