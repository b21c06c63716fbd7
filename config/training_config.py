"""What every trainer shares: the model, what of it trains, the optimiser, the batches, the output."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from config.data_config import DataConfig
from config.declaration import (
    BelowOne,
    Fraction,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    declared,
    option,
)
from config.model_config import ModelConfig


@declared
class TrainingConfig(DataConfig):
    """Options of every stage. One declaration is the default, the type, the range and the help."""

    model_name: str = option(
        section="model",
        default="Qwen/Qwen3-0.6B-Base",
        meaning='A Hugging Face name, a local folder, or "embedded" for a small model made on the spot.',
    )
    embedded_model: ModelConfig = option(
        default=ModelConfig.tiny(), meaning='Architecture used when model_name is "embedded".'
    )
    trust_remote_code: bool = option(
        default=False,
        meaning="Run Python code that comes with the model or its tokenizer; it can do whatever you can, so read it "
        "first.",
    )
    adapter_path: str | None = option(
        section="adapter", default=None, meaning="Folder of an adapter to start from (mlx-lm format)."
    )
    fine_tune_type: Literal["lora", "full"] = option(
        default="lora", meaning="What trains: low-rank adapters or every weight."
    )
    lora_r: PositiveInt = option(default=16, meaning="Rank of the adapters (r).")
    lora_alpha: PositiveFloat = option(
        default=32, meaning="Adapter scaling (alpha); the update is scaled by alpha / r."
    )
    lora_dropout: Fraction = option(
        default=0.1,
        meaning="Dropout on the adapters' input in supervised stages. RL passes run without it: two passes over the "
        "same weights must give the same logprobs.",
    )
    lora_layers: LayerCount = option(
        default=-1, meaning="How many blocks get adapters, counted from the last; -1 = all."
    )

    batch_size: PositiveInt = option(section="batches", default=4, meaning="Rows (in RL: prompts) per step.")
    micro_batch_size: PositiveInt | None = option(
        default=None,
        meaning="Rows per forward and backward pass; gradients add up to the whole batch's. None = all at once.",
    )
    max_prompt_length: PositiveInt = option(
        default=512, meaning="Longest prompt, in tokens; prompt_overflow says what happens to longer ones."
    )

    gradient_checkpointing: bool = option(
        default=False,
        meaning="Keep only each block's input for the backward pass and compute the rest again: less memory, a third "
        "more time.",
    )

    # Optimiser (AdamW with bias correction)
    learning_rate: PositiveFloat = option(
        section="optimiser", default=1e-5, meaning="Peak step size of AdamW (alpha)."
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        default="constant",
        meaning="Course of the learning rate after the warm-up: level, or down to lr_end.",
    )
    lr_end: NonNegativeFloat = option(default=0.0, meaning="Where a linear or cosine schedule ends.")
    lr_decay_steps: PositiveInt | None = option(
        default=None,
        meaning="Optimiser steps after the warm-up until lr_end is reached, level from there; none = all there are.",
    )
    warmup_steps: NonNegativeInt = option(
        default=0, meaning="Optimiser steps over which the learning rate rises from 0."
    )
    warmup_ratio: BelowOne = option(
        default=0.0, meaning="The same as a share of all optimiser steps; for one of the two."
    )
    max_grad_norm: PositiveFloat | None = option(
        default=1.0, meaning="The gradient is scaled down to this global L2 norm when longer; none = never."
    )
    adam_beta1: BelowOne = option(default=0.9, meaning="Decay of the first moment (beta 1).")
    adam_beta2: BelowOne = option(default=0.999, meaning="Decay of the second moment (beta 2).")
    adam_eps: PositiveFloat = option(
        default=1e-8, meaning="Added to the root of the second moment (epsilon)."
    )
    weight_decay: NonNegativeFloat = option(
        default=0.0, meaning="Decoupled weight decay per step, times learning rate."
    )
    optimizer_bits: Literal[32, 8] = option(
        default=32,
        meaning="Bits per number of the optimiser's two moments; 8 = block-wise codes, a quarter of the memory.",
    )
    max_skipped_steps: PositiveInt = option(
        default=5,
        meaning="Updates in a row that may be skipped for a loss or gradient that is not finite before stopping.",
    )

    seed: Seed = option(section="run", default=0, meaning="Everything random follows from it.")
    output_dir: str | None = option(
        default=None,
        meaning="Run folder for metrics, samples, config and weights; none = runs/<stage>-<date>-<time>.",
    )
    verbose: bool = option(default=True, meaning="Print one line per epoch.")
    log_samples_every: NonNegativeInt = option(
        default=10, meaning="Steps between rows of samples.jsonl; 0 = never."
    )
    max_logged_samples: PositiveInt = option(default=5, meaning="Completions written each time.")

    @model_validator(mode="after")
    def _schedule_is_one(self) -> TrainingConfig:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps, warmup_ratio: both say how long the warm-up is ({self.warmup_steps} steps, "
                f"{self.warmup_ratio} of all); give one of them"
            )
        if self.lr_end > self.learning_rate:
            raise ValueError(
                f"lr_end: at most learning_rate ({self.learning_rate}) is expected, found {self.lr_end}; a schedule "
                "falls"
            )
        return self
