"""One reinforcement-learning run: algorithm, rollouts, rewards, KL, clipping."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from config.declaration import (
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    declared,
    option,
)
from config.reward_entries import Rewards
from config.sampling_config import SamplingConfig
from config.training_config import TrainingConfig


@declared
class PPOConfig(SamplingConfig, TrainingConfig):
    """Options of ``PPOTrainer``.

    A field that nobody sets takes the value of the algorithm's row (``ppo_trainer/algorithms.py``)
    where the row has one, and the default written here otherwise.
    """

    algorithm: str = option(
        section="method",
        default="ppo",
        meaning="A row of ppo_trainer/algorithms.py: ppo, grpo, dr_grpo, bnpo, dapo, gspo, luspo, cispo, sapo, gdpo, "
        "opo, rloo, reinforce, reinforce_pp, reinforce_pp_baseline, remax.",
    )
    num_epochs: PositiveInt = option(default=10, meaning="Passes over the prompts.")
    num_steps: PositiveInt | None = option(
        default=None,
        meaning="Batches of rollouts in place of num_epochs, however many passes they take; none = num_epochs.",
    )

    max_new_tokens: PositiveInt = option(
        section="rollouts", default=50, meaning="Longest completion, in tokens, the end token included."
    )
    group_size: PositiveInt = option(default=1, meaning="Completions sampled per prompt (G).")
    temperature: PositiveFloat = option(
        default=1.0, meaning="Logits are divided by it, in sampling and in every training pass alike (T)."
    )
    logit_bias: dict[int, float] | None = option(
        default=None, meaning="Added to the logits of these token ids while sampling; none = nothing."
    )
    repetition_context: PositiveInt = option(
        default=20, meaning="How many recent tokens the repetition penalty looks at."
    )
    rollout_batch_size: PositiveInt = option(default=256, meaning="Most completions decoded side by side.")
    rollout_policy: Literal["current", "copy"] = option(
        default="current",
        meaning="What samples: the policy itself, or a copy that is synchronised every rollout_sync_every steps.",
    )
    rollout_sync_every: PositiveInt = option(
        default=1, meaning="Steps between synchronisations of the copy that samples."
    )
    quantize_for_rollouts: bool = option(
        default=False, meaning="Sample from a copy quantised anew at each synchronisation."
    )
    rollout_bits: Literal[2, 3, 4, 6, 8] = option(
        default=4, meaning="Bits per weight of the quantised copy; layers quantised already keep theirs."
    )
    rollout_quant_group_size: Literal[32, 64, 128] = option(
        default=64, meaning="Weights per scale of the quantised copy."
    )

    # Where the sampler is not the policy
    importance_correction: Literal[
        "auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = option(
        section="sampler",
        default="auto",
        meaning="Weight of each token, exp(trainer's - sampler's logprob), truncated at importance_cap or zero outside "
        "[importance_floor, importance_cap], per token or per sequence; auto = token_truncate for a copy, else none.",
    )
    importance_cap: PositiveFloat = option(default=2.0, meaning="Largest importance weight (C).")
    importance_floor: NonNegativeFloat = option(default=0.0, meaning="Smallest importance weight.")
    off_policy_mask_threshold: PositiveFloat | None = option(
        default=None,
        meaning="Completions with a negative advantage whose mean sampler - policy logprob exceeds it are left out "
        "(delta); none = none.",
    )
    allow_truncated_sampling: bool = option(
        default=False,
        meaning="Train although the distribution sampled from is not the policy's and nothing corrects for it.",
    )

    dynamic_sampling: bool = option(
        section="groups",
        default=False,
        meaning="Replace groups whose raw scores are all equal by further prompts' until batch_size groups are live.",
    )
    dynamic_sampling_max_batches: PositiveInt = option(
        default=10, meaning="Batches of prompts sampled for one step at most; then what is live is used."
    )
    dynamic_sampling_reward: str | None = option(
        default=None,
        meaning="Name of the reward whose equality makes a group dead; none = the weighted sum of all.",
    )

    gamma: Fraction = option(section="advantages", default=0.99, meaning="Discount per token (gamma).")
    lam: Fraction = option(default=0.95, meaning="Trace decay of generalised advantage estimation (lambda).")
    whiten_advantages: bool = option(
        default=False, meaning="Scale the batch's advantages to mean 0 and variance 1 over its tokens."
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        default="group",
        meaning="What divides a score's distance from its group's mean: the group's or batch's deviation, or nothing.",
    )
    advantage_epsilon: NonNegativeFloat = option(
        default=1e-4, meaning="Added to the standard deviation that divides (epsilon)."
    )

    rewards: Rewards | None = option(
        section="scores",
        default=None,
        meaning="Rewards, added up: names, or {name, weight, config}; none = the one given to PPOTrainer, else the "
        "answer's form.",
    )
    reward_weights: list[FiniteFloat] | None = option(
        section="scores", default=None, meaning="Weight of each reward, in order; none = 1 each."
    )
    reward_composition: Literal["weighted_sum", "weighted_mean_clip01", "sum"] = option(
        default="weighted_sum",
        meaning="How rewards become one score: their weighted sum, their weighted mean limited to [0, 1], or their "
        "plain sum.",
    )
    reward_timeout: PositiveFloat | None = option(
        default=600.0, meaning="Seconds that one reward may take for a batch; none = no limit."
    )
    on_reward_error: Literal["stop", "skip"] = option(
        default="stop",
        meaning="When a reward raises, returns no number or runs out of time: end the run, or leave its rows out of "
        "what is learned and count them.",
    )
    score_while_decoding: bool = option(
        default=False,
        meaning="Score each group in a second thread once it is complete, while others are decoded; rewards then see a "
        "group at a time.",
    )
    score_scaling: Literal["none", "std", "norm"] = option(
        default="none",
        meaning="Divide scores by the running standard deviation of all scores so far (std), after taking off their "
        "running mean (norm).",
    )
    score_clip: PositiveFloat | None = option(
        default=None, meaning="Scores are limited to plus and minus this; none = no limit."
    )
    missing_end_penalty: NonNegativeFloat = option(
        default=0.0, meaning="For a completion that was cut off before an end token; 0 = none."
    )
    missing_end_mode: Literal["subtract", "replace"] = option(
        default="subtract",
        meaning="The penalty is subtracted from the score, or its negative replaces the score (OpenAI 2019).",
    )
    overlong_buffer: Fraction = option(
        default=0.0,
        meaning="Share of max_new_tokens, at its end, over which the overlong penalty rises to its full size (DAPO).",
    )
    overlong_penalty: NonNegativeFloat = option(
        default=1.0, meaning="Full size of the overlong penalty, subtracted from the score."
    )
    mask_truncated_completions: bool = option(
        default=False,
        meaning="Completions that were cut off teach nothing, though their scores still count in their group's mean.",
    )
    whiten_rewards: bool = option(
        default=False, meaning="Scale the per-token rewards to variance 1 over the batch, keeping their mean."
    )

    kl_coef: NonNegativeFloat = option(
        section="kl", default=0.1, meaning="Weight of the KL to the reference, per token (beta)."
    )
    kl_placement: Literal["reward", "loss", "none"] | None = option(
        default=None, meaning="Where the KL goes; none = where the algorithm has it."
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3_plain", "abs", "mse", "full"] | None = option(
        default=None,
        meaning="Estimator of the KL; in the loss k3 is multiplied by the ratio and k3_plain is not; full sums over "
        "the vocabulary; none = the algorithm's.",
    )
    allow_biased_kl: bool = option(
        default=False,
        meaning="Accept an estimator whose expected gradient, where it is placed, is not that of the reverse KL.",
    )
    kl_target: PositiveFloat | None = option(
        default=None,
        meaning="KL, in nats per kl_unit, that the adaptive controller steers to; none = kl_coef is fixed.",
    )
    kl_unit: Literal["sequence", "token"] = option(
        default="sequence", meaning="Unit of kl_target: KL summed over a completion, or its mean per token."
    )
    kl_horizon: PositiveInt = option(
        default=10000, meaning="Episodes over which the adaptive controller acts."
    )
    reference: Literal["initial", "base", "none"] = option(
        default="initial",
        meaning="The policy before its first update (its adapter included, if one was loaded), the base model without "
        "any adapter, or no reference.",
    )
    reference_path: str | None = option(
        default=None, meaning="A model, or an adapter of the base model, to be the reference instead."
    )
    reference_sync_every: PositiveInt | None = option(
        default=None, meaning="Steps between refreshes of the reference from the policy; none = never."
    )
    reference_mixup: OpenFraction = option(
        default=1.0,
        meaning="Share of the policy in a refreshed reference (alpha); below 1 an exponential average.",
    )

    num_epochs_per_rollout: PositiveInt = option(
        section="updates", default=1, meaning="Passes over each batch of rollouts (mu, or K epochs)."
    )
    minibatch_size: PositiveInt | None = option(
        default=None, meaning="Completions per optimiser step; none = all of the batch's."
    )
    max_memory_gb: PositiveFloat | None = option(
        default=None,
        meaning="Memory for a run's arrays, in 10^9 bytes: the largest micro_batch_size predicted to fit is chosen, at "
        "most the one given; none = no limit.",
    )
    old_logprobs_from: Literal["trainer", "rollout"] = option(
        default="trainer",
        meaning="Denominator of the ratio: the trainer's own pass (skipped where one update follows), or what the "
        "sampler recorded.",
    )
    ratio: Literal["token", "sequence", "sequence_product"] | None = option(
        default=None,
        meaning="Policy ratio per token, geometric mean per sequence, or product per sequence; none = the algorithm's.",
    )
    surrogate: Literal["clipped", "unclipped", "cispo", "sapo"] | None = option(
        default=None, meaning="How the ratio is bounded; none = the algorithm's."
    )
    reduction: (
        Literal["token_mean", "sequence_mean", "fixed_length", "sequence_sum", "micro_batch_mean"] | None
    ) = option(default=None, meaning="How tokens become one loss; none = the algorithm's.")
    clip_epsilon: PositiveFloat = option(
        default=0.2, meaning="The ratio counts as at most 1 ± this (epsilon)."
    )
    clip_epsilon_high: PositiveFloat | None = option(
        default=None, meaning="The upper bound's own epsilon; none = the same."
    )
    dual_clip: PositiveFloat | None = option(
        default=None,
        meaning="Where the advantage is negative the loss is at most this times its size, > 1 (c); none = no limit.",
    )
    delta: PositiveFloat | None = option(
        default=None, meaning="The unclipped ratio is at most this, > 1 + clip_epsilon_high; none = no limit."
    )
    ratio_cap: PositiveFloat | None = option(
        default=None, meaning="Largest weight of a token in CISPO; none = no limit."
    )
    sapo_temperature_pos: PositiveFloat = option(
        default=1.0, meaning="Steepness of SAPO's gate where the advantage is positive (tau)."
    )
    sapo_temperature_neg: PositiveFloat = option(
        default=1.05, meaning="Steepness of SAPO's gate where the advantage is not positive (tau)."
    )
    entropy_coef: FiniteFloat = option(default=0.0, meaning="Weight of the entropy bonus per token (c2).")
    top_entropy_quantile: OpenFraction = option(
        default=1.0, meaning="Share of the batch's tokens, of highest entropy, that the policy learns from."
    )
    target_kl: PositiveFloat | None = option(
        default=None,
        meaning="A batch's epochs end when the approximate KL to the sampling policy passes it; none = never.",
    )
    ratio_threshold: PositiveFloat | None = option(
        default=None,
        meaning="A minibatch whose mean ratio exceeds it is not learned from; none = every one is.",
    )

    value_network: Literal["separate", "shared"] = option(
        section="critic",
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

    eval_temperature: NonNegativeFloat | None = option(
        section="evaluation",
        default=None,
        meaning="Temperature of evaluate(): 0 = the likeliest token; none = the training temperature.",
    )

    @property
    def samples_from_copy(self) -> bool:
        """Whether something other than the policy itself samples."""
        return self.rollout_policy == "copy" or self.quantize_for_rollouts

    @property
    def uses_kl(self) -> bool:
        """Whether a KL enters what is optimised; of a resolved config."""
        return self.kl_placement in ("reward", "loss") and self.kl_coef > 0 and self.reference != "none"

    @property
    def correction(self) -> str:
        """The importance correction in force: ``importance_correction`` with ``auto`` worked out."""
        if self.importance_correction != "auto":
            return self.importance_correction
        uncorrected = self.allow_truncated_sampling or self.old_logprobs_from == "rollout"
        return "token_truncate" if self.samples_from_copy and not uncorrected else "none"

    @property
    def unlike_policy(self) -> list[str]:
        """What makes the distribution sampled from another than the policy's, in words; empty if it is the same."""
        offs = (
            ("top_p", 1.0),
            ("top_k", 0),
            ("min_p", 0.0),
            ("logit_bias", None),
            ("repetition_penalty", 1.0),
        )
        unlike = [
            f"{name} = {getattr(self, name)}" for name, off in offs if getattr(self, name) not in (off, {})
        ]
        if self.samples_from_copy:
            unlike.append("quantize_for_rollouts" if self.quantize_for_rollouts else "rollout_policy = copy")
        return unlike

    @model_validator(mode="after")
    def _sampling_is_accounted_for(self) -> PPOConfig:
        unlike = self.unlike_policy
        corrected = self.correction != "none" or self.old_logprobs_from == "rollout"
        if unlike and not corrected and not self.allow_truncated_sampling:
            raise ValueError(
                f"{' and '.join(unlike)}: the distribution sampled from would not be the policy's own, so ratios "
                "and KL would be wrong; leave it at its default while training, set importance_correction "
                "(token_truncate), or set allow_truncated_sampling = true to accept the bias"
            )
        if self.old_logprobs_from == "rollout" and self.correction != "none":
            raise ValueError(
                f"importance_correction = {self.correction}: with old_logprobs_from = rollout the ratio already is the "
                "policy's over the sampler's, and a weight beside it would count the same difference twice; leave one "
                "of the two out"
            )
        if self.importance_floor >= self.importance_cap:
            raise ValueError(
                f"importance_floor: {self.importance_floor} must be below importance_cap ({self.importance_cap})"
            )
        for token, bias in (self.logit_bias or {}).items():
            if token < 0 or not bias < 3.4e38:  # what float32 holds; NaN too
                raise ValueError(
                    f"logit_bias: a token id from 0 up with a finite number, or -inf to forbid it, is expected, found "
                    f"{token}: {bias}"
                )
        if self.dual_clip is not None and self.delta is not None:
            raise ValueError("dual_clip, delta: they are the same limit; give one of them")
        if self.reference == "none" and self.reference_path is not None:
            raise ValueError(
                "reference_path: a reference is named although reference = none; remove one of the two"
            )
        return self
