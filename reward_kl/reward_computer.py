"""From one score per completion and one KL per token to one reward per token.

Scores are ``(B,)``, rewards ``(B, T)``, always. The order in a trainer: scale by the running moments
(``reward_kl.running_moments``), clip, penalise what did not end, penalise what is overlong; then spread over tokens
with the KL, whiten, and compare within groups.
"""

from __future__ import annotations

import math
from typing import Literal

import mlx.core as mx

from token_attribution.masking import check_same_shape, last_true_index, masked_whiten, zero_masked


def token_rewards(
    scores: mx.array, kl: mx.array | None, mask: mx.array, kl_coef: float | mx.array
) -> mx.array:
    r"""The dense reward of RLHF: a KL penalty on every sampled token, and the score on the last one.

    .. math:: r_t = -\beta\, \text{KL}_t + [t = \text{last}]\, \text{score}

    (https://arxiv.org/abs/1909.08593, https://arxiv.org/abs/2203.02155). "Last" is the last True position,
    which is the end-of-sequence token if the completion has one; some toolkits put the score one step later.

    Args:
        scores: (B,), one per completion. A NaN score (an unscorable row) gives a NaN reward: decide what to
            do about such rows before.
        kl: (B, T), usually the k1 estimate; None where there is no reference.
        mask: (B, T).
        kl_coef: beta. A number, or an array where a compiled function must not freeze it.

    Returns:
        (B, T) float32; zero where the mask is False, and so zero throughout a row without a True position.
    """
    if scores.shape != mask.shape[:1] or mask.ndim != 2:
        raise ValueError(f"scores {scores.shape} must be (B,) and mask {mask.shape} must be (B, T).")
    positions = mx.arange(mask.shape[1], dtype=mx.int32)  # (T,)
    is_last = positions == last_true_index(mask)[:, None]  # (B, T); an empty row has index -1: none
    rewards = mx.where(is_last, scores.astype(mx.float32)[:, None], 0.0)  # (B, T)
    if kl is None:
        return rewards
    check_same_shape(kl=kl, mask=mask)
    return rewards - kl_coef * zero_masked(kl, mask)  # (B, T)


def apply_missing_end_penalty(
    scores: mx.array,
    terminated: mx.array,
    penalty: float,
    mode: Literal["subtract", "replace"] = "subtract",
) -> mx.array:
    """Penalise the completions that never produced an end-of-sequence token.

    Args:
        scores: (B,).
        terminated: (B,) bool, True where the completion ended by itself.
        penalty: How much, >= 0.
        mode: ``subtract``: score - penalty, which keeps the order among the unfinished completions.
            ``replace``: -penalty whatever the score was, even NaN (OpenAI's original, which the "N+
            implementation details" reproduce with a penalty of 1, https://arxiv.org/abs/2403.17031).
    """
    check_same_shape(scores=scores, terminated=terminated)
    if mode not in ("subtract", "replace"):
        raise ValueError(f"mode must be 'subtract' or 'replace', but it is {mode!r}.")
    if not penalty >= 0:
        raise ValueError(f"penalty must be >= 0 (it is taken off the score), but it is {penalty}.")
    scores = scores.astype(mx.float32)
    penalised = scores - penalty if mode == "subtract" else mx.full(scores.shape, -float(penalty))
    return mx.where(terminated.astype(mx.bool_), scores, penalised)


def clip_scores(scores: mx.array, low: float | None, high: float | None) -> mx.array:
    """Limit the raw scores to [low, high]; None leaves that side open, and NaN stays NaN.

    Raw scores, not advantages: a clip after the group baseline would bend the comparison within the group.
    """
    scores = scores.astype(mx.float32)
    if low is not None and high is not None and low > high:
        raise ValueError(f"low must not exceed high, but they are {low} and {high}.")
    return scores if low is None and high is None else mx.clip(scores, low, high)


def whiten_rewards(rewards: mx.array, mask: mx.array) -> mx.array:
    """Scale the rewards to variance 1 over the mask and keep their mean (see ``masked_whiten`` for why)."""
    return masked_whiten(rewards, mask, shift_mean=False)


def overlong_penalty(lengths: mx.array, max_length: int, buffer: float, weight: float = 1.0) -> mx.array:
    r"""DAPO's soft punishment of long answers, to be added to the score: (B,) float32, never positive.

    .. math::
        0 \;\text{ if } n \le L - c, \qquad \frac{(L - c) - n}{c}\,w \;\text{ up to } n = L, \qquad -w \;\text{ beyond}

    (https://arxiv.org/abs/2503.14476, eq. 13; the paper has L = 20480 and c = 4096).

    Args:
        lengths: (B,) n, tokens of each completion.
        max_length: L > 0.
        buffer: c in tokens, 0 <= c <= L; with 0 only what exceeds L is punished.
        weight: w >= 0 and finite, the penalty's full size.
    """
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (B,), but they are {lengths.shape}.")
    if not max_length > 0 or not 0 <= buffer <= max_length:
        raise ValueError(f"max_length {max_length} must be > 0 and buffer {buffer} within [0, max_length].")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be a finite number >= 0, but it is {weight}.")
    beyond = lengths.astype(mx.float32) - (max_length - buffer)  # (B,)
    share = beyond / buffer if buffer > 0 else mx.where(beyond > 0, 1.0, 0.0)
    return -weight * mx.clip(share, 0.0, 1.0)
