"""A language model seen as trunk and head: hidden states, then the vocabulary.

mlx-lm's models return logits. Logprobs need the head at a few positions only, and value and reward
models need the hidden states and no head at all, so both are found here once, by structure, and
proved on a probe: ``head(hidden(x))`` must equal ``model(x)`` bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from token_attribution.checkpointing import checkpointed
from token_attribution.host_kernels import fast_kernels
from token_attribution.shared_prompts import PromptSharing

#: What architectures call their token embeddings.
EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings")


class Trunk(NamedTuple):
    """The two halves of a language model."""

    hidden: Callable[..., mx.array]  # (B, T) int32, cache=None -> (B, T, D), after the final norm
    head: Callable[[mx.array], mx.array]  # (..., D) -> (..., V)
    head_module: Callable[[], nn.Module] | None = None  # who owns the head's weights now, adapters included
    sharing: PromptSharing | None = None  # whether completions can share their prompt's pass; None: no


def find_trunk(model: nn.Module, *, checkpoint: bool = False) -> Trunk | None:
    """The trunk and head of an mlx-lm model, or None where its structure does not show them.

    ``checkpoint``: its blocks keep their inputs alone for the backward pass, see ``checkpointing``.

    The functions look modules up when called, so adapters that are added later are seen.
    """
    owner = _owner(model)
    inner = inner_model(model)
    if inner is None:
        return None

    def hidden(tokens: mx.array, cache: Any = None) -> mx.array:
        with fast_kernels(), checkpointed(model.layers) if checkpoint else nullcontext():
            return inner(tokens, cache=cache)

    def tried(tokens: mx.array, cache: Any = None) -> mx.array:
        with _evaluating(model):
            return hidden(tokens, cache)

    for head, head_module in _head_candidates(owner, inner):
        if _composes(model, hidden, head):
            return Trunk(hidden, head, head_module, PromptSharing(tried, lambda: make_prompt_cache(model)))
    return None


def _owner(model: nn.Module) -> Any:
    return getattr(model, "language_model", model)  # multimodal models keep theirs inside


def inner_model(model: nn.Module) -> nn.Module | None:
    """The part that turns ids into hidden states, where the structure shows it."""
    owner = _owner(model)
    return getattr(owner, "model", None) or getattr(owner, "transformer", None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block nothing is dropped: two passes over the same tokens come out the same."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module._training = False
    try:
        yield
    finally:
        for module in training:
            module._training = True


def _head_candidates(
    owner: nn.Module, inner: nn.Module
) -> list[tuple[Callable[[mx.array], mx.array], Callable[[], nn.Module]]]:
    candidates: list[tuple[Callable[[mx.array], mx.array], Callable[[], nn.Module]]] = []
    if "lm_head" in owner:
        candidates.append((lambda h: owner["lm_head"](h), lambda: owner["lm_head"]))
    for name in EMBEDDINGS:
        if name in inner and hasattr(inner[name], "as_linear"):
            candidates.append(
                (lambda h, name=name: inner[name].as_linear(h), lambda name=name: inner[name])  # type: ignore[misc]
            )
    return candidates


def _composes(
    model: nn.Module, hidden: Callable[..., mx.array], head: Callable[[mx.array], mx.array]
) -> bool:
    probe = mx.array([[0, 1, 2]])
    states = hidden(probe)
    if not isinstance(states, mx.array) or states.ndim != 3:
        return False
    with fast_kernels():
        whole, halves = model(probe), head(states)
    return whole.shape == halves.shape and bool(mx.array_equal(whole, halves))
