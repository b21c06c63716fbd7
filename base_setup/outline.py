"""A model's modules without its weights: what fits it is known before anything is loaded."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes

from base_setup.adapter_files import fit_adapter
from base_setup.lora_setup import check_goes_on, prepare_trainable
from config.errors import InvalidConfigurationError
from config.training_config import TrainingConfig


def outline(settings: Mapping[str, Any]) -> nn.Module | None:
    """The model that a ``config.json`` describes, plain, its numbers never computed: MLX draws them when asked.

    None where mlx-lm alone does not know the architecture, which loading it says.
    """
    if "model_file" in settings:  # Python of the model's own, which loading asks about
        return None
    try:
        model_class, args_class = _get_classes(dict(settings))
        model: nn.Module = model_class(args_class.from_dict(dict(settings)))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError):
        return None
    return model


def check_what_trains(
    settings: Mapping[str, Any], config: TrainingConfig, tokenizer: TokenizerWrapper | None = None
) -> None:
    """Refuse blocks, layers, modules or an adapter that the model does not have, and a soft prompt that it cannot.

    Args:
        settings: the contents of its ``config.json``. tokenizer: needed for ``soft_prompt_text``.
    Raises:
        InvalidConfigurationError, CheckpointError: as loading the model and preparing it would.
    """
    if config.fine_tune_type == "full" and config.adapter_path is None and settings.get("quantization"):
        raise InvalidConfigurationError(
            f'fine_tune_type: "full" trains every weight, but "{config.model_name}" is quantised and packed weights '
            'have no gradient; set fine_tune_type to "lora", or give the model in 16 or 32 bits'
        )
    model = outline(settings)
    if model is None:
        return
    if config.adapter_path is not None:
        check_goes_on(config, fit_adapter(model, Path(config.adapter_path).expanduser()))
    else:
        prepare_trainable(model, config, tokenizer)
