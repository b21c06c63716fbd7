"""The supervised stages around RL: fine-tuning on demonstrations, reward models, preferences without RL."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from config.declaration import (
    AtLeastTwo,
    BelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    declared,
    option,
)
from config.training_config import TrainingConfig

#: Options of ``PreferenceConfig`` that not every algorithm reads, and which do.
READ_BY = {
    "label_smoothing": ("dpo",),
    "target_margin": ("simpo",),
    "nll_weight": ("cpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


NO_PACKED_SOFT_PROMPT = (
    "packing: a soft prompt stands before every example, and packed examples would share one and be at another "
    "distance from it; leave packing out, or train without a soft prompt"
)


@declared
class SupervisedConfig(TrainingConfig):
    """What the supervised stages share."""

    num_steps: PositiveInt = option(section="batches", default=300, meaning="Optimiser steps.")
    max_sequence_length: PositiveInt = option(
        section="batches", default=1024, meaning="Longest prompt + completion, in tokens."
    )
    eval_every: NonNegativeInt = option(
        section="validation",
        default=0,
        meaning="Optimiser steps between validations; 0 = after the last step alone.",
    )
    early_stopping_patience: PositiveInt | None = option(
        default=None,
        meaning="Validations in a row without a lower loss after which training ends; the weights of the best one are "
        "kept. None = train to the end, and keep the last.",
    )

    @model_validator(mode="after")
    def _stopping_needs_validations(self) -> SupervisedConfig:
        if self.early_stopping_patience is not None and not self.eval_every:
            raise ValueError(
                "early_stopping_patience: it counts validations, and eval_every = 0 makes one at the end alone; set "
                "eval_every to the steps between them"
            )
        return self


@declared
class SFTConfig(SupervisedConfig):
    """Options of ``SFTTrainer``: cross-entropy on the completion of each row."""

    num_steps: PositiveInt = option(
        section="batches", default=300, meaning="Optimiser steps; a step sees batch_size rows."
    )
    loss_on: Literal["completion", "assistant", "text"] = option(
        default="completion",
        meaning="Tokens that are learned: the completion, every turn of the assistant in a chat, or prompt and "
        "completion alike. End tokens always are.",
    )
    packing: bool = option(
        default=False,
        meaning="Put several examples of a batch into one row of up to max_sequence_length tokens, none of which sees "
        "another: less padding, the same gradient. Where the architecture cannot, rows stay as they are, which is "
        "said. Not together with a soft prompt, which each example would need for itself.",
    )

    @model_validator(mode="after")
    def _each_example_has_the_soft_prompt_before_it(self) -> SFTConfig:
        if self.packing and self.soft_prompt_length != 0:
            raise ValueError(NO_PACKED_SOFT_PROMPT)
        return self


@declared
class ProcessRewardConfig(SupervisedConfig):
    """Options of ``ProcessRewardTrainer``: a score for each step of an answer, from steps labelled right or wrong."""

    num_steps: PositiveInt = option(
        section="batches", default=200, meaning="Optimiser steps; a step sees batch_size answers."
    )
    step_separator: Annotated[str, Field(min_length=1)] = option(
        section="steps",
        default="\n",
        meaning="Text that ends each step of an answer; the score is read at its last token.",
    )
    step_reward: Literal["min", "product", "mean", "last"] = option(
        default="min",
        meaning="What makes one reward of the probabilities that its steps are right: the least, their product, their "
        "mean, or the last.",
    )


@declared
class RewardModelConfig(ProcessRewardConfig):
    """Options of ``RewardTrainer``: Bradley–Terry on pairs of answers, or on answers with scores.

    ``main.py reward-model`` gives it to ``ProcessRewardTrainer``, too, where rows have labelled steps.
    """

    num_steps: PositiveInt = option(
        section="batches",
        default=200,
        meaning="Optimiser steps; a step sees batch_size pairs, ranked lists, scored answers, or answers in steps.",
    )
    pairing: Literal["lists", "random", "nearest"] = option(
        section="scores",
        default="lists",
        meaning="What a scored answer is compared with: all of its list of list_size, another one drawn from all rows, "
        "or the one whose reward is nearest; never with one of the same reward.",
    )
    list_size: AtLeastTwo = option(
        default=8, meaning="Scored answers compared with each other, all pairs among them; ≥ 2."
    )
    margin_scale: NonNegativeFloat = option(
        default=0.0,
        meaning="The better answer should lead by this times the difference of the two rewards (a pair's are its "
        "margin, or 1, and 0).",
    )
    centering: NonNegativeFloat = option(
        default=0.0,
        meaning="Weight of the squared sum of a pair's two scores, which keeps scores around 0; 0.01 is usual.",
    )


@declared
class PreferenceConfig(SupervisedConfig):
    """Options of ``PreferenceTrainer``: DPO and its family, learning from preferences without RL."""

    num_steps: PositiveInt = option(
        section="batches",
        default=200,
        meaning="Optimiser steps; a step sees batch_size pairs (KTO: answers).",
    )
    algorithm: Literal["dpo", "ipo", "simpo", "orpo", "kto", "cpo"] = option(
        section="preferences", default="dpo", meaning="Which loss; the table is in docs/preferences.md."
    )
    preference_beta: PositiveFloat | None = option(
        default=None,
        meaning="Strength of the preference (beta; tau in IPO, lambda in ORPO); none = the algorithm's.",
    )
    label_smoothing: BelowOne | None = option(
        default=None,
        meaning="DPO: share of pairs that are taken to be labelled the wrong way round; none = 0.",
    )
    target_margin: NonNegativeFloat | None = option(
        default=None, meaning="SimPO: lead that the chosen answer should have (gamma); none = 1."
    )
    nll_weight: NonNegativeFloat | None = option(
        default=None, meaning="CPO: weight of the chosen answer's own negative logprob; none = 1."
    )
    desirable_weight: PositiveFloat | None = option(
        default=None, meaning="KTO: weight of a good answer (lambda D); none = 1."
    )
    undesirable_weight: PositiveFloat | None = option(
        default=None, meaning="KTO: weight of a bad answer (lambda U); none = 1."
    )

    @model_validator(mode="after")
    def _algorithm_reads_what_is_set(self) -> PreferenceConfig:
        for name, readers in READ_BY.items():
            if getattr(self, name) is not None and self.algorithm not in readers:
                raise ValueError(
                    f"{name}: {self.algorithm} has no use for it ({', '.join(readers)} has); leave it out, or choose "
                    "another algorithm"
                )
        if self.algorithm == "kto" and self.batch_size < 2:
            raise ValueError(
                f"batch_size: kto measures its KL on each other's prompts, so at least 2 is needed, found "
                f"{self.batch_size}"
            )
        return self
