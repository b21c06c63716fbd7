"""Advantages without a critic: each completion is compared with the others of its group.

The completions of one prompt form a group. Which rows belong together is said explicitly, by ``group_ids``:
any integers in any order, groups of any sizes. Nothing is reshaped to (prompts, G), so shuffled, filtered or
uneven batches cannot mix two prompts.

A NaN score marks a row that could not be scored. It takes no part in any statistic and its advantage is 0;
reading it as a score of 0 would shift the whole group.

Everything here compares the rows pairwise, (B, B): nothing beside a language model's forward for the few
thousand rows that a rollout batch may have.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import mlx.core as mx

from token_attribution.masking import check_same_shape, masked_var, nonzero_denominator, zero_masked

Scale = Literal["group", "batch", "none"]


class GroupStatistics(NamedTuple):
    """Statistics of each row's group, over its scorable rows; all float32."""

    mean: mx.array  # (B,) 0 where no row of the group is scorable
    std: mx.array  # (B,) Bessel; 0 in a group of fewer than two
    size: mx.array  # (B,) scorable rows of the group
    frac_zero_std: mx.array  # () share of the scorable rows whose group has no spread, so teaches nothing


def group_advantages(
    scores: mx.array, group_ids: mx.array, scale: Scale = "group", eps: float = 1e-4
) -> mx.array:
    r"""Score minus the group's mean, divided by a standard deviation.

    .. math:: A_i = (s_i - \text{mean}_g) / (\text{std} + \epsilon)

    Args:
        scores: (B,); NaN where a row could not be scored.
        group_ids: (B,) integers; equal where rows answer the same prompt.
        scale: Which standard deviation (Bessel) divides. ``group``: the group's, GRPO
            (https://arxiv.org/abs/2402.03300). ``batch``: that of all scores, so that a group of nearly equal
            scores is not blown up (https://arxiv.org/abs/2508.08221). ``none``: nothing divides, Dr. GRPO
            (https://arxiv.org/abs/2503.20783); this is ``leave_one_out`` times (G - 1) / G.
        eps: Added to the standard deviation.

    Returns:
        (B,) float32. Exactly 0 for unscorable rows, for groups of equal scores and for a group of one, which
        has nothing to be compared with.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"Unknown scale {scale!r}; choose one of {', '.join(get_args(Scale))}.")
    groups = _compare(scores, group_ids)
    if scale == "none":
        return groups.centred
    scorable = ~mx.isnan(scores)
    std = groups.std if scale == "group" else mx.sqrt(masked_var(scores, scorable))
    return groups.centred / nonzero_denominator(std + eps)


def leave_one_out(scores: mx.array, group_ids: mx.array) -> mx.array:
    r"""Score minus the mean of the *other* scores of the group: RLOO's unbiased baseline.

    .. math:: A_i = s_i - \frac{1}{G - 1} \sum_{j \ne i} s_j = \frac{G}{G - 1} (s_i - \text{mean}_g)

    (https://arxiv.org/abs/2402.14740). Computed in the second form, which gives exactly 0 for equal scores.

    Args:
        scores: (B,); NaN where a row could not be scored.
        group_ids: (B,) integers; equal where rows answer the same prompt.

    Returns:
        (B,) float32; 0 for unscorable rows, and for a group of one: without others there is no baseline.
    """
    groups = _compare(scores, group_ids)
    return groups.centred * groups.size / mx.maximum(groups.size - 1.0, 1.0)


def length_weighted_advantages(scores: mx.array, lengths: mx.array, group_ids: mx.array) -> mx.array:
    r"""Score minus the group's mean weighted by length: OPO's baseline.

    .. math:: A_i = s_i - \frac{\sum_j n_j s_j}{\sum_j n_j}

    over the scorable rows j of the group (https://arxiv.org/abs/2505.23585): the baseline of least
    variance if the squared gradient of a completion grows with its length n. Equal lengths give the plain mean.

    Args:
        scores: (B,); NaN where a row could not be scored.
        lengths: (B,) tokens of each completion.
        group_ids: (B,) integers; equal where rows answer the same prompt.

    Returns:
        (B,) float32; 0 for unscorable rows, and exactly 0 in groups of equal scores.
    """
    check_same_shape(scores=scores, lengths=lengths)
    groups = _compare(scores, group_ids)
    scorable = ~mx.isnan(scores)
    members = (group_ids[:, None] == group_ids[None, :]) & scorable[None, :]  # (B, B)
    weights = mx.where(members, lengths.astype(mx.float32)[None, :], 0.0)  # (B, B)
    # The weighted mean of the distances from the plain mean: exact zeros stay exact.
    shift = mx.sum(weights * groups.centred[None, :], axis=1) / nonzero_denominator(mx.sum(weights, axis=1))
    return zero_masked(groups.centred - shift, scorable)


def group_statistics(scores: mx.array, group_ids: mx.array) -> GroupStatistics:
    """Mean, standard deviation and size of each row's group; the share of rows in groups without spread."""
    groups = _compare(scores, group_ids)
    scorable = ~mx.isnan(scores)
    without_spread = scorable & (groups.std < 1e-8)
    n_scorable = mx.sum(scorable).astype(mx.float32)
    frac_zero_std = mx.sum(without_spread).astype(mx.float32) / nonzero_denominator(n_scorable)
    return GroupStatistics(groups.mean, groups.std, groups.size, frac_zero_std)


class _Groups(NamedTuple):
    centred: mx.array  # (B,) score - mean; 0 for unscorable rows
    mean: mx.array  # (B,)
    std: mx.array  # (B,)
    size: mx.array  # (B,)


def _compare(scores: mx.array, group_ids: mx.array) -> _Groups:
    check_same_shape(scores=scores, group_ids=group_ids)
    if scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and group_ids {group_ids.shape} must be (B,).")
    scorable = ~mx.isnan(scores)  # (B,)
    scores = zero_masked(scores, scorable)  # (B,)
    same_group = group_ids[:, None] == group_ids[None, :]  # (B, B)
    members = same_group & scorable[None, :]  # (B, B), True where row j counts in row i's group
    size = mx.sum(members, axis=1).astype(mx.float32)  # (B,)

    # Deviations are taken from the group's best score before they are averaged: equal scores then give
    # exact zeros, whereas a rounded mean (of three times 0.1, say) leaves a residue that a std near 0 would
    # blow up.
    best = mx.max(mx.where(members, scores[None, :], -mx.inf), axis=1)  # (B,)
    best = mx.where(size > 0, best, 0.0)
    from_best = mx.where(members, scores[None, :] - best[:, None], 0.0)  # (B, B), <= 0
    # where and sum, not a matrix product: on some GPUs that would round to TF32.
    mean_from_best = mx.sum(from_best, axis=1) / nonzero_denominator(size)  # (B,)
    spread = mx.where(members, from_best - mean_from_best[:, None], 0.0)  # (B, B)
    std = mx.sqrt(mx.sum(mx.square(spread), axis=1) / mx.maximum(size - 1.0, 1.0))  # (B,)

    centred = zero_masked((scores - best) - mean_from_best, scorable)  # (B,)
    return _Groups(centred, best + mean_from_best, std, size)
