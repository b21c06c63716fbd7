"""Soft prompts: trained vectors in front of every prompt (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

A model with one computes its n vectors before the first token of a sequence and hands out the states of the tokens
alone. Whoever calls it sees the shapes of a model without, and caches that hold n columns more: ``PromptKeys.lead``
tells the shared pass of a group, and mlx-lm's own caches count them as they count tokens. So rollouts, gradient
passes, critics and ``mlx_lm.generate(model, …)`` all read the same model. Every later position sees the vectors.

The vectors are a parameter of the inner model, ``soft_prompt`` (n, D) float32, and the inner model's class is one
that puts them in front; ``remove_soft_prompt`` takes both away, and the model is what it was, bit for bit.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from config.errors import InvalidConfigurationError
from token_attribution.shared_prompts import PromptKeys
from token_attribution.trunk import EMBEDDINGS, inner_model

NAME = "soft_prompt"


def soft_prompt_of(model: nn.Module) -> mx.array | None:
    """The vectors (n, D) that come before every prompt of ``model``, if there are any."""
    inner = inner_model(model)
    return inner[NAME] if inner is not None and NAME in inner else None


def set_soft_prompt(model: nn.Module, rows: mx.array) -> None:
    """Put ``rows`` (n, D) in front of every prompt, in place of those that may be there.

    Raises:
        InvalidConfigurationError: where the architecture does not show its embeddings.
    """
    inner = inner_model(model)
    name = None if inner is None else _embedding_name(inner)
    if inner is None or name is None:
        raise InvalidConfigurationError(
            f"soft_prompt_tokens: the architecture {type(model).__module__} does not show its token embeddings, so "
            "nothing can be put in front of a prompt; use fine_tune_type = lora"
        )
    width = int(inner[name](mx.array([[0]])).shape[-1])
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != width:
        raise InvalidConfigurationError(
            f"soft_prompt: vectors of shape (n, {width}) are expected, found {tuple(rows.shape)}; it belongs to "
            "another model"
        )
    inner[NAME] = rows.astype(mx.float32)
    kind = type(inner)
    object.__setattr__(inner, "__class__", kind if hasattr(kind, "without_prompt") else _prompted(kind, name))


def remove_soft_prompt(model: nn.Module) -> None:
    """Make the model what it was before :func:`set_soft_prompt`; nothing happens to one that has none."""
    inner = inner_model(model)
    if inner is not None and NAME in inner:
        inner.unfreeze(keys=[NAME], recurse=False)  # the name would stay among those that do not train
        del inner[NAME]
        object.__setattr__(inner, "__class__", type(inner).without_prompt)  # type: ignore[attr-defined]


def first_rows(
    model: nn.Module, length: int | None, ids: Sequence[int] | None, seed: int, vocabulary: int | None = None
) -> mx.array:
    """Embeddings (n, D) float32 that a soft prompt begins as.

    Args:
        length: n; None: as many as ``ids``.
        ids: a text's tokens, repeated or cut to n; None: n random tokens drawn from ``seed``, which Lester et al.
            (figure 3b) find to work better than random vectors.
        vocabulary: how many tokens there are to draw from; None: all rows of the embedding.
    """
    inner = inner_model(model)
    name = None if inner is None else _embedding_name(inner)
    if inner is None or name is None:
        return mx.zeros((length or 1, 1))  # set_soft_prompt says what is wrong
    if ids is None:
        limit = min(vocabulary or inner[name].weight.shape[0], inner[name].weight.shape[0])
        ids = np.random.default_rng(seed).integers(limit, size=length or 1).tolist()
    chosen = np.resize(np.array(ids, dtype=np.int32), length or len(ids))
    return inner[name](mx.array(chosen)).astype(mx.float32)


def _embedding_name(inner: nn.Module) -> str | None:
    return next((name for name in EMBEDDINGS if isinstance(inner.get(name), nn.Module)), None)


class _LedEmbedding:
    """An embedding whose first columns are the soft prompt, whatever ids stand there."""

    def __init__(self, embedding: nn.Module, rows: mx.array) -> None:
        self.embedding, self.rows = embedding, rows

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embedding(ids)  # (B, n + T, D)
        n, width = self.rows.shape
        rows = mx.broadcast_to(self.rows.astype(x.dtype), (x.shape[0], n, width))
        return mx.concatenate([rows, x[:, n:]], axis=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.embedding, name)


@cache
def _prompted(kind: type, name: str) -> type:
    """``kind`` with a ``__call__`` that begins a sequence with the soft prompt."""
    signature = inspect.signature(kind.__call__)
    ids_name = list(signature.parameters)[1]

    def call(self: Any, *args: Any, **named: Any) -> Any:
        given = signature.bind(self, *args, **named)
        caches = given.arguments.get("cache")
        ids = given.arguments.get(ids_name)
        if ids is None or given.arguments.get("input_embeddings") is not None:
            raise ValueError("a model with a soft prompt takes token ids, not embeddings")
        if not _begins(caches):
            return kind.__call__(self, *args, **named)
        n = self[NAME].shape[0]
        given.arguments[ids_name] = mx.concatenate(
            [mx.zeros((ids.shape[0], n), dtype=ids.dtype), ids], axis=1
        )
        embedding = self[name]
        self[name] = _LedEmbedding(embedding, self[NAME])
        try:
            states = kind.__call__(*given.args, **given.kwargs)  # (B, n + T, D)
        finally:
            self[name] = embedding
        for one in caches or ():
            if isinstance(one, PromptKeys):
                one.lead = n
        return states[:, n:]

    return type(
        kind.__name__, (kind,), {"__call__": call, "without_prompt": kind, "__module__": kind.__module__}
    )


def _begins(caches: Any) -> bool:
    """Whether a call with these caches is the first of its sequences."""
    first = next((c for c in caches or () if c is not None), None)
    if first is None:
        return True
    if not hasattr(first, "empty") or not first.empty():
        return False
    padding = getattr(first, "left_padding", None)
    if padding is not None and int(mx.max(mx.array(padding))) > 0:
        raise ValueError(
            "a soft prompt comes before the first token of a row, and these rows begin with padding; generate from "
            "prompts of one length, or with PolicyModel.generate"
        )
    return True
