"""Tokens, masks and logprobs of sampled completions: is what is learned from what was sampled?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from diagnosis.findings import Finding, judged
from diagnosis.tolerance import at_mask, compute_dtype_of, largest, logprob_tolerance
from experience_buffer.data_structures import Prompt, Rollout, TokenBatch
from models.policy_model import PolicyModel
from token_attribution.extractor import extract

Extract = Callable[[Sequence[Rollout]], TokenBatch]


def check_mask(
    rollouts: Sequence[Rollout], end_ids: frozenset[int], extract_batch: Extract = extract
) -> Finding:
    """The mask is True at exactly the sampled tokens, their end token included.

    A completion with an end token is added, so that the end is seen even where no sampled one has reached it.
    """
    sampled = rollouts[0]
    ended = replace(
        sampled, completion_ids=(sampled.prompt.ids[0], min(end_ids)), logprobs=(-1.0, -1.0), terminated=True
    )
    rows = [*rollouts, ended]
    batch = extract_batch(rows)
    tokens, mask = np.array(batch.tokens), np.array(batch.mask)
    wrong, lost_ends = [], 0
    for row, rollout in enumerate(rows):
        learned = tokens[row, 1:][mask[row]].tolist()
        if learned != list(rollout.completion_ids):
            wrong.append(row)
            lost_ends += rollout.terminated and (not learned or learned[-1] not in end_ids)
    n_ended = sum(r.terminated for r in rollouts)
    seen = (
        f"{int(mask.sum())} tokens in the mask, {sum(len(r.completion_ids) for r in rows)} sampled; "
        f"{n_ended} of {len(rollouts)} completions ended by themselves"
    )
    if wrong:
        seen += f"; {len(wrong)} rows of {len(rows)} differ, {lost_ends} without their end token"
    return judged(
        "mask and end token",
        not wrong,
        seen,
        "the mask must be True where tokens[:, t+1] was sampled and nowhere else: look at "
        "token_attribution/extractor.py, or at what stands in its place",
    )


def check_sampler(
    policy: PolicyModel, rollouts: Sequence[Rollout], temperature: float, unlike: Sequence[str] = ()
) -> Finding:
    """The sampler's logprob of each token is the trainer's, up to rounding.

    ``unlike``: what the config says makes the sampler another distribution; then the difference is only told.
    """
    name = "sampler = trainer"
    batch = extract(rollouts)
    difference = at_mask(policy.logprobs(batch.tokens, batch.mask, temperature), batch.mask)
    difference -= at_mask(batch.sampler_logprobs, batch.mask)
    limit = logprob_tolerance(policy, batch.tokens, temperature)
    seen = (
        f"logprobs differ by {largest(difference):.2g} nats at most, {np.abs(difference).mean():.2g} on average "
        f"({difference.size} tokens, {_dtype(policy)} allows {limit:.2g})"
    )
    if unlike:
        return Finding(name, "ok", f"{seen}; they may, by {', '.join(unlike)}")
    return judged(
        name,
        bool(largest(difference) <= limit),
        seen,
        "the sampler draws from another distribution than the trainer differentiates: a temperature or cut that only "
        "one of them applies, or a cache that is wrong for this architecture; set importance_correction = "
        "token_truncate to train all the same",
    )


def check_batched(policy: PolicyModel, rollouts: Sequence[Rollout], temperature: float) -> Finding:
    """Each row of a ragged, padded batch gets the logprobs that it gets alone."""
    batch = extract(rollouts)
    together = policy.logprobs(batch.tokens, batch.mask, temperature)
    worst = 0.0
    for row, rollout in enumerate(rollouts):
        alone = extract([rollout])
        single = at_mask(policy.logprobs(alone.tokens, alone.mask, temperature), alone.mask)
        worst = max(worst, largest(at_mask(together[row], batch.mask[row]) - single))
    lengths = [len(r.prompt.ids) + len(r.completion_ids) for r in rollouts]
    limit = logprob_tolerance(policy, batch.tokens, temperature)
    return judged(
        "batched = single",
        worst <= limit,
        f"{len(rollouts)} rows of {min(lengths)} to {max(lengths)} tokens: together and alone they differ by "
        f"{worst:.2g} nats at most ({_dtype(policy)} allows {limit:.2g})",
        "a row's logprobs depend on what is beside it or on its padding, so this architecture does not work in "
        "batches as it stands: train with micro_batch_size = 1 and rollout_batch_size = 1, and report it",
    )


def check_prompt_matters(policy: PolicyModel, rollouts: Sequence[Rollout], temperature: float) -> Finding:
    """Completions have other logprobs after other prompts of the same length.

    Told by the tokens from the second on: the first is predicted from the prompt's last token even by a model that
    sees one token at a time.
    """
    name, batch = "prompt is seen", extract(rollouts)
    others = extract([replace(r, prompt=_another(r.prompt)) for r in rollouts])
    first = mx.argmax(batch.mask.astype(mx.int32), axis=1)[:, None]  # (B, 1)
    later = batch.mask & (mx.arange(batch.mask.shape[1])[None] > first)
    if not bool(mx.any(later)):
        return Finding(
            name,
            "warning",
            "every completion is one token long, so nothing can be told",
            "let the doctor sample longer ones with --max-new-tokens",
        )
    difference = at_mask(policy.logprobs(batch.tokens, batch.mask, temperature), later)
    difference -= at_mask(policy.logprobs(others.tokens, others.mask, temperature), later)
    limit = logprob_tolerance(policy, batch.tokens, temperature)
    noise = 64 * 2.0**-23 if limit <= 1e-3 else limit / 8
    return judged(
        name,
        bool(largest(difference) > noise),
        f"with another prompt the logprobs of completions change by {largest(difference):.2g} nats at most, "
        f"{np.abs(difference).mean():.2g} on average (rounding: {noise:.1g})",
        "what the model says does not depend on what it was asked: look for a broken attention or cache, prompts cut "
        "to nothing (max_prompt_length), or a checkpoint whose attention weights are missing",
    )


def _another(prompt: Prompt) -> Prompt:
    """As many tokens as the prompt has, each another one: of the prompt's own where it has several."""
    ids = prompt.ids
    shifted = (*ids[1:], ids[0])
    different = tuple(
        s if s != i else (s + 1 if s == 0 else s - 1) for s, i in zip(shifted, ids, strict=True)
    )
    return replace(prompt, ids=different)


def _dtype(policy: PolicyModel) -> str:
    return str(compute_dtype_of(policy.model)).removeprefix("mlx.core.")
