"""One reinforcement-learning run: algorithm, rollouts, rewards, KL, clipping."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from config.declaration import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    declared,
    option,
)
from config.training_config import TrainingConfig


@declared
class PPOConfig(TrainingConfig):
    """Options of ``PPOTrainer``.

    A field that nobody sets takes the value of the algorithm's row (``ppo_trainer/algorithms.py``)
    where the row has one, and the default written here otherwise.
    """

    algorithm: str = option(default="ppo", meaning="A row of ppo_trainer/algorithms.py: ppo, grpo.")

    # Rollouts
    max_new_tokens: PositiveInt = option(
        default=50, meaning="Longest completion, in tokens, the end token included."
    )
    group_size: PositiveInt = option(default=1, meaning="Completions sampled per prompt (G).")
    temperature: PositiveFloat = option(
        default=1.0, meaning="Logits are divided by it, in sampling and in every training pass alike (T)."
    )
    top_p: OpenFraction = option(
        default=1.0, meaning="Sample from the smallest set of tokens with this mass; 1 = all."
    )
    top_k: NonNegativeInt = option(default=0, meaning="Sample from the k likeliest tokens; 0 = all.")
    min_p: Fraction = option(
        default=0.0, meaning="Drop tokens below this share of the likeliest token's probability; 0 = none."
    )
    allow_truncated_sampling: bool = option(
        default=False,
        meaning="Train although top_p, top_k or min_p cut the distribution sampled from (the gradient is then biased).",
    )
    rollout_batch_size: PositiveInt = option(default=256, meaning="Most completions decoded side by side.")

    # Advantages
    gamma: Fraction = option(default=0.99, meaning="Discount per token (gamma).")
    lam: Fraction = option(default=0.95, meaning="Trace decay of generalised advantage estimation (lambda).")

    # Scores
    reward_weights: list[float] | None = option(
        default=None, meaning="Weight of each reward, in order; none = 1 each."
    )
    missing_end_penalty: NonNegativeFloat = option(
        default=0.0, meaning="Subtracted from the score of a completion that was cut off before an end token."
    )

    # KL to the reference
    kl_coef: NonNegativeFloat = option(
        default=0.1, meaning="Weight of the KL to the reference, per token (beta)."
    )
    kl_target: PositiveFloat | None = option(
        default=None,
        meaning="KL, in nats per sequence, that the adaptive controller steers to; none = kl_coef is fixed.",
    )
    kl_horizon: PositiveInt = option(
        default=10000, meaning="Episodes over which the adaptive controller acts."
    )

    # Updates
    num_epochs_per_rollout: PositiveInt = option(
        default=1, meaning="Passes over each batch of rollouts (mu, or K epochs)."
    )
    minibatch_size: PositiveInt | None = option(
        default=None, meaning="Completions per optimiser step; none = all of the batch's."
    )
    clip_epsilon: PositiveFloat = option(
        default=0.2, meaning="The ratio counts as at most 1 ± this (epsilon)."
    )
    clip_epsilon_high: PositiveFloat | None = option(
        default=None, meaning="The upper bound's own epsilon; none = the same."
    )
    target_kl: PositiveFloat | None = option(
        default=None,
        meaning="A batch's epochs end when the approximate KL to the sampling policy passes it; none = never.",
    )

    # Value network
    value_network: Literal["separate", "shared"] = option(
        default="separate",
        meaning="A network of its own (adapter and head), or a head on the policy's trunk.",
    )
    vf_coef: PositiveFloat = option(
        default=0.1, meaning="Weight of the value loss beside the policy loss where they share a trunk (c1)."
    )
    clip_range_value: PositiveFloat | None = option(
        default=0.2,
        meaning="A value counts as at most this far from its old value in the loss; none = no clip.",
    )
    value_learning_rate: PositiveFloat | None = option(
        default=None, meaning="Learning rate of the separate value network; none = learning_rate."
    )
    value_warmup_steps: NonNegativeInt = option(
        default=0,
        meaning="First steps in which only the value network learns, so that the policy starts with a critic.",
    )

    # Evaluation
    eval_temperature: NonNegativeFloat | None = option(
        default=None,
        meaning="Temperature of evaluate(): 0 = the likeliest token; none = the training temperature.",
    )

    @model_validator(mode="after")
    def _sampling_is_trainable(self) -> PPOConfig:
        cut = [
            f"{name} = {getattr(self, name)}"
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))
            if getattr(self, name) != off
        ]
        if cut and not self.allow_truncated_sampling:
            raise ValueError(
                f"{' and '.join(cut)}: sampling would leave out tokens that the policy's own probabilities "
                "include, so ratios and KL would be wrong; leave it at its default while training, or set "
                "allow_truncated_sampling = true to accept the bias"
            )
        return self
