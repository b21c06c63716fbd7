r"""What to do when the sampler and the trainer disagree about the probability of the same token.

The same weights give slightly different logprobs in a cached decode, in a batch of another shape, in lower
precision or under a truncated sampling distribution (top-p). The completions then come from a policy mu that
is not quite the policy pi_old whose gradient is taken, and each token carries the weight

.. math:: w_t = \exp(\log\pi_{old}(y_t) - \log\mu(y_t)), \qquad E_\mu[w f] = E_{\pi_{old}}[f],

which makes expectations right again ("Your efficient RL framework secretly brings you off-policy RL
training", Yao et al. 2025, https://fengyao.notion.site/off-policy-rl). It belongs on every term that is estimated
from the sampled tokens: the policy loss, and a KL estimated from them (TRL weighs the policy loss only). It is
another thing than the ratio of policy_loss.py, which compares the policy being trained with pi_old; where mu itself
takes the place of old_logprobs there, the weight is already in that ratio, and would count twice.

First measure (``mismatch_statistics``), then correct: mostly the best correction is to find the difference.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import mlx.core as mx

from token_attribution.masking import (
    check_same_shape,
    masked_sum,
    nonzero_denominator,
    true_count,
    zero_masked,
)

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8; as in policy_loss.py


def importance_weights(
    logprobs: mx.array,
    behaviour_logprobs: mx.array,
    mask: mx.array,
    mode: Correction,
    cap: float = 2.0,
    floor: float = 0.0,
) -> mx.array:
    r"""The weight of each token: (B, T) float32, without gradient, 0 where the mask is False.

    - ``none``: 1.
    - ``token_truncate``: w_t limited to [floor, cap]. Truncation bounds the variance and biases towards mu
      (Ionides 2008, https://doi.org/10.1198/106186008X320456; in reinforcement learning IMPALA,
      https://arxiv.org/abs/1802.01561; for language models Yao et al., see above).
    - ``token_mask``: w_t where floor <= w_t <= cap, else 0: a token on which the two disagree so much is not
      believed (IcePop, https://arxiv.org/abs/2510.18855).
    - ``sequence_truncate``, ``sequence_mask``: the same with the weight of the whole row, exp of the *sum* of
      its log ratios, at each of its tokens. Only this one makes the expectation over sequences right. But it
      grows with the length: 0.012 nats per token are a factor of 3.3 after 100 tokens.

    Args:
        logprobs: The trainer's, under the policy that sampled (pi_old), (B, T).
        behaviour_logprobs: What the sampler recorded, under the distribution it really drew from, (B, T).
        mask: (B, T).
        mode: As above.
        cap: The largest weight, > 0.
        floor: The smallest, in [0, cap]; 0 sets none.
    """
    if mode not in get_args(Correction):
        raise ValueError(f"Unknown mode {mode!r}; choose one of {', '.join(get_args(Correction))}.")
    if not (cap > 0 and 0 <= floor <= cap):
        raise ValueError(f"cap {cap} must be greater than 0 and floor {floor} between 0 and cap.")
    log_ratio = _log_ratio(logprobs, behaviour_logprobs, mask)  # (B, T)
    if mode == "none":
        return zero_masked(mx.ones(mask.shape), mask)
    if mode in ("sequence_truncate", "sequence_mask"):
        log_ratio = mx.broadcast_to(mx.sum(log_ratio, axis=1, keepdims=True), mask.shape)
    weights = _exp(log_ratio)  # (B, T)
    if mode in ("token_truncate", "sequence_truncate"):
        weights = mx.clip(weights, floor, cap)
    else:
        weights = mx.where((weights >= floor) & (weights <= cap), weights, 0.0)
    return zero_masked(weights, mask)


class MismatchStatistics(NamedTuple):
    """Scalar sums and extremes over the True positions, so that micro-batches can be merged.

    Of d = logprobs - behaviour_logprobs and of the raw weight w = exp(d) of each token, neither truncated nor
    masked.
    """

    token_count: mx.array
    abs_difference_sum: mx.array
    abs_difference_max: mx.array  # 0 over no tokens
    weight_sum: mx.array
    weight_square_sum: mx.array
    weight_min: mx.array  # +inf over no tokens, so that merging needs no special case
    weight_max: mx.array  # -inf over no tokens

    def merge(self, other: MismatchStatistics) -> MismatchStatistics:
        """The statistics of the two batches together."""
        sums = MismatchStatistics(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))
        return sums._replace(
            abs_difference_max=mx.maximum(self.abs_difference_max, other.abs_difference_max),
            weight_min=mx.minimum(self.weight_min, other.weight_min),
            weight_max=mx.maximum(self.weight_max, other.weight_max),
        )


def mismatch_statistics(
    logprobs: mx.array, behaviour_logprobs: mx.array, mask: mx.array
) -> MismatchStatistics:
    """How far the trainer's logprobs and the sampler's are apart; arguments as in ``importance_weights``.

    Divide by ``token_count`` after merging. With one set of weights on both sides the difference should be
    rounding; where it is more, look for a forgotten temperature, a truncated distribution or a wrong cache
    before correcting anything.
    """
    log_ratio = _log_ratio(logprobs, behaviour_logprobs, mask)  # (B, T), 0 where the mask is False
    mask = mask.astype(mx.bool_)
    weights = _exp(log_ratio)  # (B, T)
    return MismatchStatistics(
        token_count=true_count(mask),
        abs_difference_sum=mx.sum(mx.abs(log_ratio)),
        abs_difference_max=mx.max(mx.abs(log_ratio)),
        weight_sum=masked_sum(weights, mask),
        weight_square_sum=masked_sum(mx.square(weights), mask),
        weight_min=mx.min(mx.where(mask, weights, mx.inf)),
        weight_max=mx.max(mx.where(mask, weights, -mx.inf)),
    )


def effective_sample_size(statistics: MismatchStatistics) -> mx.array:
    r"""The share of the tokens that would say as much without any weights: a scalar in (0, 1].

    .. math:: (\sum w)^2 / (n \sum w^2)

    (Kong 1992.) 1 if all the weights are equal, 1/n if one of them is all that counts; 1 over no tokens.
    """
    count = nonzero_denominator(statistics.token_count)
    mean = statistics.weight_sum / count  # divided first: the squares of the sums might overflow
    mean_square = statistics.weight_square_sum / count
    share = mean * (mean / nonzero_denominator(mean_square))
    return mx.where(statistics.token_count > 0, mx.minimum(share, 1.0), 1.0)


def _log_ratio(logprobs: mx.array, behaviour_logprobs: mx.array, mask: mx.array) -> mx.array:
    """log pi_old - log mu without gradient, (B, T) float32: 0 at padding before any exponential."""
    check_same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, mask=mask)
    difference = logprobs.astype(mx.float32) - behaviour_logprobs.astype(mx.float32)
    return zero_masked(mx.stop_gradient(difference), mask)


def _exp(log_ratio: mx.array) -> mx.array:
    return mx.exp(mx.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
