"""From an adapted model back to its base, and to a model with its adapters fused."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn
from mlx.utils import tree_unflatten

from base_setup.adapter_layers import adapter_layers, fuse_layers, wrapped
from base_setup.base_weights import base_weights, set_base_weights, write_arrays
from base_setup.parameters import named_arrays
from base_setup.soft_prompt import NAME, remove_soft_prompt, set_soft_prompt, soft_prompt_of


def strip_adapters(model: nn.Module) -> nn.Module:
    """Make the model its base, in place, for good: plain layers, the base's numbers, no soft prompt but its own."""
    model.update_modules(tree_unflatten([(path, wrapped(layer)) for path, layer in adapter_layers(model)]))
    base = base_weights(model)
    write_arrays(model, base.arrays)
    if base.soft_prompt is None:
        remove_soft_prompt(model)
    else:
        set_soft_prompt(model, base.soft_prompt)
    set_base_weights(model, None)
    return model


def fuse_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters' updates to the weights they adapt, in place: a plain model again, a base for others.

    A soft prompt is no weight of a plain model; it stays in front.
    """
    fuse_layers(model)
    set_base_weights(model, None)
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block ``model`` is the base model, bit for bit: what was added to it steps aside.

    Do not use it inside a compiled function: what was traced with the adapters on stays on.
    """
    layers, rows, base = adapter_layers(model), soft_prompt_of(model), base_weights(model)
    now = named_arrays(model.parameters())
    trained = {path: now[path] for path in base.arrays}
    rows_train = any(name.endswith(NAME) for name in named_arrays(model.trainable_parameters()))
    strip_adapters(model)
    try:
        yield model
    finally:
        if layers:
            model.update_modules(tree_unflatten(layers))
        write_arrays(model, trained)
        set_base_weights(model, base)
        if rows is not None:
            set_soft_prompt(model, rows)
            (model.unfreeze if rows_train else model.freeze)(keys=[NAME])
