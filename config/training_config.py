"""What every trainer shares: the model, what of it trains, the optimiser, the batches, the output."""

from __future__ import annotations

import re
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


def block_numbers(text: str) -> list[int]:
    """The blocks that ``lora_blocks`` names, each once, ascending.

    >>> block_numbers("8, 0-3")
    [0, 1, 2, 3, 8]
    """
    numbers = set[int]()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise ValueError(
                f'lora_blocks: numbers and ranges such as "0-3,8" are expected, found "{part.strip()}" in "{text}"'
            )
        numbers.update(range(first, last + 1))
    return sorted(numbers)


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
    quantize_base: Literal[2, 3, 4, 5, 6, 8] | None = option(
        default=None,
        meaning="Bits per weight that the base model is quantised to while it is loaded (QLoRA); none = as it is.",
    )
    quantize_group_size: Literal[16, 32, 64, 128] | None = option(
        default=None,
        meaning="Weights per scale of the quantised base; none = 64, or what quantize_mode asks for.",
    )
    quantize_mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = option(
        default="affine",
        meaning="Number format of the quantised base: whole numbers with scale and bias, or 4 or 8 bit floats.",
    )
    new_special_tokens: list[str] | None = option(
        default=None,
        meaning="Texts that become one token each, such as <answer>, in tokenizer and embeddings; none = none.",
    )
    init_new_embeddings_with_mean: bool = option(
        default=True,
        meaning="New tokens begin as the mean of all embeddings; false = drawn with the embeddings' own spread.",
    )
    trust_remote_code: bool = option(
        default=False,
        meaning="Run Python code that comes with the model or its tokenizer; it can do whatever you can, so read it "
        "first.",
    )
    adapter_path: str | None = option(
        section="adapter", default=None, meaning="Folder of an adapter to start from (mlx-lm format)."
    )
    fine_tune_type: Literal["lora", "dora", "full", "soft_prompt"] = option(
        default="lora",
        meaning="What trains: low-rank adapters, the same with a magnitude per output (DoRA), every weight, or vectors "
        "in front of the prompt alone.",
    )
    lora_r: PositiveInt = option(default=16, meaning="Rank of the adapters (r).")
    lora_alpha: PositiveFloat = option(
        default=32, meaning="Adapter scaling (alpha); the update is scaled by alpha / r."
    )
    lora_rslora: bool = option(
        default=False,
        meaning="Scale the update by alpha / sqrt(r) instead: its size no longer falls with the rank.",
    )
    lora_dropout: Fraction = option(
        default=0.1,
        meaning="Dropout on the adapters' input in supervised stages. RL passes run without it: two passes over the "
        "same weights must give the same logprobs.",
    )
    lora_layers: LayerCount = option(
        default=-1, meaning="How many blocks get adapters, counted from the last; -1 = all."
    )
    lora_blocks: str | None = option(
        default=None,
        meaning='Which blocks get adapters instead, from 0, as numbers and ranges: "0-3,8"; none = lora_layers.',
    )
    lora_modules: list[str] | None = option(
        default=None,
        meaning="Layers that get adapters, by name: q_proj, self_attn, lm_head; none = every linear layer of a block.",
    )
    modules_to_save: list[str] | None = option(
        default=None,
        meaning="Modules of which every weight trains beside the adapters, by name: lm_head, norm; none = none.",
    )
    soft_prompt_tokens: NonNegativeInt | None = option(
        default=None,
        meaning="Trained vectors in front of every prompt; none = 0, and with fine_tune_type = soft_prompt 10 or as "
        "many as soft_prompt_text has tokens.",
    )
    soft_prompt_text: str | None = option(
        default=None,
        meaning="Text whose embeddings the soft prompt begins as; none = those of random tokens.",
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

    save_every: NonNegativeInt = option(
        section="checkpoints",
        default=100,
        meaning="Steps between checkpoints, from which a run goes on exactly, and one at its end; 0 = none.",
    )
    keep_last_n: PositiveInt = option(default=3, meaning="The newest checkpoints that are kept.")
    keep_best: bool = option(
        default=False,
        meaning="Also keep the best checkpoint: in RL that with the highest mean reward over its epoch so far, in the "
        "other stages that with the lowest validation loss.",
    )
    min_free_gb: NonNegativeFloat = option(
        default=0.5, meaning="Disk space (GB) that a checkpoint must leave free; without it none is written."
    )
    resume: str | None = option(
        default=None,
        meaning='Go on from a checkpoint: "latest" = the newest in output_dir, a run folder, or one checkpoint in it; '
        "none = a new run.",
    )
    resume_fallback: bool = option(
        default=False,
        meaning="Where that checkpoint is damaged, take the newest one before it that is whole.",
    )

    @model_validator(mode="after")
    def _what_trains_is_one(self) -> TrainingConfig:
        parts = [n for n in ("modules_to_save", "soft_prompt_tokens", "soft_prompt_text") if getattr(self, n)]
        if self.fine_tune_type == "full" and (parts or self.quantize_base):
            raise ValueError(
                f"{', '.join(parts) or 'quantize_base'}: with fine_tune_type = full every weight trains already, and "
                "none can be quantised; leave it out, or set fine_tune_type to lora"
            )
        if self.fine_tune_type == "soft_prompt" and self.soft_prompt_tokens == 0:
            raise ValueError(
                "soft_prompt_tokens: 0 leaves nothing to train with fine_tune_type = soft_prompt; give at least 1"
            )
        if self.lora_blocks is not None and self.lora_layers != -1:
            raise ValueError(
                "lora_layers, lora_blocks: both say which blocks get adapters "
                f"({self.lora_layers}, {self.lora_blocks}); give one of them"
            )
        if self.lora_blocks is not None:
            block_numbers(self.lora_blocks)
        formats = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
        if self.quantize_mode in formats:
            bits, group = formats[self.quantize_mode]
            if self.quantize_base != bits or self.quantize_group_size not in (None, group):
                raise ValueError(
                    f"quantize_mode: {self.quantize_mode} is {bits} bits in groups of {group}, found quantize_base = "
                    f"{self.quantize_base} and quantize_group_size = {self.quantize_group_size}; set the first to "
                    f"{bits} and leave the second out"
                )
        elif self.quantize_group_size == 16:
            raise ValueError("quantize_group_size: 16 is for quantize_mode = nvfp4; give 32, 64 or 128")
        return self

    @property
    def lora_scale(self) -> float:
        """What the low-rank update is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised)."""
        return self.lora_alpha / (self.lora_r**0.5 if self.lora_rslora else self.lora_r)

    @property
    def soft_prompt_length(self) -> int | None:
        """Vectors of the soft prompt: 0 = there is none, None = as many as ``soft_prompt_text`` has tokens."""
        if self.soft_prompt_tokens is not None:
            return self.soft_prompt_tokens
        if self.soft_prompt_text is not None:
            return None
        return 10 if self.fine_tune_type == "soft_prompt" else 0

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
