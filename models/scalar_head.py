"""A language model's trunk with one number per position in place of the vocabulary: critics and reward models."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from base_setup.parameters import named_arrays
from config.errors import CheckpointError, ModelLoadError
from token_attribution.trunk import Trunk, find_trunk


class ScalarHead(nn.Module):
    """The trainable module: ``model`` (of which only the trunk runs) and a float32 linear ``head``."""

    def __init__(self, model: nn.Module, width: int, init_std: float, key: mx.array) -> None:
        """``init_std`` 0 gives a head that says 0 everywhere until it has learned something."""
        super().__init__()
        self.model = model
        self.head = nn.Linear(width, 1)
        self.head.weight = mx.random.normal((1, width), key=key) * init_std
        self.head.bias = mx.zeros((1,))


def require_trunk(model: nn.Module, purpose: str, *, checkpoint: bool = False) -> Trunk:
    """The model's trunk, or a refusal that says what needed it; ``checkpoint``: see :func:`find_trunk`."""
    trunk = find_trunk(model, checkpoint=checkpoint)
    if trunk is None:
        raise ModelLoadError(
            f"{purpose} needs the model's hidden states, which the architecture {type(model).__module__} does "
            "not expose as .model; use another base model for it"
        )
    return trunk


def trunk_width(trunk: Trunk) -> int:
    """Width D of the hidden states."""
    return int(trunk.hidden(mx.array([[0]])).shape[-1])


def save_head(head: nn.Linear, path: Path) -> None:
    """Write a head to its own file: mlx-lm refuses an adapter file with tensors that it does not know."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(path), {"weight": head.weight, "bias": head.bias})
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the head could not be written ({error})") from error


def load_head(head: nn.Linear, path: Path) -> None:
    """Read what :func:`save_head` wrote into ``head``."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file, so the scalar head cannot be restored")
    try:
        weights = named_arrays(mx.load(str(path)))
        mx.eval(weights)  # loading is lazy, and the file may be overwritten later
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the head could not be read ({error})") from error
    expected = {name: x.shape for name, x in named_arrays(head.parameters()).items()}
    found = {name: x.shape for name, x in weights.items()}
    if found != expected:
        raise CheckpointError(f"{path}: a head with the shapes {expected} is expected, found {found}")
    head.update(weights)
