"""Sampling completions, many rows at once: tokens in, tokens and their logprobs out.

Each distinct prompt is computed once and its cache is shared by its completions. Rows leave the batch when they end
and waiting ones take their places. A row's random numbers are handed in, one per token, and it sees no column but its
own, so that a completion depends on nothing that happens to be decoded beside it: but for the last bits of its
logits, which hang on the shapes of matrix products. A token changes with them only where its random number falls that
close to the border between two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.nn as nn
import numpy as np

from base_setup.backend import device_kind
from models.completions import Completion
from models.host_sampling import HostSampler
from models.rollout_engine import Engine
from models.sampling import DeviceSampler, Sampling, check_sampling
from token_attribution.trunk import Trunk, find_trunk

#: Up to here a step launched ahead, while Python goes on, is worth more on CPU than NumPy's exponentials: one row of a
#: model of 1.3 million weights is decoded 1.4 times as fast.
_FEW_LOGITS = 1 << 15


def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    uniforms: np.ndarray,
    *,
    end_ids: frozenset[int],
    max_new_tokens: int,
    sampling: Sampling,
    trunk: Trunk | None = None,
    max_rows: int | None = None,
    on_done: Callable[[int, Completion], None] | None = None,
    on_host: bool | None = None,
) -> list[Completion]:
    """Sample one completion for each row.

    Args:
        model: an mlx-lm model. prompts: token ids of the distinct prompts, none empty.
        rows: the prompt of each row. uniforms: ``(B, max_new_tokens)``, see :func:`uniforms_for`.
        end_ids: tokens that end a completion (they are kept in it).
        trunk: ``find_trunk(model)``, if the caller has it already.
        max_rows: how many are decoded side by side at most; None: all.
        on_done: called with a row's number and its completion when it has ended, while others are decoded.
        on_host: whether tokens are drawn in NumPy; None: where MLX computes on CPU, and there is much to draw from.
    Returns:
        One :class:`Completion` per row, in the order of ``rows``.
    """
    _check(sampling, uniforms, len(rows), max_new_tokens, max_rows)
    places = max(1, min(max_rows or len(rows), len(rows)))
    tails = [prompts[prompt] for prompt in rows]

    def new_sampler(vocabulary: int) -> HostSampler | DeviceSampler:
        much = device_kind() == "cpu" and places * vocabulary > _FEW_LOGITS
        kind = HostSampler if (much if on_host is None else on_host) else DeviceSampler
        return kind(sampling, tails, vocabulary, uniforms)

    engine = Engine(
        model=model,
        trunk=trunk or find_trunk(model),
        prompts=prompts,
        rows=rows,
        places=places,
        end_ids=end_ids,
        max_new_tokens=max_new_tokens,
        new_sampler=new_sampler,
        on_done=on_done,
    )
    return engine.run()


def _check(
    sampling: Sampling, uniforms: np.ndarray, rows: int, max_new_tokens: int, max_rows: int | None
) -> None:
    """Refuse what would be sampled from wrongly without a word: MLX reads past the end of an array."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but it is {max_new_tokens}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, but it is {max_rows}")
    if uniforms.shape[0] != rows or uniforms.shape[1] < max_new_tokens:
        raise ValueError(
            f"uniforms {uniforms.shape} must be ({rows}, {max_new_tokens}): one per row and token"
        )
    check_sampling(sampling)
