"""What the base had before something was added to it: numbers of modules that train whole, its soft prompt.

An optimiser replaces arrays and never writes into them, so keeping the base's numbers costs nothing until a module
has moved, and then its own size once, however many copies of the tree there are.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Iterable, Mapping
from typing import Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from base_setup.adapter_layers import is_named
from base_setup.parameters import named_arrays
from config.declaration import nearest
from config.errors import InvalidConfigurationError

_ATTRIBUTE = "_base_weights"


class BaseWeights:
    """Numbers that the base had. They are never written to, so all copies of a tree share one object.

    Attributes:
        arrays: of the modules that train whole, by path.
        soft_prompt: the vectors (n, D) that it came with, if it is the result of an earlier stage.
    """

    def __init__(
        self, arrays: Mapping[str, mx.array] | None = None, soft_prompt: mx.array | None = None
    ) -> None:
        self.arrays = dict(arrays or {})
        self.soft_prompt = soft_prompt

    def __deepcopy__(self, memo: object) -> Self:
        return self


def base_weights(model: nn.Module) -> BaseWeights:
    """What was kept of the base; nothing where nothing was added to it."""
    return getattr(model, _ATTRIBUTE, None) or BaseWeights()


def set_base_weights(model: nn.Module, weights: BaseWeights | None) -> None:
    """Note ``weights`` as the base's, or nothing."""
    object.__setattr__(model, _ATTRIBUTE, weights)


def train_modules(model: nn.Module, paths: Iterable[str]) -> None:
    """Let all weights of these modules train, in float32, and keep the base's numbers of them."""
    kept: dict[str, mx.array] = {}
    for path in paths:
        module = dict(model.named_modules())[path]
        module.unfreeze()
        for name, array in named_arrays(module.parameters()).items():
            kept[f"{path}.{name}"] = array
        module.set_dtype(mx.float32)
    if kept:
        set_base_weights(model, BaseWeights(kept, base_weights(model).soft_prompt))


def write_arrays(model: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Put arrays by path into the tree."""
    if arrays:
        model.update(tree_unflatten(list(arrays.items())))


def modules_named(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names, the outermost where several are inside each other.

    Raises:
        InvalidConfigurationError: for a name that no module has, or one of a quantised module.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    paths: list[str] = []
    for name in names:
        matching = [path for path in modules if is_named(path, name) and path.endswith(name)]
        if not matching:
            valid = sorted({part for path in modules for part in path.split(".") if not part.isdigit()})
            tied = "; its head is the embedding: name that" if name == "lm_head" else nearest(name, valid)
            raise InvalidConfigurationError(f'modules_to_save: the model has no module "{name}"{tied}')
        paths += matching
    paths = [p for p in dict.fromkeys(paths) if not any(p.startswith(other + ".") for other in paths)]
    for path in paths:
        if any("scales" in module for module in modules[path].modules()):
            raise InvalidConfigurationError(
                f"modules_to_save: {path} is quantised, and packed weights have no gradient; leave it out, or give "
                "the model in 16 or 32 bits"
            )
        if not named_arrays(modules[path].parameters()):
            raise InvalidConfigurationError(f"modules_to_save: {path} has no weights; leave it out")
    return paths
