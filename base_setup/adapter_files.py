"""Adapter folders in mlx-lm's layout: ``adapters.safetensors`` and ``adapter_config.json``.

What is low-rank alone, or every weight, is what ``mlx_lm.generate --adapter-path``, ``mlx_lm.fuse`` and
``mlx_lm.load(..., adapter_path=…)`` read. A soft prompt and modules that trained whole stand in the same file, so that
mlx-lm, which knows neither, refuses the folder instead of reading half of it; :func:`load_adapter` reads all. Our
own extras (value heads, trainer state) are in files of their own.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from base_setup.adapter_layers import LEAVES, place_adapters
from base_setup.base_weights import BaseWeights, modules_named, set_base_weights, train_modules, write_arrays
from base_setup.parameters import named_arrays
from base_setup.soft_prompt import NAME as SOFT_PROMPT
from base_setup.soft_prompt import set_soft_prompt, soft_prompt_of
from base_setup.untrusted import check_adapter_folder
from config.errors import CheckpointError, InvalidConfigurationError

WEIGHTS, DESCRIPTION = "adapters.safetensors", "adapter_config.json"
SHOWN, LONGEST = 3, 400  # differences named in a refusal, and its letters


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
    """The parsed ``adapter_config.json`` of an adapter folder.

    Raises:
        CheckpointError: a file where a folder is expected, or a folder that lacks one of the two.
    """
    if folder.is_file():
        raise CheckpointError(a_file(folder))
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


def a_file(path: Path) -> str:
    """What to say of a file that is given as an adapter."""
    if path.suffix == ".npz":
        return (
            f'"{path}" is a file of NumPy arrays, as mlx-rlhf writes adapters; python main.py convert --hf-path BASE '
            f"--adapter-file {path} --mlx-path FOLDER makes an adapter folder of it"
        )
    return f'"{path}" is a file; give the folder that holds {WEIGHTS} and {DESCRIPTION}'


def soft_prompt_length(description: Mapping[str, Any]) -> int:
    """How many vectors the described adapter puts in front of every prompt; 0: it has no soft prompt.

    Alone or beside low-rank adapters, they are ``soft_prompt_tokens`` of the description.

    Raises:
        InvalidConfigurationError: it is no number of vectors.

    >>> soft_prompt_length({"fine_tune_type": "lora", "soft_prompt_tokens": 4})
    4
    """
    length = description.get("soft_prompt_tokens") or 0
    if type(length) is not int or length < 0:
        raise InvalidConfigurationError(
            f"{DESCRIPTION}: soft_prompt_tokens: a whole number from 0 up is expected, found {length!r:.80}"
        )
    return length


def load_adapter(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Load an adapter folder onto a bare base, making its adapters; returns its description.

    Raises:
        CheckpointError: in a sentence, where the folder is incomplete or does not fit the model.
    """
    description = fit_adapter(model, folder)
    mx.eval(model.parameters())  # the file may be overwritten later, and loading is lazy
    return description


def fit_adapter(model: nn.Module, folder: Path) -> dict[str, Any]:
    """:func:`load_adapter` without computing a number: to see whether it fits, the model needs no weights.

    Raises:
        CheckpointError: as :func:`load_adapter` does.
    """
    description = read_description(folder)
    try:
        weights = named_arrays(mx.load(str(folder / WEIGHTS)))
        _load(model, description, weights)
    except (
        ValueError,
        RuntimeError,
        KeyError,
        OSError,
        AttributeError,
        TypeError,
        InvalidConfigurationError,
    ) as error:
        raise _misfit(folder, str(error)) from error
    return description


def _load(model: nn.Module, description: dict[str, Any], weights: dict[str, mx.array]) -> None:
    kind = description.get("fine_tune_type", "lora")
    rows = next((x for name, x in weights.items() if name.rsplit(".", 1)[-1] == SOFT_PROMPT), None)
    modules = modules_named(model, description.get("modules_to_save", ()))
    if kind not in ("full", "soft_prompt"):
        for key in ("num_layers", "lora_parameters"):
            if key not in description:
                raise ValueError(f"{DESCRIPTION} has no {key}")
        place_adapters(
            model, description["num_layers"], description["lora_parameters"], use_dora=kind == "dora"
        )
    set_base_weights(model, BaseWeights(soft_prompt=soft_prompt_of(model)))
    train_modules(model, modules)
    if rows is not None:
        set_soft_prompt(model, rows)
    elif soft_prompt_length(description):
        raise ValueError(f"{SOFT_PROMPT} is missing")
    here = named_arrays(model.parameters())
    leaves = (*LEAVES, SOFT_PROMPT) if rows is not None else LEAVES
    prefixes = tuple(f"{path}." for path in modules)
    mine = {
        name: x.shape
        for name, x in here.items()
        if kind == "full" or name.rsplit(".", 1)[-1] in leaves or name.startswith(prefixes)
    }
    found = {name: x.shape for name, x in weights.items()}
    if kind == "full":  # what it leaves out stays the base's
        mine = {name: shape for name, shape in mine.items() if name in found}
    differing = _differences(found, mine)
    if differing:
        raise ValueError(differing)
    write_arrays(model, weights)


def restore_adapter(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    """Load an adapter folder into a model that is prepared already; nothing changes unless everything fits."""
    saved = read_description(folder)
    for key in ("fine_tune_type", "lora_parameters", "modules_to_save"):
        if saved.get(key) != description.get(key):
            raise _misfit(folder, f"{key} is {saved.get(key)}, here it is {description.get(key)}")
    try:
        weights = named_arrays(mx.load(str(folder / WEIGHTS)))
    except RuntimeError as error:
        raise _misfit(folder, str(error)) from error
    mine = {name: x.shape for name, x in named_arrays(model.trainable_parameters()).items()}
    found = {name: x.shape for name, x in weights.items()}
    differing = _differences(found, mine)
    if differing:
        raise _misfit(folder, differing)
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters())  # the file may be overwritten later, and loading is lazy


def _differences(found: Mapping[str, tuple[int, ...]], mine: Mapping[str, tuple[int, ...]]) -> str:
    """What differs between a file's shapes and the model's, the first few by name; empty where nothing does."""
    said = []
    for name in sorted(found.keys() | mine.keys()):
        if name not in mine:
            said.append(f"{name} is no adapter parameter of the model")
        elif name not in found:
            said.append(f"{name} is missing")
        elif found[name] != mine[name]:
            said.append(f"{name} has shape {found[name]}, here it is {mine[name]}")
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + more


def _misfit(folder: Path, reason: str) -> CheckpointError:
    reason = (reason.strip() or "no reason given").splitlines()[0][:LONGEST]
    return CheckpointError(
        f"{folder}: this adapter does not fit the model ({reason}); was it trained with other settings or on "
        "another base?"
    )
