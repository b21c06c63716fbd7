"""Losses on pairs, a chosen and a rejected answer to one prompt, for reward models and DPO; and on labelled steps."""

from __future__ import annotations

import mlx.core as mx

from token_attribution.masking import check_same_shape, nonzero_denominator


def bradley_terry_loss(
    chosen: mx.array,
    rejected: mx.array,
    margin: mx.array | None = None,
    centering: float = 0.0,
    denominator: float | mx.array | None = None,
) -> mx.array:
    r"""Negative log-likelihood that the chosen answer wins, if the log-odds are the difference of the scores.

    .. math:: -\text{mean}\, \log\sigma(s_c - s_r - \text{margin}) + c\, \text{mean}\, (s_c + s_r)^2

    (https://arxiv.org/abs/2203.02155; the margin is Llama 2's, https://arxiv.org/abs/2307.09288.)

    Args:
        chosen, rejected: Scores of the two answers, (B,).
        margin: (B,), how much the chosen answer should lead by; *subtracted*.
        centering: c above. Only differences of scores are determined; a small weight (0.01) keeps their mean
            near 0 (https://arxiv.org/abs/2312.09244).
        denominator: Pairs of the whole optimiser step in place of B, so that micro-batches add up.

    Returns:
        A float32 scalar.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    chosen, rejected = chosen.astype(mx.float32), rejected.astype(mx.float32)
    lead = chosen - rejected  # (B,)
    if margin is not None:
        check_same_shape(chosen=chosen, margin=margin)
        lead = lead - mx.stop_gradient(margin).astype(mx.float32)
    losses = mx.logaddexp(mx.array(0.0), -lead)  # (B,) = -log sigmoid(lead), without overflow
    if centering:
        losses = losses + centering * mx.square(chosen + rejected)
    return mx.sum(losses) / nonzero_denominator(losses.size if denominator is None else denominator)


def preference_accuracy(
    chosen: mx.array, rejected: mx.array, denominator: float | mx.array | None = None
) -> mx.array:
    """Share of the pairs in which the chosen answer scores higher: a scalar in [0, 1].

    A tie counts half, so that a model which scores everything alike is at 0.5, the level of guessing, not 0.
    """
    check_same_shape(chosen=chosen, rejected=rejected)
    wins = (chosen > rejected).astype(mx.float32) + 0.5 * (chosen == rejected).astype(mx.float32)  # (B,)
    return mx.sum(wins) / nonzero_denominator(wins.size if denominator is None else denominator)


def step_loss(scores: mx.array, labels: mx.array, denominator: float | mx.array | None = None) -> mx.array:
    r"""Cross-entropy of single steps that are right or wrong: a process reward model's.

    .. math:: -\text{mean}\, \big[y \log\sigma(s) + (1 - y) \log(1 - \sigma(s))\big]

    Args:
        scores: (N,), the head at each step's mark. labels: (N,) in [0, 1]; no gradient.
        denominator: Steps of the whole optimiser batch in place of N.
    """
    check_same_shape(scores=scores, labels=labels)
    scores = scores.astype(mx.float32)
    losses = (
        mx.logaddexp(mx.array(0.0), scores) - mx.stop_gradient(labels).astype(mx.float32) * scores
    )  # (N,)
    return mx.sum(losses) / nonzero_denominator(losses.size if denominator is None else denominator)


def implicit_reward(logprobs: mx.array, ref_logprobs: mx.array, beta: float) -> mx.array:
    r"""The reward that a policy would be optimal for: :math:`\beta (\log\pi - \log\pi_{ref})`, (B,) float32.

    The logprobs are of whole completions, *summed* over tokens. The reference receives no gradient.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return beta * (logprobs.astype(mx.float32) - mx.stop_gradient(ref_logprobs).astype(mx.float32))


def dpo_loss(
    chosen: mx.array,
    rejected: mx.array,
    ref_chosen: mx.array,
    ref_rejected: mx.array,
    beta: float,
    denominator: float | mx.array | None = None,
) -> mx.array:
    r"""Direct preference optimisation: the Bradley-Terry loss with the policy as its own reward model.

    .. math:: -\text{mean}\, \log\sigma\big(\beta\, [(\log\pi(y_c) - \log\pi_{ref}(y_c))
              - (\log\pi(y_r) - \log\pi_{ref}(y_r))]\big)

    (https://arxiv.org/abs/2305.18290.)

    Args:
        chosen, rejected: Logprobs of the two completions under the policy, *summed* over tokens, (B,).
        ref_chosen, ref_rejected: The same under the reference; no gradient.
        beta: How dearly a departure from the reference is bought; 0.1 is usual.
        denominator: Pairs of the whole optimiser step in place of B.

    Returns:
        A float32 scalar: log 2 while the policy is the reference.
    """
    return bradley_terry_loss(
        implicit_reward(chosen, ref_chosen, beta),
        implicit_reward(rejected, ref_rejected, beta),
        denominator=denominator,
    )
