"""The policy-gradient losses of PPO, GRPO and their family, per token; and how tokens become one number.

Three decisions, three functions: what is compared (``importance_ratio``: tokens or whole sequences), how far
a step may go (``policy_loss``: clipped, dual-clipped, capped, gated, or not at all), and how tokens are
weighed against each other (``aggregate``). The KL term of the critic-free methods is added by the trainer, as
``importance_ratio(...) * kl_per_token(..., "k3")``; reward_kl/kl_divergence.py says why.

    PPO      https://arxiv.org/abs/1707.06347    token ratio, clipped, token_mean
    GRPO     https://arxiv.org/abs/2402.03300    token ratio, clipped, sequence_mean
    Dr. GRPO https://arxiv.org/abs/2503.20783    token ratio, clipped, fixed_length
    DAPO     https://arxiv.org/abs/2503.14476    token ratio, clip_epsilon_high > clip_epsilon, token_mean
    GSPO     https://arxiv.org/abs/2507.18071    sequence ratio, clipped, sequence_mean
    CISPO    https://arxiv.org/abs/2506.13585    token ratio, cispo, token_mean
    SAPO     https://arxiv.org/abs/2511.20347    token ratio, sapo, sequence_mean
    LUSPO    https://arxiv.org/abs/2602.05261    sequence ratio, clipped, sequence_sum
    RLOO     https://arxiv.org/abs/2402.14740    sequence_product ratio, unclipped, sequence_mean; on-policy the
                                                 same gradient as token ratio, sequence_sum (REINFORCE)

A row is one completion; ``off_policy_sequence_mask`` says which of them are too far gone to learn from.
Gradient flows through ``logprobs`` only; ``old_logprobs`` and ``advantages`` are data.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import mlx.core as mx

from token_attribution.masking import check_same_shape, masked_mean, masked_sum, true_count, zero_masked

RatioLevel = Literal["token", "sequence", "sequence_product"]
Surrogate = Literal["clipped", "unclipped", "cispo", "sapo"]
Aggregation = Literal["token_mean", "sequence_mean", "fixed_length", "sequence_sum", "micro_batch_mean"]

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8; beyond it the ratio is constant, so that it cannot overflow


def importance_ratio(
    logprobs: mx.array, old_logprobs: mx.array, mask: mx.array, ratio: RatioLevel = "token"
) -> mx.array:
    r"""How much likelier the policy makes what was sampled than the old policy did: (B, T) float32.

    With :math:`d_t = \log\pi(y_t) - \log\pi_{old}(y_t)` and n True positions in a row,

    - ``token``: :math:`\exp d_t`;
    - ``sequence``: :math:`\exp(\sum_t d_t / n)`, GSPO's geometric mean, the same at every token of a row;
    - ``sequence_product``: :math:`\exp \sum_t d_t`, the true ratio of the sequences, whose variance grows
      with their length.

    Differentiable in ``logprobs``. The exponent is limited to +-20. Where the mask is False the ratio is 1.
    """
    if ratio not in get_args(RatioLevel):
        raise ValueError(f"Unknown ratio {ratio!r}; choose one of {', '.join(get_args(RatioLevel))}.")
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)  # (B, T)
    if ratio == "sequence":
        log_ratio = mx.broadcast_to(masked_mean(log_ratio, mask, axis=1)[:, None], mask.shape)
    elif ratio == "sequence_product":
        log_ratio = mx.broadcast_to(masked_sum(log_ratio, mask, axis=1)[:, None], mask.shape)
    return mx.exp(zero_masked(mx.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO), mask))


def policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    clip_epsilon: float = 0.2,
    clip_epsilon_high: float | None = None,
    ratio: RatioLevel = "token",
    surrogate: Surrogate = "clipped",
    dual_clip: float | None = None,
    delta: float | None = None,
    ratio_cap: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> mx.array:
    r"""The surrogate loss of each token, to be minimised after ``aggregate``: (B, T) float32.

    .. math::
        \text{clipped:}   \quad & -\min(r A,\; \text{clip}(r, 1 - \epsilon, 1 + \epsilon_{high})\, A) \\
        \text{unclipped:} \quad & -r A \\
        \text{cispo:}     \quad & -\text{sg}[\min(r, cap)]\, A \log\pi \\
        \text{sapo:}      \quad & -\tfrac{4}{\tau}\, \sigma(\tau (r - 1))\, A

    All of them have the gradient of REINFORCE, -A, at r = 1. Away from it the slope of sapo's gate,
    4 sigma (1 - sigma) r, fades without an edge.

    A sequence-level r is repeated at each token of its row, so that under ``sequence_mean`` a row of n tokens
    weighs as one and each of its tokens receives GSPO's gradient, -A r / n (for ``sequence_product``: -A r).

    Args:
        logprobs, old_logprobs, mask: (B, T).
        advantages: (B, T), or (B,) where all the tokens of a row share one.
        clip_epsilon: How far below 1 the ratio still teaches.
        clip_epsilon_high: How far above 1, if not the same ("clip higher", DAPO).
        ratio: See ``importance_ratio``.
        surrogate: Which of the four above.
        dual_clip: c > 1. Where A < 0 the loss is at most -c A, so that a token that has become much
            likelier cannot take over the batch (https://arxiv.org/abs/1912.09729). Clipped only.
        delta: The same limit put the other way (INTELLECT-2, https://arxiv.org/abs/2505.07291): r is at most
            delta in the unclipped branch. For delta > 1 + clip_epsilon_high it equals dual_clip = delta, so
            give one of them. Clipped only.
        ratio_cap: The largest weight of a token: the cap itself, not its distance from 1. Cispo only.
        sapo_temperature_pos, sapo_temperature_neg: tau above, where A > 0 and where it is not. The higher,
            the sooner a token fades; the paper fades bad tokens sooner. Sapo only.

    Returns:
        (B, T), zero with zero gradient where the mask is False.
    """
    _check_options(clip_epsilon, clip_epsilon_high, surrogate, dual_clip, delta, ratio_cap)
    if not (sapo_temperature_pos > 0 and sapo_temperature_neg > 0):
        raise ValueError(
            f"sapo_temperature_pos {sapo_temperature_pos} and sapo_temperature_neg {sapo_temperature_neg} "
            "must be greater than 0."
        )
    advantages = zero_masked(mx.stop_gradient(_per_token(advantages, mask)), mask)  # (B, T)
    r = importance_ratio(logprobs, old_logprobs, mask, ratio)  # (B, T)

    if surrogate == "unclipped":
        losses = -r * advantages
    elif surrogate == "cispo":
        weight = mx.stop_gradient(r if ratio_cap is None else mx.minimum(r, ratio_cap))
        losses = -weight * advantages * zero_masked(logprobs, mask)
    elif surrogate == "sapo":
        tau = mx.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)  # (B, T)
        losses = -4.0 / tau * mx.sigmoid(tau * (r - 1.0)) * advantages
    else:
        high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
        clipped = -mx.clip(r, 1.0 - clip_epsilon, 1.0 + high) * advantages
        unclipped = -(r if delta is None else mx.minimum(r, delta)) * advantages
        # The order matters at a tie: MLX then sends the whole gradient to the second argument, and on the
        # edge of the clip range (r = 1 with an epsilon of 0, say) only the unclipped branch has one.
        losses = mx.maximum(clipped, unclipped)
        if dual_clip is not None:
            losses = mx.where(advantages < 0, mx.minimum(-dual_clip * advantages, losses), losses)
    return losses  # (B, T), 0 where the mask is False, because the advantage is


def off_policy_sequence_mask(
    logprobs: mx.array,
    behaviour_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    threshold: float,
) -> mx.array:
    r"""Which tokens may still teach: a bad completion that the policy has left behind may not.

    .. math:: M_t = 0 \text{ if } A_t < 0 \text{ and }
              \tfrac{1}{n} \sum_t (\log\mu(y_t) - \log\pi(y_t)) > \text{threshold, else } 1

    (DeepSeek-V3.2, "off-policy sequence masking", https://arxiv.org/abs/2512.02556.) What the policy has
    become unlikely to say is no mistake of its own, and pushing it down further only disturbs. Multiply the
    policy loss with it, not the KL term, and leave the denominator of ``aggregate`` as it is.

    Args:
        logprobs: Of the policy being trained, (B, T).
        behaviour_logprobs: mu, the policy that sampled, (B, T).
        advantages: (B, T), or (B,) where all the tokens of a row share one.
        mask: (B, T).
        threshold: In nats per token, >= 0. The paper gives none; TRL's documentation begins with 0.5.

    Returns:
        (B, T) float32 of 0 and 1, without gradient; 1 where the mask is False.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, but it is {threshold}.")
    bad = zero_masked(mx.stop_gradient(_per_token(advantages, mask)), mask) < 0  # (B, T)
    drift = masked_mean(
        -_log_ratio(mx.stop_gradient(logprobs), behaviour_logprobs, mask), mask, axis=1
    )  # (B,)
    return mx.where(bad & (drift > threshold)[:, None], 0.0, 1.0)


def aggregate(
    per_token: mx.array, mask: mx.array, mode: Aggregation, denominator: float | mx.array | None = None
) -> mx.array:
    r"""Per-token losses (B, T) to the one number that is differentiated.

    - ``token_mean``: sum over all True positions / their number. Long completions weigh more. (PPO, DAPO)
    - ``sequence_mean``: mean of each row over its own tokens, then sum over rows / B. Each completion weighs
      the same, so each token of a long one weighs less. (GRPO, GSPO)
    - ``fixed_length``: sum over all True positions / (B * T). No length enters at all. (Dr. GRPO)
    - ``sequence_sum``: sum over all True positions / B: the loss of a completion is the sum of its tokens',
      as REINFORCE has it. A sequence-level ratio would count n times in a row of n tokens. (REINFORCE, LUSPO)
    - ``micro_batch_mean``: ``token_mean`` over the micro-batch at hand instead of the whole step, which is
      TRL's ``bnpo``: pass the micro-batch's tokens times the number of micro-batches. The gradient then
      depends on how the step was split, which is why nothing here defaults to it.

    Args:
        per_token, mask: (B, T).
        mode: As above.
        denominator: What stands after the slash. A trainer that splits an optimiser step into micro-batches
            computes it once for the *whole* step (its tokens; its rows; its rows times the configured
            maximal completion length, not the width of a batch) and adds the results up; the gradient is
            then that of the undivided batch. The defaults are those of this batch alone, empty rows included.
    """
    check_same_shape(per_token=per_token, mask=mask)
    rows, length = mask.shape
    if mode in ("token_mean", "micro_batch_mean"):
        return masked_mean(per_token, mask, denominator)
    if mode == "sequence_mean":
        row_means = masked_mean(per_token, mask, axis=1)  # (B,)
        return masked_mean(row_means, mx.ones((rows,), dtype=mx.bool_), denominator)
    if mode == "fixed_length":
        return masked_mean(per_token, mask, rows * length if denominator is None else denominator)
    if mode == "sequence_sum":
        return masked_mean(per_token, mask, rows if denominator is None else denominator)
    raise ValueError(f"Unknown mode {mode!r}; choose one of {', '.join(get_args(Aggregation))}.")


class PolicyLossStatistics(NamedTuple):
    """Scalar sums over the True positions, not yet divided, so that micro-batches can be merged first."""

    token_count: mx.array
    clip_low: mx.array  # tokens with r < 1 - clip_epsilon and A < 0: the clip has taken their gradient away
    clip_high: (
        mx.array
    )  # tokens with r > 1 + clip_epsilon_high and A > 0: likewise; or above the cap, see below
    clip_region: mx.array  # either
    approx_kl: mx.array  # sum of exp(d) - 1 - d with d = logprobs - old_logprobs: k3 of KL(old || new)
    ratio_sum: mx.array
    ratio_min: mx.array  # +inf over no tokens, so that merging needs no special case
    ratio_max: mx.array  # -inf over no tokens

    def merge(self, other: PolicyLossStatistics) -> PolicyLossStatistics:
        """The statistics of the two batches together."""
        sums = PolicyLossStatistics(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))
        return sums._replace(
            ratio_min=mx.minimum(self.ratio_min, other.ratio_min),
            ratio_max=mx.maximum(self.ratio_max, other.ratio_max),
        )


def policy_loss_statistics(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    clip_epsilon: float = 0.2,
    clip_epsilon_high: float | None = None,
    ratio: RatioLevel = "token",
    ratio_cap: float | None = None,
) -> PolicyLossStatistics:
    """What to watch while the policy moves; no gradient flows through any of it.

    Divide by ``token_count`` after merging: a mean of the micro-batches' means would be something else.
    Clipping is counted where it takes the gradient away, which depends on the sign of the advantage. With a
    sequence-level ratio a clipped row counts with all its tokens. ``approx_kl`` is always token by token.

    With a ``ratio_cap`` (CISPO) there is no clip range: ``clip_high`` counts the tokens with r > ratio_cap and
    A > 0, whose gradient is limited, not gone, and ``clip_low`` is 0. Sapo and unclipped have no edge at all;
    for them the counts say how many tokens a clip would have caught.
    """
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    logprobs = mx.stop_gradient(logprobs)
    advantages = zero_masked(mx.stop_gradient(_per_token(advantages, mask)), mask)  # (B, T)
    mask = mask.astype(mx.bool_)
    r = importance_ratio(logprobs, old_logprobs, mask, ratio)  # (B, T), 1 where the mask is False
    lowest, highest = (1.0 - clip_epsilon, 1.0 + high) if ratio_cap is None else (0.0, ratio_cap)
    too_low = (r < lowest) & (advantages < 0)  # (B, T), False where the mask is: A is 0
    too_high = (r > highest) & (advantages > 0)  # (B, T)
    log_ratio = mx.minimum(_log_ratio(logprobs, old_logprobs, mask), MAX_LOG_RATIO)  # (B, T)
    return PolicyLossStatistics(
        token_count=true_count(mask),
        clip_low=true_count(too_low),
        clip_high=true_count(too_high),
        clip_region=true_count(too_low | too_high),
        approx_kl=masked_sum(mx.expm1(log_ratio) - log_ratio, mask),
        ratio_sum=masked_sum(r, mask),
        ratio_min=mx.min(mx.where(mask, r, mx.inf)),
        ratio_max=mx.max(mx.where(mask, r, -mx.inf)),
    )


def _log_ratio(logprobs: mx.array, old_logprobs: mx.array, mask: mx.array) -> mx.array:
    """log pi - log pi_old, (B, T): float32 before the subtraction, 0 at padding before any exponential."""
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    old_logprobs = mx.stop_gradient(old_logprobs)
    return zero_masked(logprobs.astype(mx.float32) - old_logprobs.astype(mx.float32), mask)


def _per_token(advantages: mx.array, mask: mx.array) -> mx.array:
    """(B,) or (B, T) advantages as (B, T)."""
    if advantages.ndim == 1 and advantages.shape == mask.shape[:1]:
        return mx.broadcast_to(advantages[:, None], mask.shape)
    if advantages.shape != mask.shape:
        raise ValueError(f"advantages {advantages.shape} must be (B,) or (B, T) of the mask {mask.shape}.")
    return advantages


def _check_options(
    clip_epsilon: float,
    clip_epsilon_high: float | None,
    surrogate: str,
    dual_clip: float | None,
    delta: float | None,
    ratio_cap: float | None,
) -> None:
    """Refuse options out of range, and options that the chosen surrogate would not read."""
    if surrogate not in get_args(Surrogate):
        raise ValueError(f"Unknown surrogate {surrogate!r}; choose one of {', '.join(get_args(Surrogate))}.")
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    if clip_epsilon < 0 or high < 0:
        raise ValueError(f"clip_epsilon {clip_epsilon} and clip_epsilon_high {high} must not be negative.")
    if surrogate != "clipped" and (dual_clip is not None or delta is not None):
        raise ValueError(f"dual_clip and delta belong to the clipped surrogate, not to {surrogate!r}.")
    if dual_clip is not None and delta is not None:
        raise ValueError("dual_clip and delta are the same limit: give one of them.")
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip must be greater than 1, but it is {dual_clip}.")
    if delta is not None and delta <= 1.0 + high:
        raise ValueError(
            f"delta must be greater than 1 + clip_epsilon_high = {1.0 + high}, but it is {delta}."
        )
    if ratio_cap is not None and (surrogate != "cispo" or ratio_cap <= 0):
        raise ValueError(f"ratio_cap {ratio_cap} must be greater than 0, and belongs to the cispo surrogate.")
