"""The logprob and the entropy of each token under a language model.

The arrays below are already aligned: ``ids[..., t]`` is the token that ``logits[..., t, :]`` predicts. The
temperature belongs in every forward that meets another in a ratio or a KL (current, old and reference
policy); leave it out of one, and the ratio of the first step is no longer 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from token_attribution.trunk import Trunk, find_trunk


class TokenStatistics(NamedTuple):
    """What one forward pass says about each sampled token; exactly 0 where the mask is False."""

    logprobs: mx.array  # (B, T) float32, differentiable
    entropy: mx.array  # (B, T) float32, nats, without gradient unless that was asked for


def logprobs_from_logits(logits: mx.array, ids: mx.array, temperature: float = 1.0) -> mx.array:
    r"""Logprob of each chosen token, in float32.

    .. math:: \log \pi(y_t) = z_t[y_t] - \log \sum_v \exp z_t[v], \qquad z = \text{logits} / \tau

    The logits are cast before the logsumexp: in bfloat16 it would cost hundredths of a nat per token.

    Args:
        logits: (..., V) of any float dtype.
        ids: (...) integers in [0, V). At padding any valid id will do; an id outside the vocabulary is not
            looked for, since that would need a copy to the host.
        temperature: tau, the temperature that the tokens were sampled at, > 0.

    Returns:
        (...) float32.
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits {logits.shape} must be ids {ids.shape} with one more axis, the vocabulary.")
    scaled = _scaled_logits(logits, temperature)  # (..., V)
    chosen = mx.take_along_axis(scaled, ids[..., None], axis=-1)[..., 0]  # (...)
    return chosen - mx.logsumexp(scaled, axis=-1)  # (...)


def entropy_from_logits(logits: mx.array, temperature: float = 1.0) -> mx.array:
    r"""Entropy of each next-token distribution in nats, in float32: (..., V) -> (...).

    .. math:: H_t = \log \sum_v \exp z_t[v] - \sum_v p_t[v]\, z_t[v], \qquad z = \text{logits} / \tau

    It carries gradient, so it serves as a bonus as well as a metric. A token forbidden with a logit of -inf
    contributes nothing, as p log p does in the limit.
    """
    scaled = _scaled_logits(logits, temperature)  # (..., V)
    # 0 * -inf is nan, in the value and in the gradient: let the forbidden logits be 0 under their p of 0.
    finite = mx.where(scaled == -mx.inf, 0.0, scaled)
    return mx.logsumexp(scaled, axis=-1) - mx.sum(mx.softmax(scaled, axis=-1) * finite, axis=-1)  # (...)


def _scaled_logits(logits: mx.array, temperature: float) -> mx.array:
    if not temperature > 0:
        raise ValueError(
            f"temperature must be greater than 0, but it is {temperature}. Greedy decoding has no logprobs; "
            "give the temperature that the tokens were sampled at."
        )
    logits = logits.astype(mx.float32)
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(
    model: nn.Module,
    tokens: mx.array,
    mask: mx.array,
    temperature: float = 1.0,
    *,
    trunk: Trunk | None = None,
) -> mx.array:
    """Logprob of each sampled token under ``model``, given everything before it in its row.

    Args:
        model: an mlx-lm language model (or any callable from ids to logits).
        tokens: (B, T+1) int32, right-padded.
        mask: (B, T) bool, see ``experience_buffer.data_structures``. Its values must be known: an input, not
            a result of the function being differentiated.
        temperature: the one that the tokens were sampled at.
        trunk: ``find_trunk(model)``, if the caller has it already.

    Returns:
        (B, T) float32; exactly 0, with a gradient of exactly 0, where the mask is False.
    """
    return token_statistics(model, tokens, mask, temperature, trunk=trunk, entropy=False).logprobs


def token_statistics(
    model: nn.Module,
    tokens: mx.array,
    mask: mx.array,
    temperature: float = 1.0,
    *,
    trunk: Trunk | None = None,
    entropy: bool = True,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """Like :func:`token_logprobs`, with the entropy of each token's distribution.

    Args:
        entropy: False gives zeros in its place, at no cost.
        entropy_gradient: let the entropy carry gradient, as a bonus in the loss needs. A metric does not, and
            without it the backward pass has less to do.
    """
    _check_alignment(tokens, mask)
    trunk = trunk or (find_trunk(model) if isinstance(model, nn.Module) else None)
    if trunk is None:  # no way to stop before the head: all positions go through it, and most are dropped
        return statistics_from_states(
            model(tokens[:, :-1]),
            lambda z: z,
            tokens,
            mask,
            temperature,
            entropy=entropy,
            entropy_gradient=entropy_gradient,
        )
    return statistics_from_states(
        trunk.hidden(tokens[:, :-1]),
        trunk.head,
        tokens,
        mask,
        temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
    )


def statistics_from_states(
    states: mx.array,
    head: Callable[[mx.array], mx.array],
    tokens: mx.array,
    mask: mx.array,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """The same from the trunk's hidden states (B, T, D), for callers that need those for something else too."""
    _check_alignment(tokens, mask)
    # The head is by far the widest layer: it is computed where the mask is True and nowhere else.
    sampled = true_positions(mask)  # (N,)
    nowhere = mx.zeros(mask.shape)
    if sampled.size == 0:
        return TokenStatistics(nowhere, nowhere)
    logits = head(states.reshape(-1, states.shape[-1])[sampled])  # (N, V)
    targets = tokens[:, 1:].reshape(-1)[sampled]  # (N,)
    logprobs = back_in_place(logprobs_from_logits(logits, targets, temperature), sampled, mask.shape)
    if not entropy:
        return TokenStatistics(logprobs, nowhere)
    seen = logits if entropy_gradient else mx.stop_gradient(logits)
    return TokenStatistics(
        logprobs, back_in_place(entropy_from_logits(seen, temperature), sampled, mask.shape)
    )


def true_positions(mask: mx.array) -> mx.array:
    """Where the flattened mask is True: (N,) int32. It reads the mask's values, so it waits for them."""
    return mx.array(np.flatnonzero(np.array(mask)).astype(np.int32))


def back_in_place(x: mx.array, positions: mx.array, shape: tuple[int, ...]) -> mx.array:
    """One number for each of the flat ``positions``, (N,), put into float32 zeros of ``shape``."""
    return mx.zeros(shape).reshape(-1).at[positions].add(x).reshape(shape)


def _check_alignment(tokens: mx.array, mask: mx.array) -> None:
    if tokens.ndim != 2 or mask.shape != (tokens.shape[0], tokens.shape[1] - 1):
        raise ValueError(f"tokens {tokens.shape} must be (B, T+1) and mask {mask.shape} must be (B, T).")
