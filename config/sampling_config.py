"""What every sampler understands, in training and outside it."""

from __future__ import annotations

from config.declaration import (
    Declaration,
    Fraction,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    declared,
    option,
)

TOP_P = "Sample from the smallest set of tokens with this mass; 1 = all."


@declared
class SamplingConfig(Declaration):
    """How tokens are drawn from logits, the same in rollouts and in ``generate``."""

    top_p: OpenFraction = option(section="sampling", default=1.0, meaning=TOP_P)
    top_k: NonNegativeInt = option(default=0, meaning="Sample from the k likeliest tokens; 0 = all.")
    min_p: Fraction = option(
        default=0.0, meaning="Drop tokens below this share of the likeliest token's probability; 0 = none."
    )
    repetition_penalty: PositiveFloat = option(
        default=1.0,
        meaning="While sampling, logits of recent tokens are divided by it where positive, multiplied where negative.",
    )
