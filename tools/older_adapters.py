"""Adapters of mlx-rlhf, one ``.npz`` file each, as adapter folders.

Its files hold the arrays that trained by the names of its module tree: ``model.layers.N.….lora_a`` (inputs, r) and
``lora_b`` (r, outputs), which are mlx-lm's shapes, or ``prompts.weight`` (n, D), and a value head beside them. Rank and
layers follow from the arrays; the scale is written nowhere, and its ``sft.py`` has 10.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from base_setup.lora_setup import DESCRIPTION, WEIGHTS, load_adapter
from base_setup.parameters import named_arrays
from base_setup.soft_prompt import set_soft_prompt
from config.errors import CheckpointError, InvalidConfigurationError
from models.sft_model import share_weights
from tools.loading import read_model
from tools.saving import check_new, fresh_folder

SCALE = 10.0  # mlx-rlhf's
_LORA = re.compile(r"(?:model\.)?(model\.layers\.(\d+)\.[\w.]+)\.(lora_[ab])")
_PROMPT = "prompts.weight"


def convert_adapter(
    file: str | Path,
    name: str,
    path: str | Path,
    *,
    scale: float = SCALE,
    trust_remote_code: bool = False,
) -> str:
    """Write mlx-rlhf's adapter ``file`` for the base ``name`` as the new adapter folder ``path``.

    The base is loaded to see that the adapter fits it. Nothing in the file is unpickled.

    Returns:
        What was done, in a line or two.
    Raises:
        ToolkitError: a sentence; nothing of ``path`` is left then.
    """
    check_new(path, "--mlx-path")
    arrays = read_arrays(Path(file).expanduser())
    left = sorted(key for key in arrays if "value_head." in key)
    weights = {key: array for key, array in arrays.items() if key not in left}
    with fresh_folder(path, "--mlx-path") as folder:
        model = read_model(name, trust_remote_code=trust_remote_code, field="--hf-path").model
        if set(weights) == {_PROMPT}:
            described, stored = _soft_prompt(model, weights[_PROMPT])
        else:
            described, stored = _low_rank(Path(file), weights, len(model.layers), scale)
        mx.save_safetensors(str(folder / WEIGHTS), stored)
        description = json.dumps({**described, "model": name}, indent=2)
        (folder / DESCRIPTION).write_text(description + "\n", encoding="utf-8")
        try:
            load_adapter(share_weights(model), folder)
        except CheckpointError as error:  # it names the folder that nothing is left of
            raise CheckpointError(f"--adapter-file: {str(error).replace(str(folder), str(file))}") from error
    done = f"{path}: {described['fine_tune_type']} adapter with {len(stored)} arrays"
    if left:
        done += f"\nleft out: {', '.join(left)}; reward models and critics have files of their own"
    return done


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by name, none of them of Python objects.

    Raises:
        CheckpointError: it is not there, is no such file, or holds something that is no matrix of numbers.
    """
    if not file.is_file():
        raise CheckpointError(f'--adapter-file: there is no file "{file}"')
    try:
        with zipfile.ZipFile(file), np.load(file, allow_pickle=False) as content:
            arrays = {str(key): content[key] for key in content.files}
    except Exception as error:  # a damaged archive raises nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f'--adapter-file: "{file}" cannot be read ({reason}); an .npz file of plain arrays '
            "is expected, as mlx-rlhf's sft.py and ppo_training.py write"
        ) from error
    for key, array in arrays.items():
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise CheckpointError(
                f"--adapter-file: {file}: {key} is of {array.dtype}; floating numbers of 16 to 64 bits are expected"
            )
    if not arrays:
        raise CheckpointError(f"--adapter-file: {file} holds no arrays")
    return arrays


def _low_rank(
    file: Path, arrays: dict[str, np.ndarray], blocks: int, scale: float
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Description and weights of low-rank layers, which are named by their whole paths."""
    stored: dict[str, mx.array] = {}
    paths, ranks = set[str](), set[int]()
    for key, array in arrays.items():
        match = _LORA.fullmatch(key)
        if match is None or array.ndim != 2:
            raise CheckpointError(
                f"--adapter-file: {file}: {key} {array.shape} is no part of an adapter that mlx-rlhf writes; "
                f"…lora_a and …lora_b of layers are expected, or {_PROMPT} alone"
            )
        paths.add(match[1])
        ranks.add(array.shape[1 if match[3] == "lora_a" else 0])
        stored[f"{match[1]}.{match[3]}"] = mx.array(array)
    if len(ranks) != 1:
        raise CheckpointError(f"--adapter-file: {file}: one rank is expected, found {sorted(ranks)}")
    if not 0 < scale < math.inf:
        raise InvalidConfigurationError(f"--lora-scale: a number above 0 is expected, found {scale}")
    parameters = {"rank": ranks.pop(), "scale": scale, "dropout": 0.0, "keys": sorted(paths)}
    return {"fine_tune_type": "lora", "num_layers": blocks, "lora_parameters": parameters}, stored


def _soft_prompt(model: Any, rows: np.ndarray) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Description and weights of vectors that stand before every prompt."""
    copy = share_weights(model)
    set_soft_prompt(copy, mx.array(rows))
    stored = {k: x for k, x in named_arrays(copy.parameters()).items() if k.endswith(".soft_prompt")}
    return {
        "fine_tune_type": "soft_prompt",
        "num_layers": len(model.layers),
        "soft_prompt_tokens": rows.shape[0],
    }, stored
