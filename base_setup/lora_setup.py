"""What of a model trains: low-rank adapters, DoRA, every weight, a soft prompt, whole modules beside them.

The parts are files of one idea each: ``adapter_layers`` (low-rank layers), ``soft_prompt`` (vectors before the
prompt), ``base_weights`` (modules that train whole), ``base_model`` (back to the base), ``adapter_files`` (on disk).
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.adapter_files import (
    DESCRIPTION,
    WEIGHTS,
    load_adapter,
    read_description,
    restore_adapter,
    save_adapter,
    soft_prompt_length,
)
from base_setup.adapter_layers import LEAVES, adapter_layers, add_adapters
from base_setup.base_model import adapters_off, fuse_adapters, strip_adapters
from base_setup.base_weights import BaseWeights, modules_named, set_base_weights, train_modules
from base_setup.soft_prompt import NAME as SOFT_PROMPT
from base_setup.soft_prompt import first_rows, set_soft_prompt, soft_prompt_of
from base_setup.tokenizer_setup import encode
from config.errors import InvalidConfigurationError
from config.training_config import TrainingConfig

__all__ = [
    "DESCRIPTION",
    "WEIGHTS",
    "adapter_layers",
    "adapters_off",
    "fuse_adapters",
    "load_adapter",
    "prepare_trainable",
    "read_description",
    "restore_adapter",
    "save_adapter",
    "soft_prompt_length",
    "strip_adapters",
]


def prepare_trainable(
    model: nn.Module, config: TrainingConfig, tokenizer: TokenizerWrapper | None = None
) -> dict[str, Any]:
    """Freeze ``model`` but for what ``config`` trains, in place; returns its adapter description.

    ``lora``, ``dora``: the base is frozen and its linear layers get adapters whose update is zero at first, so the
    model computes what it did (with LoRA to the last bit). ``soft_prompt``, or ``soft_prompt_tokens`` beside them:
    vectors in front of every prompt, which change what it computes at once. ``full``: every weight trains, in float32,
    because steps of the size that RL takes vanish in bfloat16.

    Args:
        tokenizer: for ``soft_prompt_text``, and for how many tokens there are to begin a soft prompt from.
    Raises:
        InvalidConfigurationError: for layers, blocks or modules that are not there or cannot train.
        CheckpointError: where ``adapter_path`` does not fit.
    """
    model.freeze()
    if config.adapter_path is not None:
        return _resume_adapter(model, config)
    description: dict[str, Any] = {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": len(model.layers),
        "model": config.model_name,
    }
    if config.fine_tune_type == "full":
        _unfreeze_all(model, f'fine_tune_type: "full" trains every weight, but "{config.model_name}"')
        return description
    set_base_weights(model, BaseWeights(soft_prompt=soft_prompt_of(model)))
    modules = modules_named(model, config.modules_to_save or ())
    if config.fine_tune_type != "soft_prompt":
        description |= add_adapters(model, config, without=modules)
    if modules:
        train_modules(model, modules)
        description["modules_to_save"] = modules
    if config.soft_prompt_length != 0:
        rows = _first_rows(model, config, tokenizer)
        set_soft_prompt(model, rows)
        model.unfreeze(keys=[SOFT_PROMPT])  # it may be one that the base came with
        description["soft_prompt_tokens"] = rows.shape[0]
    return description


def _first_rows(model: nn.Module, config: TrainingConfig, tokenizer: TokenizerWrapper | None) -> mx.array:
    vocabulary = len(tokenizer) if tokenizer is not None else None
    if config.soft_prompt_text is None:
        here = soft_prompt_of(model)
        if here is not None and config.soft_prompt_tokens in (None, here.shape[0]):
            return here  # the base came with one: it goes on from there
        return first_rows(model, config.soft_prompt_length, None, config.seed, vocabulary)
    ids = encode(tokenizer, config.soft_prompt_text) if tokenizer is not None else []
    if not ids:
        raise InvalidConfigurationError(
            f"soft_prompt_text: {config.soft_prompt_text!r:.80} has no tokens to begin from; give a text with some"
        )
    return first_rows(model, config.soft_prompt_length, ids, config.seed)


def _unfreeze_all(model: nn.Module, reason: str) -> None:
    if any("scales" in module and module["weight"].dtype == mx.uint32 for module in model.modules()):
        raise InvalidConfigurationError(
            f'{reason} is quantised and packed weights have no gradient; set fine_tune_type to "lora", or give the '
            "model in 16 or 32 bits"
        )
    model.set_dtype(mx.float32)
    model.unfreeze()


def check_goes_on(config: TrainingConfig, description: Mapping[str, Any]) -> None:
    """Refuse to train every weight where an adapter is loaded: it would be the adapter that trains."""
    kind = description.get("fine_tune_type", "lora")
    if config.fine_tune_type == "full" and kind != "full":
        raise InvalidConfigurationError(
            f'fine_tune_type: "full" trains every weight, and adapter_path ({config.adapter_path}) is an adapter '
            f"({kind}), which would train alone; leave fine_tune_type out to go on with it, or fuse it with the model "
            "first (main.py fuse)"
        )


def _resume_adapter(model: nn.Module, config: TrainingConfig) -> dict[str, Any]:
    folder = Path(str(config.adapter_path)).expanduser()
    description = load_adapter(model, folder)
    if description.get("fine_tune_type") == "full":
        _unfreeze_all(model, f'adapter_path: {folder} holds every weight, but the base "{config.model_name}"')
        return description
    check_goes_on(config, description)
    for _, module in adapter_layers(model):
        names = [name for name in LEAVES if name in module]
        module.unfreeze(keys=names, recurse=False)
        # Like fresh adapters: a file in 16 bits would make them train, and stand still, in 16 bits.
        module.update({name: module[name].astype(mx.float32) for name in names})
    if soft_prompt_length(description):
        model.unfreeze(keys=[SOFT_PROMPT])
    return description
