"""Activation checkpointing: each block keeps its input alone, and is computed again in the backward pass.

Memory for activations falls from all that a block computes to one hidden state per block and token, and a gradient
pass takes about a third longer (Chen et al. 2016, https://arxiv.org/abs/1604.06174). Values are the same to the last
bit, gradients up to the order of their sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from token_attribution.host_kernels import fast_kernels
from token_attribution.host_math import alone, usable
from token_attribution.shared_prompts import ContinuedKeys, PromptKeys


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block these layers, called in a gradient pass, forget what they compute."""
    plain = [type(layer) for layer in layers]
    for layer, kind in zip(layers, plain, strict=True):
        object.__setattr__(layer, "__class__", _forgetful(kind))
    try:
        yield
    finally:
        for layer, kind in zip(layers, plain, strict=True):
            object.__setattr__(layer, "__class__", kind)


@cache
def _forgetful(kind: type) -> type:
    """``kind`` with a ``__call__`` that forgets."""

    def call(layer: Any, x: mx.array, mask: Any = None, cache: Any = None, *more: Any, **named: Any) -> Any:
        if more or named or not (cache is None or isinstance(cache, (PromptKeys, ContinuedKeys))):
            return kind.__call__(layer, x, mask, cache, *more, **named)
        return _call(kind, layer, x, mask, cache)

    return type(kind.__name__, (kind,), {"__call__": call})


def _call(
    kind: type, layer: nn.Module, x: mx.array, mask: Any, cache: PromptKeys | ContinuedKeys | None
) -> mx.array:
    parameters = layer.trainable_parameters()
    seed = _drawn_seed() if layer.training else None
    past = [cache.past_keys, cache.past_values] if isinstance(cache, ContinuedKeys) else []

    def run(parameters: Any, x: mx.array, *past: mx.array) -> tuple[mx.array, ...]:
        own = layer.trainable_parameters()
        layer.update(parameters)
        try:
            if isinstance(cache, PromptKeys):
                keys = PromptKeys()
                out = kind.__call__(layer, x, mask, keys)
                assert keys.keys is not None
                assert keys.values is not None
                return out, keys.keys, keys.values
            here = cache.continuing(*past) if isinstance(cache, ContinuedKeys) else None
            return (kind.__call__(layer, x, mask, here),)
        finally:
            layer.update(own)

    @mx.custom_function
    def forgetful(parameters: Any, x: mx.array, *past: mx.array) -> tuple[mx.array, ...]:
        with _drawing_from(seed):
            return tuple(_alone(out) for out in run(parameters, x, *past))

    @forgetful.vjp
    def forgetful_vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        parameters, *arrays = primals
        cotangents = cotangents if isinstance(cotangents, (tuple, list)) else [cotangents]

        def pulled(parameters: Any, *arrays: mx.array) -> mx.array:
            outputs = run(parameters, *arrays)
            return cast(mx.array, sum(mx.sum(out * c) for out, c in zip(outputs, cotangents, strict=True)))

        everything = tuple(range(1 + len(arrays)))
        with fast_kernels(), _drawing_from(seed):
            gradients = mx.grad(pulled, argnums=everything)(parameters, *arrays)
        return tree_map(_alone, gradients)

    outputs = cast(tuple[mx.array, ...], forgetful(parameters, x, *past))
    if isinstance(cache, PromptKeys):
        cache.keys, cache.values = outputs[1:]
    return outputs[0]


def _drawn_seed() -> int:
    return int(mx.random.randint(0, 1 << 30))


@contextmanager
def _drawing_from(seed: int | None) -> Iterator[None]:
    """Dropout must drop the same in both computations: within the block MLX draws from ``seed``, if there is one."""
    if seed is None:
        yield
        return
    afterwards = _drawn_seed()
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed(afterwards)


def _alone(x: mx.array) -> mx.array:
    """``x`` without the graph behind it, where that has been evaluated already.

    On a GPU the graph is lazy and goes when it has been computed. On the CPU ``host_math`` evaluates in the middle of
    differentiation.
    """
    return alone(x) if usable() else x
