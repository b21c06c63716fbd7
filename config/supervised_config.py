"""The supervised stages around RL: fine-tuning on demonstrations, and reward models."""

from __future__ import annotations

from config.declaration import AtLeastTwo, NonNegativeFloat, PositiveInt, declared, option
from config.training_config import TrainingConfig


@declared
class SFTConfig(TrainingConfig):
    """Options of ``SFTTrainer``: cross-entropy on the completion of each row."""

    num_steps: PositiveInt = option(section="batches", default=300, meaning="Optimiser steps.")
    max_sequence_length: PositiveInt = option(default=1024, meaning="Longest prompt + completion, in tokens.")


@declared
class RewardModelConfig(TrainingConfig):
    """Options of ``RewardTrainer``: Bradley–Terry on pairs of answers, or on answers with scores."""

    num_steps: PositiveInt = option(
        section="batches",
        default=200,
        meaning="Optimiser steps; a step sees batch_size pairs or scored answers.",
    )
    list_size: AtLeastTwo = option(
        default=8, meaning="Scored answers compared with each other, all pairs among them; ≥ 2."
    )
    max_sequence_length: PositiveInt = option(default=1024, meaning="Longest prompt + completion, in tokens.")
    centering: NonNegativeFloat = option(
        section="scores",
        default=0.0,
        meaning="Weight of the squared sum of a pair's two scores, which keeps scores around 0; 0.01 is usual.",
    )
