"""New tokens: rows for them in embedding and head, in a model whose tokenizer is given them too."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken

from config.errors import InvalidConfigurationError
from token_attribution.trunk import EMBEDDINGS, inner_model


def add_tokens(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    tokens: Sequence[str],
    *,
    mean: bool,
    seed: int,
) -> dict[str, Any]:
    """Give tokenizer and model these tokens, in place; the model's config.json as it is then.

    A token that is there already is left alone, so doing it twice is doing it once. They are matched whole wherever
    they stand in a text, and stay in the text of a completion, as rewards that look for tags need it.

    Args:
        mean: a new row is the mean of those of all tokens so far (Hewitt 2021,
            https://nlp.stanford.edu/~johnhew/vocab-expansion.html), so that it is about as likely as the average
            token; False: drawn from N(0, std²) of theirs.
    Raises:
        InvalidConfigurationError: for a text that can be no token, or a model whose embeddings cannot be seen or are
            quantised.
    """
    for token in tokens:
        if not token or token != token.strip():
            raise InvalidConfigurationError(
                f"new_special_tokens: a text without spaces around it is expected, found {token!r:.80}"
            )
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if not new:
        return config
    modules = _vocabulary_modules(model)
    if not modules or any("scales" in module for module in modules):
        reason = "quantised" if modules else "not visible in this architecture"
        raise InvalidConfigurationError(
            f"new_special_tokens: the model's embeddings are {reason}, so they cannot grow; leave the tokens out, or "
            "give another model"
        )
    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    ids = sorted(int(i) for i in tokenizer.convert_tokens_to_ids(new))
    rows = max(ids[-1] + 1, modules[0].weight.shape[0])
    for number, module in enumerate(modules):
        key = mx.random.key(seed + number)
        for name in ("weight", "bias"):
            if name in module:
                module[name] = _grown(module[name], ids, rows, before, key if not mean else None)
    mx.eval(model.parameters())
    grown = {**config, "vocab_size": rows}
    if isinstance(config.get("text_config"), dict):
        grown["text_config"] = {**config["text_config"], "vocab_size": rows}
    return grown


def _vocabulary_modules(model: nn.Module) -> list[nn.Module]:
    """The embedding, and the head where it has weights of its own."""
    inner = inner_model(model)
    found = [] if inner is None else [inner[name] for name in EMBEDDINGS if name in inner]
    owner = getattr(model, "language_model", model)
    return [*found, owner["lm_head"]] if found and "lm_head" in owner else found


def _grown(x: mx.array, ids: Sequence[int], rows: int, before: int, key: mx.array | None) -> mx.array:
    """``x`` (V, …) with ``rows`` rows: ``ids`` are the mean of the first ``before``, or random where there is a key."""
    wide = x.astype(mx.float32)
    seen = wide[: min(before, x.shape[0])]
    shape = (len(ids), *x.shape[1:])
    if key is None:
        fresh = mx.broadcast_to(mx.mean(seen, axis=0), shape)
    else:
        fresh = mx.random.normal(shape, scale=float(mx.std(seen)), key=key)
    padding = mx.zeros((rows - x.shape[0], *x.shape[1:]))
    wide = mx.concatenate([wide, padding])
    wide[mx.array(list(ids))] = fresh
    return wide.astype(x.dtype)
