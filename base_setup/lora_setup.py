"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685), in mlx-lm's own modules and files.

An adapter folder written here is what ``mlx_lm.generate --adapter-path``, ``mlx_lm.fuse`` and
``mlx_lm.load(..., adapter_path=…)`` read. Our own extras (value heads, trainer state) never go into
``adapters.safetensors``, because mlx-lm refuses tensors that it does not know.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from base_setup.parameters import named_arrays
from base_setup.untrusted import check_adapter_folder
from config.errors import CheckpointError, InvalidConfigurationError
from config.training_config import TrainingConfig

WEIGHTS, DESCRIPTION = "adapters.safetensors", "adapter_config.json"


def prepare_trainable(model: nn.Module, config: TrainingConfig) -> dict[str, Any]:
    """Freeze ``model`` but for what ``config`` trains, in place; returns its adapter description.

    ``lora``: the base is frozen and its linear layers get adapters whose update is zero at first, so the
    model computes exactly what it did. ``full``: every weight trains, in float32, because steps of the
    size that RL takes vanish in bfloat16.
    """
    model.freeze()
    layers = len(model.layers)
    if config.lora_layers > layers:
        raise InvalidConfigurationError(
            f"lora_layers: {config.lora_layers} is more than the model's {layers} blocks; use -1 for all"
        )
    description: dict[str, Any] = {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.lora_layers if config.lora_layers > 0 else layers,
        "model": config.model_name,
    }
    if config.adapter_path is not None:
        return _resume_adapter(model, config)
    if config.fine_tune_type == "full":
        _unfreeze_all(model, f'fine_tune_type: "full" trains every weight, but "{config.model_name}"')
        return description
    description["lora_parameters"] = {
        "rank": config.lora_r,
        "scale": config.lora_alpha / config.lora_r,  # mlx-lm's scale is alpha / r
        "dropout": config.lora_dropout,
    }
    # mlx-lm draws the adapters from MLX's global state; dropout later draws from it too.
    mx.random.seed(config.seed)
    linear_to_lora_layers(model, description["num_layers"], description["lora_parameters"])
    return description


def _unfreeze_all(model: nn.Module, reason: str) -> None:
    if any("scales" in module and module["weight"].dtype == mx.uint32 for module in model.modules()):
        raise InvalidConfigurationError(
            f'{reason} is quantised and packed weights have no gradient; set fine_tune_type to "lora", or give the '
            "model in 16 or 32 bits"
        )
    model.set_dtype(mx.float32)
    model.unfreeze()


def _resume_adapter(model: nn.Module, config: TrainingConfig) -> dict[str, Any]:
    folder = Path(str(config.adapter_path)).expanduser()
    description = load_adapter(model, folder)
    if description.get("fine_tune_type") == "full":
        _unfreeze_all(model, f'adapter_path: {folder} holds every weight, but the base "{config.model_name}"')
    else:
        for _, module in adapter_layers(model):
            names = [name for name in ("lora_a", "lora_b", "m") if name in module]
            module.unfreeze(keys=names, recurse=False)
            # Like fresh adapters: a file in 16 bits would make them train, and stand still, in 16 bits.
            module.update({name: module[name].astype(mx.float32) for name in names})
    return description


def adapter_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The adapted layers of ``model`` by path: modules that wrap another linear or embedding layer."""
    return [(path, m) for path, m in model.named_modules() if "lora_a" in m]


def _wrapped(layer: nn.Module) -> nn.Module:
    return layer["linear"] if "linear" in layer else layer["embedding"]


def strip_adapters(model: nn.Module) -> nn.Module:
    """Put the wrapped layers back in place of their adapters, in place, for good."""
    model.update_modules(tree_unflatten([(path, _wrapped(layer)) for path, layer in adapter_layers(model)]))
    return model


def fuse_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters' updates to the weights they adapt, in place: a plain model again, a base for others."""
    fused = [(path, layer.fuse()) for path, layer in adapter_layers(model)]
    model.update_modules(tree_unflatten(fused))
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block ``model`` is the base model, bit for bit: its adapted layers step aside.

    Do not use it inside a compiled function: what was traced with the adapters on stays on.
    """
    layers = adapter_layers(model)
    strip_adapters(model)
    try:
        yield model
    finally:
        if layers:
            model.update_modules(tree_unflatten(layers))


def save_adapter(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    """Write the trainable weights and their description in mlx-lm's layout."""
    weights = named_arrays(model.trainable_parameters())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / WEIGHTS), weights)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: the adapter could not be written ({error}); free some space or choose another folder"
        ) from error


def read_description(folder: Path) -> dict[str, Any]:
    """The parsed ``adapter_config.json`` of an adapter folder."""
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: {name} is missing; an adapter folder holds {WEIGHTS} and {DESCRIPTION}"
            )
    check_adapter_folder(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / DESCRIPTION}: not valid JSON ({error})") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{folder / DESCRIPTION}: a JSON object is expected")
    return description


def load_adapter(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Load an adapter folder onto a bare base, making its adapters; returns its description."""
    description = read_description(folder)
    try:
        load_adapters(model, str(folder))
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError, TypeError) as error:
        raise _misfit(folder, str(error)) from error
    mx.eval(model.parameters())  # the file may be overwritten later, and loading is lazy
    return description


def restore_adapter(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    """Load an adapter folder into a model that is prepared already; nothing changes unless everything fits."""
    saved = read_description(folder)
    for key in ("fine_tune_type", "lora_parameters"):
        if saved.get(key) != description.get(key):
            raise _misfit(folder, f"{key} is {saved.get(key)}, here it is {description.get(key)}")
    try:
        weights = named_arrays(mx.load(str(folder / WEIGHTS)))
    except RuntimeError as error:
        raise _misfit(folder, str(error)) from error
    mine = {name: x.shape for name, x in named_arrays(model.trainable_parameters()).items()}
    found = {name: x.shape for name, x in weights.items()}
    differing = sorted(name for name in mine.keys() | found.keys() if mine.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise _misfit(folder, f"{name} has shape {found.get(name)}, here it is {mine.get(name)}")
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters())  # the file may be overwritten later, and loading is lazy


def _misfit(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: this adapter does not fit the model ({reason}); was it trained with other settings or on "
        "another base?"
    )
