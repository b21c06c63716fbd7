"""How tokens are drawn outside training: by ``generate``, ``chat`` and ``make-preferences``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from config.declaration import (
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    OpenFraction,
    PositiveInt,
    Seed,
    declared,
    option,
)
from config.sampling_config import TOP_P, SamplingConfig


@declared
class DecodingConfig(SamplingConfig):
    """Every sampler there is; the defaults are a lively answer (0 as temperature: the likeliest)."""

    max_tokens: PositiveInt = option(
        section="sampling", default=512, meaning="Longest answer, in tokens, the end token included."
    )
    temperature: NonNegativeFloat = option(
        default=0.7, meaning="Logits are divided by it; 0 = the likeliest token each time."
    )
    top_p: OpenFraction = option(default=0.95, meaning=TOP_P)
    presence_penalty: FiniteFloat = option(
        default=0.0, meaning="Taken off the logits of tokens that are among the recent ones."
    )
    frequency_penalty: FiniteFloat = option(
        default=0.0, meaning="Taken off the logits of recent tokens as many times as they stand there."
    )
    penalty_context: PositiveInt = option(default=20, meaning="How many recent tokens the penalties look at.")
    xtc_probability: Fraction = option(
        default=0.0,
        meaning="How often, per token, all but the least likely of the likely tokens are left out (XTC).",
    )
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] = option(
        default=0.1, meaning="From which probability on XTC takes a token for a likely one."
    )
    logit_bias: dict[int, float] | None = option(
        default=None, meaning='Added to the logits of these token ids, as in {"50": -5}; none = nothing.'
    )
    seed: Seed = option(default=0, meaning="Everything random follows from it.")
