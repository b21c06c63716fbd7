"""Low-rank layers in mlx-lm's own modules: which layers get one, which have one, and how they are fused.

LoRA is Hu et al. 2021 (https://arxiv.org/abs/2106.09685), DoRA Liu et al. 2024 (https://arxiv.org/abs/2402.09353),
the rank-stabilised scale Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732). Layers of a mixture of experts get one
adapter per expert. mlx-lm has no DoRA for those, nor for some quantised layers, and they stay as they are.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from config.declaration import nearest
from config.errors import InvalidConfigurationError
from config.training_config import TrainingConfig, block_numbers

LEAVES = ("lora_a", "lora_b", "m")

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear)


def add_adapters(model: nn.Module, config: TrainingConfig, without: Iterable[str] = ()) -> dict[str, Any]:
    """Give layers of ``model`` the adapters that ``config`` describes, in place; their part of the description.

    Args:
        without: paths of modules that train whole and need no adapter.
    Raises:
        InvalidConfigurationError: for a block or a layer that is not there, or that cannot have such an adapter.
    """
    blocks = len(model.layers)
    if config.lora_layers > blocks:
        raise InvalidConfigurationError(
            f"lora_layers: {config.lora_layers} is more than the model's {blocks} blocks; use -1 for all"
        )
    use_dora = config.fine_tune_type == "dora"
    parameters: dict[str, Any] = {
        "rank": config.lora_r,
        "scale": config.lora_scale,
        "dropout": config.lora_dropout,
    }
    keys = _keys(model, config, tuple(without))
    if keys is not None:
        parameters["keys"] = keys
    layers = config.lora_layers if config.lora_layers > 0 else blocks
    # mlx-lm draws the adapters from MLX's global state; dropout later draws from it too.
    mx.random.seed(config.seed)
    place_adapters(model, layers, parameters, use_dora=use_dora)
    return {"num_layers": layers, "lora_parameters": parameters}


def place_adapters(model: nn.Module, layers: int, parameters: dict[str, Any], *, use_dora: bool) -> None:
    """mlx-lm's adapters as their description has them, in place."""
    linear_to_lora_layers(model, layers, parameters, use_dora=use_dora)


def adapter_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The adapted layers of ``model`` by path: modules that wrap another linear or embedding layer."""
    return [(path, m) for path, m in model.named_modules() if "lora_a" in m]


def wrapped(layer: nn.Module) -> nn.Module:
    """The layer that an adapter is around."""
    return layer["linear"] if "linear" in layer else layer["embedding"]


def fuse_layers(model: nn.Module) -> None:
    """Add the adapters' updates to the weights they adapt, in place."""
    fused = [(path, layer.fuse()) for path, layer in adapter_layers(model)]
    model.update_modules(tree_unflatten(fused))


def _keys(model: nn.Module, config: TrainingConfig, without: tuple[str, ...]) -> list[str] | None:
    """The names that mlx-lm is to adapt; None: every linear layer of the blocks, as it would by itself.

    mlx-lm counts blocks from the last. Others are named by their whole paths, which it reads as well.
    """
    use_dora = config.fine_tune_type == "dora"
    paths = {id(module): path for path, module in model.named_modules()}
    chosen = _chosen_blocks(model, config)
    inside: dict[str, nn.Module] = {}  # adaptable layers of the chosen blocks by whole path
    for number in chosen:
        block = model.layers[number]
        for name, module in block.named_modules():
            if hasattr(module, "to_lora") or isinstance(module, _LINEAR + _EMBEDDING + _EXPERTS):
                inside[f"{paths[id(block)]}.{name}"] = module
    blocks = {paths[id(block)] + "." for block in model.layers}
    outside: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _LINEAR + _EMBEDDING) and not any(path.startswith(block) for block in blocks)
    }
    wanted = dict(inside)
    if config.lora_modules is not None:
        wanted = _named(config.lora_modules, inside, outside)
    kept = {
        path: module
        for path, module in wanted.items()
        if not any(path == name or path.startswith(name + ".") for name in without)
    }
    if use_dora:
        kept = {path: module for path, module in kept.items() if isinstance(module, _LINEAR + _EMBEDDING)}
        _check_dora(kept)
    if not kept:
        raise InvalidConfigurationError(
            f"fine_tune_type: no layer of this architecture ({type(model).__module__}) can have a "
            f"{config.fine_tune_type} adapter of its own; choose others in lora_modules, or use lora"
        )
    if kept.keys() == inside.keys() and config.lora_blocks is None:
        return None
    return sorted(kept)


def _chosen_blocks(model: nn.Module, config: TrainingConfig) -> list[int]:
    blocks = len(model.layers)
    if config.lora_blocks is None:
        return list(range(blocks - config.lora_layers if config.lora_layers > 0 else 0, blocks))
    numbers = block_numbers(config.lora_blocks)
    if numbers[-1] >= blocks:
        raise InvalidConfigurationError(
            f'lora_blocks: "{config.lora_blocks}" names block {numbers[-1]}, and the model\'s {blocks} blocks are '
            f"numbered 0 to {blocks - 1}"
        )
    return numbers


def _named(
    names: Iterable[str], inside: dict[str, nn.Module], outside: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name in names:
        matching = {path: m for path, m in (inside | outside).items() if is_named(path, name)}
        if not matching:
            valid = sorted(
                {part for path in inside | outside for part in path.split(".") if not part.isdigit()}
            )
            raise InvalidConfigurationError(
                f'lora_modules: the chosen blocks have no layer "{name}"{nearest(name, valid)}; there are '
                f"{', '.join(sorted({path.rsplit('.', 1)[-1] for path in inside | outside}))}"
            )
        found |= matching
    return found


def is_named(path: str, name: str) -> bool:
    """Whether ``name`` is a run of parts of ``path``: ``q_proj``, ``self_attn`` and ``layers.3`` are, ``proj`` is not.

    >>> is_named("model.layers.3.self_attn.q_proj", "layers.3")
    True
    """
    return f".{name}." in f".{path}."


def _check_dora(layers: dict[str, nn.Module]) -> None:
    for path, layer in layers.items():
        bits = layer.bits if hasattr(layer, "bits") else None
        if isinstance(layer, nn.QuantizedEmbedding) or bits not in (None, 2, 4, 8):
            what = "an embedding" if isinstance(layer, nn.QuantizedEmbedding) else "a layer"
            raise InvalidConfigurationError(
                f"fine_tune_type: {path} is {what} quantised to {bits} bits, and mlx-lm has DoRA for linear layers of "
                "2, 4 and 8 bits; use lora, or another base"
            )
