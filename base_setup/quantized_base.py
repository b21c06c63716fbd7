"""A base quantised while it is loaded, for adapters to train over (QLoRA, https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import quantize_model

from config.errors import InvalidConfigurationError
from config.training_config import TrainingConfig


def quantize_base(model: nn.Module, model_config: dict[str, Any], config: TrainingConfig) -> dict[str, Any]:
    """Quantise ``model`` in place as ``config`` asks for; its config.json as it is then.

    Layers whose width the group size does not divide, and those that mlx-lm leaves alone in an architecture, stay as
    they are. A model that is quantised so already is left alone.

    Raises:
        InvalidConfigurationError: for a model quantised in another way, or one without a single fitting layer.
    """
    if config.quantize_base is None:
        return model_config
    group = config.quantize_group_size or {"affine": 64, "nvfp4": 16}.get(config.quantize_mode, 32)
    asked = {"group_size": group, "bits": config.quantize_base, "mode": config.quantize_mode}
    there = [module for module in model.modules() if "scales" in module]
    if there:
        found = {"group_size": there[0].group_size, "bits": there[0].bits, "mode": there[0].mode}
        if found == asked:
            return model_config
        raise InvalidConfigurationError(
            f"quantize_base: the model is quantised already, to {found['bits']} bits in groups of "
            f"{found['group_size']} ({found['mode']}); leave it out, or give the model in 16 or 32 bits"
        )
    _, quantized = quantize_model(model, model_config, group, config.quantize_base, mode=config.quantize_mode)
    if not any("scales" in module for module in model.modules()):
        widths = sorted({m["weight"].shape[-1] for m in model.modules() if hasattr(m, "to_quantized")})
        raise InvalidConfigurationError(
            f"quantize_group_size: no layer of the model has an input width that is a multiple of {group} (there are "
            f"{', '.join(map(str, widths))}); choose a smaller one"
        )
    mx.eval(model.parameters())
    return dict(quantized)
