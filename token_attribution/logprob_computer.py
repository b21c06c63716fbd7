"""The logprob and the entropy of each token under a language model.

The arrays below are already aligned: ``ids[..., t]`` is the token that ``logits[..., t, :]`` predicts. The
temperature belongs in every forward that meets another in a ratio or a KL (current, old and reference
policy); leave it out of one, and the ratio of the first step is no longer 1.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from token_attribution.sampled_states import SampledStates, picked_states, sampled_states
from token_attribution.trunk import Trunk, find_trunk
from token_attribution.vocabulary import (
    LOGPROBS,
    Head,
    Reading,
    Reference,
    Wanted,
    check_temperature,
    read_vocabulary,
)


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
    check_temperature(temperature)
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
    for_gradient: bool = False,
) -> TokenStatistics:
    """Like :func:`token_logprobs`, with the entropy of each token's distribution.

    Args:
        entropy: False gives zeros in its place, at no cost.
        entropy_gradient: let the entropy carry gradient, as a bonus in the loss needs. A metric does not, and
            without it the backward pass has less to do.
        for_gradient: a backward pass will follow. Only speed depends on it.
    """
    wanted = Wanted(entropy or entropy_gradient, entropy_gradient)
    found, _, states, _ = read_tokens(
        model, tokens, mask, temperature, trunk=trunk, wanted=wanted, for_gradient=for_gradient
    )
    return TokenStatistics(
        states.back_in_place(found.logprobs),
        mx.zeros(mask.shape) if found.entropy is None else states.back_in_place(found.entropy),
    )


class TokenReading(NamedTuple):
    """What was read at each sampled token, and the states that it was read from."""

    reading: Reading  # (N,) each
    trunk: Trunk
    states: SampledStates
    reference: tuple[SampledStates, Trunk] | None  # the other model's, without gradient, if it was there


def read_tokens(
    model: nn.Module,
    tokens: mx.array,
    mask: mx.array,
    temperature: float = 1.0,
    *,
    trunk: Trunk | None = None,
    wanted: Wanted = LOGPROBS,
    reference: tuple[nn.Module, Trunk | None] | None = None,
    for_gradient: bool = False,
) -> TokenReading:
    """One forward pass, and all that is wanted of it: for callers that need its states for something else too.

    ``reference``: the other model of ``wanted.kl``, and its trunk if the caller has it already.
    """
    check_alignment(tokens, mask)
    halves = halves_of(model, trunk)
    states = sampled_states(halves, tokens, mask)
    theirs: Reference | None = None
    other: tuple[SampledStates, Trunk] | None = None
    if reference is not None:
        their_halves = halves_of(*reference)
        their_states = sampled_states(their_halves, tokens, mask)
        their_states = their_states._replace(rows=mx.stop_gradient(their_states.rows))
        theirs, other = Reference(their_states.rows, their_halves.head), (their_states, their_halves)
    reading = read_states(
        states, halves, tokens, temperature, wanted=wanted, reference=theirs, for_gradient=for_gradient
    )
    return TokenReading(reading, halves, states, other)


def read_states(
    states: SampledStates,
    trunk: Trunk,
    tokens: mx.array,
    temperature: float = 1.0,
    *,
    wanted: Wanted = LOGPROBS,
    reference: Reference | None = None,
    for_gradient: bool = False,
    chunk_elements: int | None = None,
) -> Reading:
    """What the vocabulary says at sampled tokens; zeros of length 0 where there are none."""
    if states.positions.size == 0:
        nothing = mx.zeros((0,))
        return Reading(nothing, nothing if wanted.entropy else None, nothing if wanted.kl else None)
    return read_vocabulary(
        states.rows,
        trunk.head,
        tokens[:, 1:].reshape(-1)[states.positions],
        temperature,
        wanted=wanted,
        reference=reference,
        head_module=trunk.head_module() if trunk.head_module is not None else None,
        for_gradient=for_gradient,
        chunk_elements=chunk_elements,
    )


def statistics_from_states(
    states: mx.array,
    head: Head,
    tokens: mx.array,
    mask: mx.array,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """The same from hidden states (B, T, D), or from logits with the identity as ``head``."""
    check_alignment(tokens, mask)
    picked = picked_states(states, mask)
    wanted = Wanted(entropy or entropy_gradient, entropy_gradient)
    found = read_states(picked, Trunk(lambda ids: ids, head), tokens, temperature, wanted=wanted)
    return TokenStatistics(
        picked.back_in_place(found.logprobs),
        mx.zeros(mask.shape) if found.entropy is None else picked.back_in_place(found.entropy),
    )


def halves_of(model: nn.Module, trunk: Trunk | None) -> Trunk:
    """Trunk and head; a model that does not show them is all trunk."""
    if trunk is None and isinstance(model, nn.Module):
        trunk = find_trunk(model)
    return trunk or Trunk(lambda tokens, cache=None: model(tokens), lambda logits: logits)


def check_alignment(tokens: mx.array, mask: mx.array) -> None:
    """Refuse tokens and mask that do not belong together."""
    if tokens.ndim != 2 or mask.shape != (tokens.shape[0], tokens.shape[1] - 1):
        raise ValueError(f"tokens {tokens.shape} must be (B, T+1) and mask {mask.shape} must be (B, T).")
