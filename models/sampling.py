"""The distribution that a token is sampled from, and the draw.

    logits → + bias → repetition penalty → / temperature → top-k → top-p → min-p

Bias and penalty are those of mlx-lm's logits processors. The cuts follow the temperature, as in transformers'
``generate``; mlx-lm's samplers cut first and apply the temperature to what is left. The logprob that is kept is that
of the end of this chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Sampling(NamedTuple):
    """The distribution sampled from; the defaults are the model's own, at temperature 1."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit; -inf forbids it
    repetition_penalty: float = 1.0  # recent tokens' logits: / where positive, * where negative
    repetition_context: int = 20  # how many tokens are recent

    @property
    def changes_logits(self) -> bool:
        """Whether bias or penalty stand between the model's logits and the temperature."""
        return bool(self.logit_bias) or self.repetition_penalty != 1.0


def check_sampling(sampling: Sampling) -> None:
    """Refuse what would be sampled from wrongly without a word."""
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature must not be negative, but it is {sampling.temperature}")
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1 or not 0 <= sampling.min_p <= 1:
        raise ValueError(
            f"top_k must be 0 (all tokens) or more, top_p in (0, 1] and min_p in [0, 1], found {sampling}"
        )
    if not (sampling.repetition_penalty > 0 and math.isfinite(sampling.repetition_penalty)):
        raise ValueError(
            f"repetition_penalty must be greater than 0, but it is {sampling.repetition_penalty}"
        )
    if sampling.repetition_context < 1:
        raise ValueError(f"repetition_context must be at least 1, but it is {sampling.repetition_context}")
    for token, bias in sampling.logit_bias:
        if token < 0 or not bias <= FLOAT32_MAX:  # NaN too
            raise ValueError(
                f"logit_bias: a token id and a finite number or -inf are expected, found {token}: {bias}"
            )


def bias_vector(sampling: Sampling, vocabulary: int) -> np.ndarray | None:
    """What is added to the logits, ``(V,)`` float32, or None for nothing."""
    if not sampling.logit_bias:
        return None
    bias = np.zeros(vocabulary, dtype=np.float32)
    for token, amount in sampling.logit_bias:
        if token >= vocabulary:
            raise ValueError(f"logit_bias: token {token} is not in the vocabulary of {vocabulary} tokens")
        bias[token] += amount
    if (bias == -math.inf).all():
        raise ValueError(f"logit_bias: all {vocabulary} tokens are forbidden, so there is none to draw")
    return bias


def recent_tokens(sampling: Sampling, tails: Sequence[Sequence[int]]) -> np.ndarray:
    """The last tokens of each prompt, ``(rows, repetition_context)`` int32, the oldest first.

    A short prompt is filled up with its own first token: penalised once, however often it stands there.
    """
    context = sampling.repetition_context
    filled = [
        ([tail[0]] * (context - len(tail)) + list(tail)) if len(tail) < context else tail[-context:]
        for tail in tails
    ]
    return np.array(filled, dtype=np.int32)


class LogitChanges:
    """Bias and repetition penalty for the rows of a call, with the recent tokens that the penalty needs.

    The tokens stay on the device: nothing here waits for a value. A row is named by its number, whoever is decoded
    beside it.
    """

    def __init__(self, sampling: Sampling, tails: Sequence[Sequence[int]], vocabulary: int) -> None:
        """``tails``: each row's prompt, of which the end counts as recent."""
        self.penalty = sampling.repetition_penalty
        bias = bias_vector(sampling, vocabulary)
        self.bias = None if bias is None else mx.array(bias)
        self.recent = mx.array(recent_tokens(sampling, tails))  # (rows, context), in a ring

    def apply(self, logits: mx.array, rows: np.ndarray) -> mx.array:
        """``(n, V)`` logits of these rows to ``(n, V)`` float32."""
        if self.penalty == 1.0:
            return adjusted_logits(logits, self.bias, self.recent)
        return adjusted_logits(logits, self.bias, self.recent[mx.array(rows)], self.penalty)

    def append(self, tokens: mx.array, rows: np.ndarray, columns: np.ndarray) -> None:
        """The tokens ``(n,)`` that were drawn, each the ``columns[i]``-th of its row, replace the oldest."""
        if self.penalty == 1.0:
            return  # nobody reads them, and what nobody evaluates grows
        self.recent[mx.array(rows), mx.array(columns % self.recent.shape[1])] = tokens


