"""The parameters of a model as a flat, typed dictionary, and how many of them train."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree (``model.parameters()``, an optimiser's state) by dotted path."""
    return cast(dict[str, mx.array], dict(tree_flatten(tree)))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many there are (a quantised weight counts its packed words)."""
    trainable = sum(x.size for x in named_arrays(model.trainable_parameters()).values())
    return trainable, sum(x.size for x in named_arrays(model.parameters()).values())


def describe_trainable(model: nn.Module) -> str:
    """How much trains, as a line.

    >>> layer = nn.Linear(9, 10)
    >>> describe_trainable(layer.freeze(keys="weight"))
    '10 of 100 parameters train (10 %)'
    """
    trainable, total = count_parameters(model)
    return f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.3g} %)"