class DeviceSampler:
    """Draws on the device, as a promise: the next step is launched before the host reads this one."""

    lag = 1

    def __init__(
        self, sampling: Sampling, tails: Sequence[Sequence[int]], vocabulary: int, uniforms: np.ndarray
    ) -> None:
        """``tails``: each row's prompt; ``uniforms``: ``(rows, columns)``."""
        self.sampling, self.uniforms = sampling, uniforms
        self.changes = LogitChanges(sampling, tails, vocabulary) if sampling.changes_logits else None

    def draw(self, logits: mx.array, rows: np.ndarray, columns: np.ndarray) -> tuple[mx.array, mx.array]:
        """Token ``columns[i]`` of row ``rows[i]`` from ``logits[i]``: ids and logprobs, each ``(n,)``."""
        if self.changes is not None:
            logits = self.changes.apply(logits, rows)
        if self.sampling.temperature == 0:
            tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
            logprobs = mx.zeros(tokens.shape)
        else:
            uniforms = mx.array(self.uniforms[rows, columns])
            tokens, logprobs = draw(sampling_weights(logits, self.sampling), uniforms)
        if self.changes is not None:
            self.changes.append(tokens, rows, columns)
        mx.async_eval(tokens, logprobs)
        return tokens, logprobs


def adjusted_logits(
    logits: mx.array, bias: mx.array | None, recent: mx.array, penalty: float = 1.0
) -> mx.array:
    """Add the bias; then divide the positive and multiply the negative logits of recent tokens by the penalty.

    Args:
        logits: ``(B, V)``. bias: ``(V,)`` or None. recent: ``(B, R)`` token ids, each counted once.
        penalty: > 1 makes repetition rarer (CTRL, https://arxiv.org/abs/1909.05858, section 4.1).
    Returns:
        ``(B, V)`` float32.
    """
    z = logits.astype(mx.float32)
    if bias is not None:
        z = z + bias
    if penalty == 1.0:
        return z
    chosen = mx.take_along_axis(z, recent, axis=1)  # (B, R)
    penalised = mx.where(chosen > 0, chosen / penalty, chosen * penalty)
    return mx.put_along_axis(
        z, recent, penalised, axis=1
    )  # a token that stands twice gets the same value twice


def sampling_weights(logits: mx.array, sampling: Sampling) -> mx.array:
    """Unnormalised probabilities of the next token, zero for the tokens left out.

    Args:
        logits: ``(B, V)``, any dtype.
    Returns:
        ``(B, V)`` float32; the largest weight of each row is 1. Ties at a threshold are all kept.
    """
    z = logits.astype(mx.float32) * (1.0 / sampling.temperature)
    weights = mx.exp(z - mx.max(z, axis=-1, keepdims=True))  # (B, V)
    if 0 < sampling.top_k < weights.shape[-1]:
        kth = mx.min(mx.topk(weights, sampling.top_k, axis=-1), axis=-1, keepdims=True)
        weights = mx.where(weights < kth, 0.0, weights)
    if sampling.top_p < 1:
        ascending = mx.sort(weights, axis=-1)
        mass_above = mx.cumsum(ascending, axis=-1, reverse=True, inclusive=False)
        total = mass_above[..., :1] + ascending[..., :1]
        dropped = mx.sum(mass_above >= sampling.top_p * total, axis=-1, keepdims=True)
        smallest_kept = mx.take_along_axis(ascending, dropped, axis=-1)
        weights = mx.where(weights < smallest_kept, 0.0, weights)
    if sampling.min_p > 0:
        weights = mx.where(weights < sampling.min_p, 0.0, weights)
    return weights


def draw(weights: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Inverse-transform sampling: the first token whose cumulative weight exceeds ``u`` times the total.

    Args:
        weights: ``(B, V)`` unnormalised probabilities; uniforms: ``(B,)`` in [0, 1 - 2⁻²³], so that the
            product stays below the total in float32 and a token of weight 0 is never drawn.
    Returns:
        tokens ``(B,)`` int32 and their logprobs ``(B,)`` float32.
    """
    cumulative = mx.cumsum(weights, axis=-1)
    total = cumulative[:, -1:]
    tokens = mx.sum(cumulative <= uniforms[:, None] * total, axis=-1).astype(mx.int32)
    chosen = mx.take_along_axis(weights, tokens[:, None], axis=-1)
    return tokens, mx.log(chosen / total)[:, 0]


def uniforms_for(seed: int, step: int, prompt: int, member: int, count: int) -> np.ndarray:
    """The random numbers of one completion, ``(count,)`` float32 multiples of 2⁻²³ in [0, 1).

    Made on the host, so that every backend samples with the same ones.
    """
    generator = np.random.default_rng([seed, step, prompt, member])
    return (generator.integers(0, 1 << 23, size=count) / float(1 << 23)).astype(np.float32)
