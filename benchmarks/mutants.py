"""Plant the usual mistakes one by one and see that some test notices: the table in docs/correctness.md.

    ./run mutants                      all of them, two at a time
    ./run mutants --only kl-sign --markdown
    ./run mutants --list
    ./run mutants --output verdicts.json

A mutant is one replacement in one file. For each, the named tests run in a copy of the checkout. It is caught if one
of them fails by what it asserts, or because our own code refuses in a sentence, and if that test passes without the
mutant. A crash, a time limit or a failed collection is no catch: it says that something is broken, not what, and
often it is the mutant. Exit code 1 if any survives or has no verdict; a mutant whose text does not stand in its file
exactly once is an error, found before anything runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 300  # seconds per mutant
#: How pytest tells a failed assertion, a refusal that did not come, and a sentence of config/errors.py.
REFUSALS = ("InvalidConfiguration", "ModelLoad", "DataLoad", "Checkpoint", "TrainingRuntime", "Reward")
NOTICED = re.compile(rf"assert |AssertionError|Failed: |(config\.errors\.)?({'|'.join(REFUSALS)})Error")


class Mutant(NamedTuple):
    """One planted mistake."""

    mistake: int  # its number in MISTAKES
    name: str
    file: str
    old: str  # stands exactly once in the file
    new: str
    tests: str  # what should notice: pytest arguments


#: 1 to 15 are those that implementations of RLHF make most; 16 is what off-policy rollouts add, 17 what speed does,
#: 18 what adapters do, 19 what a resume does.
MISTAKES = {
    1: "temperature missing in one of the forwards, or truncated sampling taken for the policy's",
    2: "off by one between logits and labels",
    3: "end token dropped from, or padding leaked into, masks and denominators",
    4: "pad = eos, or an end token in the last slot taken for truncation",
    5: "loss averaged per micro-batch, or divided twice",
    6: "GAE reads padding; whitening over padding; returns from whitened advantages",
    7: "score on the wrong token",
    8: "KL: wrong sign, k1 as a loss, other estimators in the reward, plain k3 taken for reverse KL",
    9: "clip: min for max, upper epsilon ignored, gradient through the clipped branch",
    10: "old logprobs recomputed or not detached, so that the ratio is always 1",
    11: "group statistics: groups mixed, self-inclusive baseline, wrong deviation, None as 0, truncated rows",
    12: "sequence ratio as a product instead of a geometric mean, or the other way round",
    13: "value loss: min for max, clip around the return, missing half, shifted index, gradient through targets",
    14: "optimiser: no bias correction, hidden weight decay, no clip; reference that is the policy",
    15: "preference losses: sign of the margin, pair or reference exchanged, score at padding; prompt in the loss",
    16: "rollouts not accounted for: weights inverted, differentiable, missing; dead groups by shaped scores",
    17: "passes shared, chunked or left out: positions, masks, slopes, denominators",
    18: "adapters: scale, sign, shape, magnitude; a part left out of the file, of the reference or of what is seen",
    19: "resume: optimiser, schedule, order of batches, dropout, best weights or reference not what they were",
}

LOSS = "tests/training/test_policy_loss.py"
IDENTITIES = "tests/ppo_trainer/test_identities.py"
BANDIT = "tests/ppo_trainer/test_bandit.py"
SAMPLERS = "tests/ppo_trainer/test_biased_samplers.py"
FIRST = "tests/ppo_trainer/test_first_minibatch.py"
GRADIENTS = "tests/ppo_trainer/test_update_gradients.py"
ROWS = "tests/ppo_trainer/test_rows_and_groups.py"
LOGPROBS = "tests/token_attribution/test_logprob_math.py tests/token_attribution/test_token_logprobs.py"
OPTIMISER = "tests/training/test_model_trainer.py"
DECODING = "tests/models/test_decoding.py tests/models/test_decoding_rows.py"
KL = "tests/reward_kl/test_kl_estimators.py tests/reward_kl/test_kl_gradients.py"
GROUPS = "tests/advantage/test_group_relative.py"
STAGES = "tests/training/test_stage_resume.py -k"
SUMS = "tests/advantage/test_discounted_sums.py"
VALUES = "tests/training/test_value_loss.py"
PREFERENCES = "tests/training/test_preference_loss.py"
OBJECTIVES = "tests/training/test_preference_algorithms.py"
CORRECTION = "tests/training/test_importance_correction.py"
CREDIT = "tests/ppo_trainer/test_algorithms.py"
OPTIONS = "tests/ppo_trainer/test_update_options.py"
ADAPTERS = "tests/base_setup/test_adapter_layers.py"
PLACED = "    linear_to_lora_layers(model, layers, parameters, use_dora=use_dora)\n"

MUTANTS = (
    # 1
    Mutant(
        1,
        "temperature-update",
        "ppo_trainer/objective.py",
        "            self.config.temperature,\n            wanted=Wanted(True",
        "            1.0,\n            wanted=Wanted(True",
        f"{FIRST} -k exact_and_afterwards",
    ),
    Mutant(
        1,
        "temperature-of-the-logits",
        "token_attribution/vocabulary.py",
        "        return z if self.temperature == 1.0 else z / self.temperature",
        "        return z",
        "tests/token_attribution/test_full_kl.py",
    ),
    Mutant(
        1,
        "temperature-of-the-slope",
        "token_attribution/vocabulary.py",
        "        return (slope / self.temperature).astype(logits.dtype)",
        "        return slope.astype(logits.dtype)",
        "tests/token_attribution/test_full_kl.py",
    ),
    Mutant(
        1,
        "temperature-old",
        "ppo_trainer/experience_maker.py",
        "            self.config.temperature,\n            wanted=Wanted(",
        "            1.0,\n            wanted=Wanted(",
        f"{FIRST} -k exact_and_afterwards",
    ),
    Mutant(
        1,
        "temperature-reference",
        "ppo_trainer/experience_maker.py",
        "return self.reference.logprobs(tokens, mask, self.config.temperature)",
        "return self.reference.logprobs(tokens, mask)",
        f"{FIRST} -k exact_and_afterwards",
    ),
    Mutant(
        1,
        "temperature-sampling",
        "models/sampling.py",
        "z = logits.astype(mx.float32) * (1.0 / sampling.temperature)",
        "z = logits.astype(mx.float32)",
        f"{DECODING} {FIRST} -k exact_and_afterwards",
    ),
    Mutant(
        1,
        "temperature-multiplied",
        "token_attribution/logprob_computer.py",
        "return logits if temperature == 1.0 else logits / temperature",
        "return logits if temperature == 1.0 else logits * temperature",
        LOGPROBS,
    ),
    Mutant(
        1,
        "truncation-unnoticed",
        "config/ppo_config.py",
        "if unlike and not corrected and not self.allow_truncated_sampling:",
        "if False:",
        "tests/config/test_config_classes.py tests/ppo_trainer/test_bad_input.py -k 'found_before or one_sentence'",
    ),
    # 2
    Mutant(
        2,
        "labels-off-by-one",
        "token_attribution/logprob_computer.py",
        "tokens[:, 1:].reshape(-1)[",
        "tokens[:, :-1].reshape(-1)[",
        LOGPROBS,
    ),
    Mutant(
        2,
        "mask-off-by-one",
        "token_attribution/extractor.py",
        "mask[row, len(prompt) - 1 : lengths[row] - 1] = True",
        "mask[row, len(prompt) : lengths[row]] = True",
        "tests/token_attribution/test_extractor.py",
    ),
    Mutant(
        2,
        "first-token-lost",
        "token_attribution/extractor.py",
        "mask[row, len(prompt) - 1 : lengths[row] - 1] = True",
        "mask[row, len(prompt) : lengths[row] - 1] = True",
        "tests/token_attribution/test_extractor.py",
    ),
    Mutant(
        2,
        "sampler-off-by-one",
        "token_attribution/extractor.py",
        "return TokenBatch(tokens, mask, mx.array(sampler))",
        "return TokenBatch(tokens, mask, mx.array(np.roll(sampler, 1, axis=1)))",
        "tests/token_attribution/test_extractor.py",
    ),
    # 3
    Mutant(
        3,
        "end-token-dropped",
        "token_attribution/extractor.py",
        "return (mx.cumsum(counts, axis=1) - counts) == 0",
        "return mx.cumsum(counts, axis=1) == 0",
        "tests/token_attribution/test_extractor.py",
    ),
    Mutant(
        3,
        "mean-over-padding",
        "token_attribution/masking.py",
        "count = true_count(mask, axis) if denominator is None else denominator",
        "count = mask.size if denominator is None else denominator",
        "tests/token_attribution/test_masking.py",
    ),
    Mutant(
        3,
        "padding-multiplied-by-zero",
        "token_attribution/masking.py",
        "return mx.where(mask.astype(mx.bool_), x.astype(mx.float32), 0.0)",
        "return mask.astype(mx.float32) * x.astype(mx.float32)",
        "tests/token_attribution/test_masking.py",
    ),
    Mutant(
        3,
        "last-sampled-token-out-of-the-mask",
        "token_attribution/extractor.py",
        "mask[row, len(prompt) - 1 : lengths[row] - 1] = True",
        "mask[row, len(prompt) - 1 : lengths[row] - 2] = True",
        "tests/token_attribution/test_extractor.py",
    ),
    Mutant(
        3,
        "sampled-end-token-lost",
        "models/completions.py",
        "        self.lengths[rows] = columns + 1\n",
        "        self.lengths[rows] = columns + 1 - ended\n",
        DECODING,
    ),
    # 4
    Mutant(
        4,
        "last-slot-is-truncation",
        "models/completions.py",
        "        self.terminated[rows] = ended\n",
        "        self.terminated[rows] = ended & (columns + 1 < self.ids.shape[1])\n",
        DECODING,
    ),
    Mutant(
        4,
        "padding-by-token",
        "token_attribution/extractor.py",
        "    return mx.array(tokens), mx.array(mask)",
        "    return mx.array(tokens), mx.array(mask & (tokens[:, 1:] != 0))",
        "tests/token_attribution/test_extractor.py",
    ),
    # 5
    Mutant(
        5,
        "token-mean-per-micro-batch",
        "ppo_trainer/objective.py",
        "return max(whole.n_tokens, 1)",
        "return mx.sum(part.mask)",
        f"{IDENTITIES} -k one_by_eight",
    ),
    Mutant(
        5,
        "row-mean-per-micro-batch",
        "ppo_trainer/objective.py",
        "rows = max(whole.n_rows, 1)",
        "rows = part.mask.shape[0]",
        f"{IDENTITIES} -k one_by_eight",
    ),
    Mutant(
        5,
        "entropy-per-micro-batch",
        "ppo_trainer/objective.py",
        "tokens.entropy, mask, max(whole.n_tokens, 1)",
        "tokens.entropy, mask, None",
        f"{IDENTITIES} -k one_by_eight",
    ),
    Mutant(
        5,
        "value-loss-per-micro-batch",
        "ppo_trainer/objective.py",
        "count = max(whole.n_tokens, 1)\n        return value_loss",
        "count = mx.sum(part.mask)\n        return value_loss",
        f"{GRADIENTS} -k 'micro_batches_add_up or whatever_the_micro_batch'",
    ),
    Mutant(
        5,
        "divided-twice",
        "training/model_trainer.py",
        "        flat = named_arrays(gradients)\n",
        "        flat = named_arrays(tree_map(lambda g: g / len(extras), gradients))\n",
        f"{OPTIMISER} -k micro",
    ),
    Mutant(
        5,
        "gradients-of-the-last-alone",
        "training/model_trainer.py",
        "gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)",
        "gradients = gradient",
        f"{OPTIMISER} {GRADIENTS} -k 'micro'",
    ),
    # 6
    Mutant(
        6,
        "values-at-padding",
        "advantage/td_error.py",
        "    rewards, values = zero_masked(rewards, mask), zero_masked(values, mask)\n"
        "    return zero_masked(rewards + gamma * next_true_value(values, mask) - values, mask)",
        "    following = mx.pad(values[:, 1:], [(0, 0), (0, 1)])\n"
        "    return zero_masked(rewards + gamma * following - values, mask)",
        SUMS,
    ),
    Mutant(
        6,
        "holes-end-the-episode",
        "advantage/discounted_sum.py",
        "y = _linear_recurrence(mx.where(mask.astype(mx.bool_), discount, 1.0), zero_masked(x, mask))",
        "y = _linear_recurrence(mx.where(mask.astype(mx.bool_), discount, 0.0), zero_masked(x, mask))",
        SUMS,
    ),
    Mutant(
        6,
        "whitening-over-padding",
        "ppo_trainer/credit.py",
        "masked_whiten(advantages, batch.mask) if",
        "masked_whiten(advantages, mx.ones_like(batch.mask)) if",
        f"{CREDIT} {IDENTITIES} -k 'whitened or reinforce_pp'",
    ),
    Mutant(
        6,
        "returns-from-whitened",
        "ppo_trainer/credit.py",
        "    return Credit(masked_whiten(advantages, batch.mask) if config.whiten_advantages else advantages, returns)",
        "    white = masked_whiten(advantages, batch.mask) if config.whiten_advantages else advantages\n"
        "    return Credit(white, None if batch.values is None else white + batch.values)",
        f"{CREDIT} -k whitened",
    ),
    Mutant(
        6,
        "trace-decay-without-discount",
        "advantage/gae_advantage.py",
        "td_error(rewards, values, mask, gamma), mask, gamma * lam)",
        "td_error(rewards, values, mask, gamma), mask, lam)",
        SUMS,
    ),
    # 7
    Mutant(
        7,
        "score-one-early",
        "reward_kl/reward_computer.py",
        "is_last = positions == last_true_index(mask)[:, None]",
        "is_last = positions == last_true_index(mask)[:, None] - 1",
        "tests/reward_kl/test_reward_computer.py",
    ),
    Mutant(
        7,
        "score-one-late",
        "reward_kl/reward_computer.py",
        "is_last = positions == last_true_index(mask)[:, None]",
        "is_last = positions == last_true_index(mask)[:, None] + 1",
        "tests/reward_kl/test_reward_computer.py",
    ),
    Mutant(
        7,
        "score-on-the-last-column",
        "reward_kl/reward_computer.py",
        "is_last = positions == last_true_index(mask)[:, None]",
        "is_last = positions == mx.full((mask.shape[0], 1), mask.shape[1] - 1)",
        "tests/reward_kl/test_reward_computer.py",
    ),
    # 8
    Mutant(
        8,
        "kl-sign",
        "reward_kl/kl_divergence.py",
        "log_ratio = logprobs.astype(mx.float32) - mx.stop_gradient(ref_logprobs).astype(mx.float32)  # (B, T)",
        "log_ratio = mx.stop_gradient(ref_logprobs).astype(mx.float32) - logprobs.astype(mx.float32)  # (B, T)",
        KL,
    ),
    Mutant(
        8,
        "kl-rewarded",
        "reward_kl/reward_computer.py",
        "return rewards - kl_coef * zero_masked(kl, mask)",
        "return rewards + kl_coef * zero_masked(kl, mask)",
        "tests/reward_kl/test_reward_computer.py",
    ),
    Mutant(
        8,
        "k3-turned-round",
        "reward_kl/kl_divergence.py",
        "reversed_ratio = mx.minimum(-log_ratio, MAX_LOG_RATIO)",
        "reversed_ratio = mx.minimum(log_ratio, MAX_LOG_RATIO)",
        KL,
    ),
    Mutant(
        8,
        "reference-with-gradient",
        "reward_kl/kl_divergence.py",
        "log_ratio = logprobs.astype(mx.float32) - mx.stop_gradient(ref_logprobs).astype(mx.float32)  # (B, T)",
        "log_ratio = logprobs.astype(mx.float32) - ref_logprobs.astype(mx.float32)  # (B, T)",
        KL,
    ),
    Mutant(
        8,
        "k1-as-a-loss",
        "ppo_trainer/resolution.py",
        '        if estimator == "k1":\n            raise',
        '        if estimator == "k1":\n            return\n            raise',
        "tests/ppo_trainer/test_resolution.py",
    ),
    Mutant(
        8,
        "any-estimator-in-the-reward",
        "ppo_trainer/resolution.py",
        "if estimator not in RIGHT_IN_REWARD and not config.allow_biased_kl:",
        "if False:",
        "tests/ppo_trainer/test_resolution.py",
    ),
    Mutant(
        8,
        "k2-off-policy",
        "ppo_trainer/resolution.py",
        "if estimator in ON_POLICY_ONLY and several:",
        "if False:",
        "tests/ppo_trainer/test_resolution.py",
    ),
    Mutant(
        8,
        "plain-k3",
        "ppo_trainer/objective.py",
        "ratio = importance_ratio(logprobs, old, part.mask)",
        "ratio = 1.0",
        f"{BANDIT} {GRADIENTS} -k 'grpo or reverse_kl'",
    ),
    Mutant(
        8,
        "ratio-of-k3-detached",
        "ppo_trainer/objective.py",
        "ratio = importance_ratio(logprobs, old, part.mask)",
        "ratio = mx.stop_gradient(importance_ratio(logprobs, old, part.mask))",
        f"{BANDIT} {GRADIENTS} -k 'grpo or reverse_kl'",
    ),
    Mutant(
        8,
        "kl-not-in-the-loss",
        "ppo_trainer/objective.py",
        "            per_token = per_token + beta * kl\n        if self._correction",
        "            per_token = per_token + 0 * kl\n        if self._correction",
        f"{BANDIT} -k grpo",
    ),
    Mutant(
        8,
        "full-kl-of-the-reference",
        "token_attribution/vocabulary.py",
        "            kl = _expected(mx.exp(logp), logp - self._ref_logp(chunk))",
        "            kl = _expected(mx.exp(self._ref_logp(chunk)), self._ref_logp(chunk) - logp)",
        "tests/token_attribution/test_full_kl.py",
    ),
    Mutant(
        8,
        "kl-coefficient-away-from-target",
        "reward_kl/kl_divergence.py",
        "self.value *= 1.0 + error * n_samples / self.horizon",
        "self.value *= 1.0 - error * n_samples / self.horizon",
        KL,
    ),
    Mutant(
        8,
        "kl-unit",
        "ppo_trainer/ppo_trainer.py",
        'key = "objective/kl" if self.config.kl_unit == "sequence" else "objective/kl_per_token"',
        'key = "objective/kl_per_token"',
        "tests/ppo_trainer/test_run_schedules.py -k whole_sequences",
    ),
    # 9
    Mutant(
        9,
        "clip-min-for-max",
        "training/policy_loss.py",
        "losses = mx.maximum(clipped, unclipped)",
        "losses = mx.minimum(clipped, unclipped)",
        LOSS,
    ),
    Mutant(
        9,
        "upper-epsilon-ignored",
        "training/policy_loss.py",
        "clipped = -mx.clip(r, 1.0 - clip_epsilon, 1.0 + high) * advantages",
        "clipped = -mx.clip(r, 1.0 - clip_epsilon, 1.0 + clip_epsilon) * advantages",
        f"{LOSS} {IDENTITIES} -k 'clip'",
    ),
    Mutant(
        9,
        "upper-epsilon-not-passed",
        "ppo_trainer/objective.py",
        '"clip_epsilon_high": config.clip_epsilon_high,',
        '"clip_epsilon_high": None,',
        f"{IDENTITIES} -k clips_higher",
    ),
    Mutant(
        9,
        "gradient-through-the-clip",
        "training/policy_loss.py",
        "clipped = -mx.clip(r, 1.0 - clip_epsilon, 1.0 + high) * advantages",
        "clipped = -(mx.stop_gradient(mx.clip(r, 1.0 - clip_epsilon, 1.0 + high) - r) + r) * advantages",
        LOSS,
    ),
    Mutant(
        9,
        "loss-clipped-and-not-the-ratio",
        "training/policy_loss.py",
        "clipped = -mx.clip(r, 1.0 - clip_epsilon, 1.0 + high) * advantages",
        "clipped = mx.clip(-r * advantages, 1.0 - clip_epsilon, 1.0 + high)",
        LOSS,
    ),
    Mutant(
        9,
        "dual-clip-everywhere",
        "training/policy_loss.py",
        "losses = mx.where(advantages < 0, mx.minimum(-dual_clip * advantages, losses), losses)",
        "losses = mx.minimum(-dual_clip * advantages, losses)",
        LOSS,
    ),
    Mutant(
        9,
        "cispo-weight-with-gradient",
        "training/policy_loss.py",
        "weight = mx.stop_gradient(r if ratio_cap is None else mx.minimum(r, ratio_cap))",
        "weight = r if ratio_cap is None else mx.minimum(r, ratio_cap)",
        f"{LOSS} {IDENTITIES} -k cispo",
    ),
    # 10
    Mutant(
        10,
        "old-not-detached",
        "training/policy_loss.py",
        "    old_logprobs = mx.stop_gradient(old_logprobs)\n",
        "",
        LOSS,
    ),
    Mutant(
        10,
        "old-is-always-new",
        "ppo_trainer/objective.py",
        "if first or part.old_logprobs is None:",
        "if True:",
        f"{FIRST} {GRADIENTS} -k 'second_epoch or clip_range'",
    ),
    Mutant(
        10,
        "every-step-is-the-first",
        "ppo_trainer/updater.py",
        "first=not _has_moved(reports)",
        "first=True",
        f"{FIRST} -k second_epoch",
    ),
    Mutant(
        10,
        "advantages-not-detached",
        "training/policy_loss.py",
        "    advantages = zero_masked(mx.stop_gradient(_per_token(advantages, mask)), mask)  # (B, T)\n"
        "    r = importance_ratio(logprobs, old_logprobs, mask, ratio)  # (B, T)\n\n",
        "    advantages = zero_masked(_per_token(advantages, mask), mask)  # (B, T)\n"
        "    r = importance_ratio(logprobs, old_logprobs, mask, ratio)  # (B, T)\n\n",
        LOSS,
    ),
    # 11
    Mutant(
        11,
        "groups-mixed",
        "advantage/group_relative.py",
        "    same_group = group_ids[:, None] == group_ids[None, :]  # (B, B)",
        "    same_group = mx.ones((scores.size, scores.size), dtype=mx.bool_)  # (B, B)",
        GROUPS,
    ),
    Mutant(
        11,
        "groups-by-place",
        "advantage/group_relative.py",
        "    same_group = group_ids[:, None] == group_ids[None, :]  # (B, B)",
        "    place = mx.arange(scores.size) // 2\n    same_group = place[:, None] == place[None, :]  # (B, B)",
        GROUPS,
    ),
    Mutant(
        11,
        "unscorable-counted-as-zero",
        "advantage/group_relative.py",
        "members = same_group & scorable[None, :]  # (B, B), True",
        "members = same_group  # (B, B), True",
        GROUPS,
    ),
    Mutant(
        11,
        "deviation-of-the-batch",
        "advantage/group_relative.py",
        'std = groups.std if scale == "group" else',
        'std = groups.std if scale == "never" else',
        GROUPS,
    ),
    Mutant(
        11,
        "divided-by-a-deviation-of-zero",
        "advantage/group_relative.py",
        "return groups.centred / nonzero_denominator(std + eps)",
        "return groups.centred / std",
        GROUPS,
    ),
    Mutant(
        11,
        "population-deviation",
        "advantage/group_relative.py",
        "mx.maximum(size - 1.0, 1.0))  # (B,)",
        "mx.maximum(size, 1.0))  # (B,)",
        GROUPS,
    ),
    Mutant(
        11,
        "self-inclusive-baseline",
        "advantage/group_relative.py",
        "return groups.centred * groups.size / mx.maximum(groups.size - 1.0, 1.0)",
        "return groups.centred",
        GROUPS,
    ),
    Mutant(
        11,
        "none-read-as-zero",
        "ppo_trainer/experience_maker.py",
        "raw = mx.array(scored.total)  # (B,), NaN where no reward applies",
        "raw = mx.nan_to_num(mx.array(scored.total))",
        f"{ROWS} -k 'no_reward_applies or unscored'",
    ),
    Mutant(
        11,
        "group-named-by-member",
        "ppo_trainer/experience_maker.py",
        "group_ids = mx.array([r.prompt.index for r in rollouts])",
        "group_ids = mx.array([r.member for r in rollouts])",
        f"{ROWS} -k own_group",
    ),
    Mutant(
        11,
        "truncated-out-of-the-baseline",
        "ppo_trainer/experience_maker.py",
        "batch = batch._replace(mask=batch.mask & ~mx.isnan(raw)[:, None])",
        "if self.config.mask_truncated_completions:\n"
        "            raw = mx.where(mx.array([r.terminated for r in rollouts]), raw, mx.nan)\n"
        "        batch = batch._replace(mask=batch.mask & ~mx.isnan(raw)[:, None])",
        "tests/ppo_trainer/test_scores.py",
    ),
    Mutant(
        11,
        "truncated-teach-all-the-same",
        "ppo_trainer/experience_maker.py",
        "return batch.mask & mx.array([r.terminated for r in rollouts])[:, None]",
        "return batch.mask",
        "tests/ppo_trainer/test_scores.py -k truncated",
    ),
    # 12
    Mutant(
        12,
        "gspo-product",
        "training/policy_loss.py",
        "log_ratio = mx.broadcast_to(masked_mean(log_ratio, mask, axis=1)[:, None], mask.shape)",
        "log_ratio = mx.broadcast_to(masked_sum(log_ratio, mask, axis=1)[:, None], mask.shape)",
        LOSS,
    ),
    Mutant(
        12,
        "rloo-geometric-mean",
        "ppo_trainer/algorithms.py",
        'ratio="sequence_product",',
        'ratio="sequence",',
        IDENTITIES,
    ),
    Mutant(
        12,
        "gspo-token-mean",
        "ppo_trainer/algorithms.py",
        '    ratio="sequence",\n    reduction="sequence_mean",',
        '    ratio="sequence",',
        IDENTITIES,
    ),
    Mutant(
        12,
        "sequence-mean-is-a-sum",
        "training/policy_loss.py",
        "row_means = masked_mean(per_token, mask, axis=1)  # (B,)",
        "row_means = masked_sum(per_token, mask, axis=1)  # (B,)",
        LOSS,
    ),
    # 13
    Mutant(
        13,
        "value-min-for-max",
        "training/value_loss.py",
        "return 0.5 * masked_mean(mx.maximum(clipped, unclipped), mask, denominator)",
        "return 0.5 * masked_mean(mx.minimum(clipped, unclipped), mask, denominator)",
        VALUES,
    ),
    Mutant(
        13,
        "value-without-half",
        "training/value_loss.py",
        "return 0.5 * masked_mean(mx.maximum(clipped, unclipped), mask, denominator)",
        "return masked_mean(mx.maximum(clipped, unclipped), mask, denominator)",
        VALUES,
    ),
    Mutant(
        13,
        "value-clip-around-the-return",
        "training/value_loss.py",
        "limited = mx.clip(values, old_values - clip_range_value, old_values + clip_range_value)",
        "limited = mx.clip(values, returns - clip_range_value, returns + clip_range_value)",
        VALUES,
    ),
    Mutant(
        13,
        "returns-with-gradient",
        "training/value_loss.py",
        "returns = zero_masked(mx.stop_gradient(returns), mask)",
        "returns = zero_masked(returns, mask)",
        VALUES,
    ),
    Mutant(
        13,
        "old-values-with-gradient",
        "training/value_loss.py",
        "old_values = zero_masked(mx.stop_gradient(old_values), mask)",
        "old_values = zero_masked(old_values, mask)",
        VALUES,
    ),
    Mutant(
        13,
        "value-shifted",
        "models/value_model.py",
        "return self.at_sampled(sampled_states(self.trunk, tokens, mask))",
        "return self.at_sampled(sampled_states(self.trunk, mx.roll(tokens, -1, axis=1), mask))",
        f"{GRADIENTS} -k before_its_token",
    ),
    # 14
    Mutant(
        14,
        "no-bias-correction",
        "training/adamw.py",
        "            step_size=rate / (1 - beta1**step),",
        "            step_size=rate,",
        "tests/training/test_adamw.py",
    ),
    Mutant(
        14,
        "hidden-weight-decay",
        "training/model_trainer.py",
        "weight_decay=config.weight_decay",
        "weight_decay=0.01",
        OPTIMISER,
    ),
    Mutant(
        14,
        "no-gradient-clip",
        "training/model_trainer.py",
        "factor = self.max_grad_norm / (norm + 1e-6)",
        "factor = 1.0",
        OPTIMISER,
    ),
    Mutant(
        14,
        "not-finite-all-the-same",
        "training/model_trainer.py",
        "skipped = not (math.isfinite(loss_value) and math.isfinite(norm_value))",
        "skipped = False",
        OPTIMISER,
    ),
    Mutant(
        14,
        "reference-is-the-policy",
        "models/policy_model.py",
        "return FrozenPolicy(copy, origin)",
        "return FrozenPolicy(self.model, origin)",
        "tests/ppo_trainer/test_what_moves.py -k 'neither_the_base_nor'",
    ),
    Mutant(
        14,
        "sixteen-bit-weights",
        "base_setup/lora_setup.py",
        "    model.set_dtype(mx.float32)\n",
        "    model.set_dtype(mx.bfloat16)\n",
        "tests/base_setup/test_lora_setup.py",
    ),
    # 15
    Mutant(
        15,
        "margin-added",
        "training/preference_loss.py",
        "lead = lead - mx.stop_gradient(margin).astype(mx.float32)",
        "lead = lead + mx.stop_gradient(margin).astype(mx.float32)",
        PREFERENCES,
    ),
    Mutant(
        15,
        "preference-sign",
        "training/preference_loss.py",
        "lead = chosen - rejected  # (B,)",
        "lead = rejected - chosen  # (B,)",
        PREFERENCES,
    ),
    Mutant(
        15,
        "no-reference",
        "training/preference_loss.py",
        "return beta * (logprobs.astype(mx.float32) - mx.stop_gradient(ref_logprobs).astype(mx.float32))",
        "return beta * logprobs.astype(mx.float32)",
        PREFERENCES,
    ),
    Mutant(
        15,
        "one-reference-for-both",
        "training/preference_loss.py",
        "implicit_reward(rejected, ref_rejected, beta)",
        "implicit_reward(rejected, ref_chosen, beta)",
        PREFERENCES,
    ),
    Mutant(
        15,
        "pair-turned-round",
        "training/reward_trainer.py",
        "better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]",
        "better, worse = scores[pairs[:, 1]], scores[pairs[:, 0]]",
        "tests/training/test_reward_trainer.py",
    ),
    Mutant(
        15,
        "prompt-in-the-loss",
        "training/sft_rows.py",
        '[loss_on == "text"] * len(prompt)',
        "[True] * len(prompt)",
        "tests/training/test_sft_trainer.py",
    ),
    Mutant(
        15,
        "score-at-padding",
        "models/reward_model.py",
        "last = mx.take_along_axis(states, lengths[:, None, None] - 1, axis=1)[:, 0]  # (B, D)",
        "last = states[:, -1]  # (B, D)",
        "tests/models/test_value_and_reward.py tests/training/test_reward_trainer.py",
    ),
    Mutant(
        15,
        "dpo-sign",
        "training/preference_algorithms.py",
        "log_ratio_worth(chosen, options) - log_ratio_worth(rejected, options)",
        "log_ratio_worth(rejected, options) - log_ratio_worth(chosen, options)",
        OBJECTIVES,
    ),
    Mutant(
        15,
        "labels-smoothed-the-wrong-way",
        "training/preference_algorithms.py",
        "(1 - smoothing) * losses + smoothing * minus_log_sigmoid(-lead)",
        "smoothing * losses + (1 - smoothing) * minus_log_sigmoid(-lead)",
        OBJECTIVES,
    ),
    Mutant(
        15,
        "preference-without-reference",
        "training/preference_algorithms.py",
        'return implicit_reward(answers.logprobs, answers.ref_logprobs, options["preference_beta"])',
        'return options["preference_beta"] * answers.logprobs',
        OBJECTIVES,
    ),
    Mutant(
        15,
        "ipo-target-sign",
        "training/preference_algorithms.py",
        "mx.square(lead - 1 / (2 *",
        "mx.square(lead + 1 / (2 *",
        OBJECTIVES,
    ),
    Mutant(
        15,
        "simpo-not-by-length",
        "training/preference_algorithms.py",
        'return options["preference_beta"] * mean_logprob(answers)',
        'return options["preference_beta"] * answers.logprobs',
        OBJECTIVES,
    ),
    Mutant(
        15,
        "simpo-margin-added",
        "training/preference_algorithms.py",
        'minus_log_sigmoid(lead - options["target_margin"])',
        'minus_log_sigmoid(lead + options["target_margin"])',
        OBJECTIVES,
    ),
    Mutant(
        15,
        "orpo-not-by-length",
        "training/preference_algorithms.py",
        "return log_odds(mean_logprob(answers))",
        "return log_odds(answers.logprobs)",
        OBJECTIVES,
    ),
    Mutant(
        15,
        "orpo-sign",
        "training/preference_algorithms.py",
        'options["preference_beta"] * minus_log_sigmoid(lead)',
        'options["preference_beta"] * minus_log_sigmoid(-lead)',
        OBJECTIVES,
    ),
    Mutant(
        15,
        "cpo-nll-sign",
        "training/preference_algorithms.py",
        'minus_log_sigmoid(lead) - options["nll_weight"]',
        'minus_log_sigmoid(lead) + options["nll_weight"]',
        OBJECTIVES,
    ),
    Mutant(
        15,
        "kto-labels-exchanged",
        "training/preference_algorithms.py",
        "mx.where(desirable, good, bad)",
        "mx.where(desirable, bad, good)",
        OBJECTIVES,
    ),
    Mutant(
        15,
        "kto-gradient-through-the-kl",
        "training/preference_algorithms.py",
        "beta * mx.stop_gradient(baseline)",
        "beta * baseline",
        OBJECTIVES,
    ),
    Mutant(
        15,
        "kto-kl-below-zero",
        "training/preference_algorithms.py",
        "mx.maximum(mx.mean(logprobs - ref_logprobs), 0.0)",
        "mx.mean(logprobs - ref_logprobs)",
        OBJECTIVES,
    ),
    Mutant(
        15,
        "kto-kl-of-own-answers",
        "training/preference_trainer.py",
        "moved = [*answers[1:], *answers[:1]]",
        "moved = answers",
        "tests/training/test_preference_trainer.py",
    ),
    Mutant(
        15,
        "step-read-a-token-early",
        "models/process_reward_model.py",
        "marks.append(len(ids) - 1)",
        "marks.append(len(ids) - 2)",
        "tests/training/test_process_reward_trainer.py",
    ),
    # 16
    Mutant(
        16,
        "weight-inverted",
        "training/importance_correction.py",
        "difference = logprobs.astype(mx.float32) - behaviour_logprobs.astype(mx.float32)",
        "difference = behaviour_logprobs.astype(mx.float32) - logprobs.astype(mx.float32)",
        CORRECTION,
    ),
    Mutant(
        16,
        "weight-with-gradient",
        "training/importance_correction.py",
        "return zero_masked(mx.stop_gradient(difference), mask)",
        "return zero_masked(difference, mask)",
        CORRECTION,
    ),
    Mutant(
        16,
        "weight-left-out",
        "ppo_trainer/objective.py",
        'if self._correction != "none":',
        "if False:",
        SAMPLERS,
    ),
    Mutant(
        16,
        "weight-left-out-of-the-kl",
        "ppo_trainer/objective.py",
        'return ratio * kl_per_token(logprobs, part.ref_logprobs, "k3", part.mask), True',
        'return ratio * kl_per_token(logprobs, part.ref_logprobs, "k3", part.mask), False',
        f"{SAMPLERS} {OPTIONS} -k estimated_kl",
    ),
    Mutant(
        16,
        "weight-of-a-mean-for-a-sequence",
        "training/importance_correction.py",
        "log_ratio = mx.broadcast_to(mx.sum(log_ratio, axis=1, keepdims=True), mask.shape)",
        "log_ratio = mx.broadcast_to(mx.mean(log_ratio, axis=1, keepdims=True), mask.shape)",
        CORRECTION,
    ),
    Mutant(
        16,
        "sampler-logprob-of-the-whole-vocabulary",
        "models/sampling.py",
        "    return tokens, mx.log(chosen / total)[:, 0]",
        "    return tokens, mx.log(chosen)[:, 0]",
        DECODING,
    ),
    Mutant(
        16,
        "dead-groups-by-shaped-scores",
        "ppo_trainer/ppo_trainer.py",
        '            scored = self.score(rollouts)\n            clock.lap("time/score")\n            return scored',
        "            scored = self.score(rollouts)\n"
        "            import mlx.core as mx\n\n"
        "            shaped = self._maker.shaper.shape(mx.array(scored.total), rollouts)\n"
        '            clock.lap("time/score")\n            return scored._replace(total=np.array(shaped))',
        "tests/ppo_trainer/test_dynamic_sampling.py",
    ),
    Mutant(
        16,
        "off-policy-mask-sign",
        "training/policy_loss.py",
        "        -_log_ratio(mx.stop_gradient(logprobs), behaviour_logprobs, mask), mask, axis=1",
        "        _log_ratio(mx.stop_gradient(logprobs), behaviour_logprobs, mask), mask, axis=1",
        LOSS,
    ),
    Mutant(
        16,
        "entropy-punished",
        "ppo_trainer/objective.py",
        "objective = objective - config.entropy_coef * masked_mean(",
        "objective = objective + config.entropy_coef * masked_mean(",
        OPTIONS,
    ),
    Mutant(
        16,
        "entropy-without-gradient",
        "ppo_trainer/objective.py",
        "wanted=Wanted(True, self.config.entropy_coef != 0, self._full_kl_in_loss)",
        "wanted=Wanted(True, False, self._full_kl_in_loss)",
        OPTIONS,
    ),
    # 17
    Mutant(
        17,
        "prompt-position-off-by-one",
        "token_attribution/shared_prompts.py",
        "if ragged else self._width\n",
        "if ragged else self._width + 1\n",
        "tests/token_attribution/test_sampled_states.py",
    ),
    Mutant(
        17,
        "padding-of-a-shorter-prompt-seen",
        "token_attribution/shared_prompts.py",
        "seen = (position <= own) & (~in_prompt | (column < length))",
        "seen = position <= own",
        "tests/token_attribution/test_sampled_states.py",
    ),
    Mutant(
        17,
        "first-state-from-the-padding",
        "token_attribution/sampled_states.py",
        "* width + lengths - 1)]",
        "* width + width - 1)]",
        "tests/token_attribution/test_sampled_states.py",
    ),
    Mutant(
        17,
        "completions-shifted",
        "token_attribution/sampled_states.py",
        "start[layout.row] + layout.column - first - 1,",
        "np.maximum(start[layout.row] + layout.column - first - 2, 0),",
        "tests/token_attribution/test_sampled_states.py",
    ),
    Mutant(
        17,
        "dead-rows-out-of-the-mean",
        "experience_buffer/buffer_manager.py",
        "        counts = int(",
        "        rows = rows[self._teaches[rows]] if self._teaches[rows].any() else rows[:1]\n        counts = int(",
        "tests/experience_buffer/test_micro_batches.py",
    ),
    Mutant(
        17,
        "dead-rows-despite-the-kl",
        "ppo_trainer/updater.py",
        "            and not kl_in_loss\n",
        "",
        "tests/ppo_trainer/test_passes.py -k computed",
    ),
    Mutant(
        17,
        "sign-of-the-entropy-slope",
        "token_attribution/host_math.py",
        "(-entropy_slope[rows] / tau)",
        "(entropy_slope[rows] / tau)",
        "tests/token_attribution/test_vocabulary.py",
    ),
    Mutant(
        17,
        "slope-of-the-wrong-token",
        "token_attribution/host_math.py",
        "        z[np.arange(len(z)), targets[rows]] += g / tau",
        "        z[np.arange(len(z)), targets[rows] - 1] += g / tau",
        "tests/token_attribution/test_vocabulary.py",
    ),
    Mutant(
        17,
        "slopes-without-their-cotangent",
        "token_attribution/vocabulary.py",
        "cotangents[0][:, None] * mx.concatenate(ready)",
        "mx.concatenate(ready)",
        "tests/token_attribution/test_vocabulary.py",
    ),
    Mutant(
        17,
        "gradient-of-the-last-chunk-alone",
        "token_attribution/vocabulary.py",
        "total = tree_map(mx.add, total, gradient) if by_row else gradient",
        "total = gradient",
        "tests/token_attribution/test_vocabulary.py",
    ),
    Mutant(
        17,
        "causal-mask-without-itself",
        "token_attribution/host_attention.py",
        "np.arange(columns) <= np.arange",
        "np.arange(columns) < np.arange",
        "tests/token_attribution/test_host_kernels.py",
    ),
    Mutant(
        17,
        "decoded-one-position-late",
        "models/prefix_cache.py",
        "np.where(self._live, self._now - self._born, 0)",
        "np.where(self._live, self._now - self._born + 1, 0)",
        "tests/models/test_rollout_engine.py tests/models/test_decoding.py",
    ),
    Mutant(
        17,
        "columns-of-the-row-before",
        "models/prefix_cache.py",
        "written >= born]",
        "written >= 0 * born]",
        "tests/models/test_rollout_engine.py tests/models/test_decoding.py",
    ),
    # 18
    Mutant(
        18,
        "adapter-scale-doubled",
        "base_setup/adapter_layers.py",
        PLACED,
        PLACED.replace("parameters,", '{**parameters, "scale": 2 * parameters["scale"]},'),
        f"{ADAPTERS} -k papers_formula",
    ),
    Mutant(
        18,
        "adapter-subtracted",
        "base_setup/adapter_layers.py",
        PLACED,
        PLACED.replace("parameters,", '{**parameters, "scale": -parameters["scale"]},'),
        f"{ADAPTERS} -k papers_formula",
    ),
    Mutant(
        18,
        "magnitude-left-out",
        "base_setup/adapter_layers.py",
        PLACED,
        PLACED.replace("use_dora=use_dora", "use_dora=False"),
        f"{ADAPTERS} -k how_much_trains",
    ),
    Mutant(
        18,
        "magnitude-of-ones",
        "base_setup/adapter_layers.py",
        PLACED,
        f"{PLACED}    for _, layer in adapter_layers(model) if use_dora else ():\n"
        "        layer.m = mx.ones_like(layer.m)\n",
        f"{ADAPTERS} -k begins_as_the_base",
    ),
    Mutant(
        18,
        "rank-stabilised-by-the-rank",
        "config/training_config.py",
        "(self.lora_r**0.5 if self.lora_rslora else self.lora_r)",
        "self.lora_r",
        f"{ADAPTERS} -k scale_is_alpha",
    ),
    Mutant(
        18,
        "factors-transposed",
        "tools/older_adapters.py",
        'stored[f"{match[1]}.{match[3]}"] = mx.array(array)',
        'stored[f"{match[1]}.{match[3]}"] = mx.array(array.T)',
        "tests/tools/test_older_adapters.py -k ten_times",
    ),
    Mutant(
        18,
        "base-of-whole-modules-lost",
        "base_setup/base_model.py",
        "    write_arrays(model, base.arrays)\n",
        "",
        f"{ADAPTERS} -k last_bit",
    ),
    Mutant(
        18,
        "whole-modules-not-saved",
        "base_setup/adapter_files.py",
        "    weights = named_arrays(model.trainable_parameters())\n",
        "    leaves = ('lora_a', 'lora_b', 'm', 'soft_prompt')\n"
        "    weights = named_arrays(model.trainable_parameters())\n"
        "    weights = {k: x for k, x in weights.items() if k.rsplit('.', 1)[-1] in leaves}\n",
        f"{ADAPTERS} -k loads_here",
    ),
    Mutant(
        18,
        "soft-prompt-of-the-first-row-alone",
        "base_setup/soft_prompt.py",
        "        return mx.concatenate([rows, x[:, n:]], axis=1)",
        "        rows = mx.where(mx.arange(x.shape[0])[:, None, None] == 0, rows, 0)\n"
        "        return mx.concatenate([rows, x[:, n:]], axis=1)",
        "tests/base_setup/test_soft_prompt.py -k logprobs_and_gradients",
    ),
    Mutant(
        18,
        "soft-prompt-without-its-first-vector",
        "base_setup/soft_prompt.py",
        "return mx.concatenate([rows, x[:, n:]], axis=1)",
        "return mx.concatenate([x[:, :1], rows[:, 1:], x[:, n:]], axis=1)",
        "tests/base_setup/test_soft_prompt.py -k tokens_written_as_vectors",
    ),
    Mutant(
        18,
        "new-rows-of-zeros",
        "base_setup/new_tokens.py",
        "fresh = mx.broadcast_to(mx.mean(seen, axis=0), shape)",
        "fresh = mx.zeros(shape)",
        "tests/base_setup/test_new_tokens.py -k begins_as_the_mean",
    ),
    # 19
    Mutant(
        19,
        "steps-counted-anew",
        "training/model_trainer.py",
        "lambda path, _: arrays[path]",
        'lambda path, x: x if path == "step" else arrays[path]',
        f"{STAGES} 'packed and schedule'",
    ),
    Mutant(
        19,
        "moments-begun-anew",
        "training/model_trainer.py",
        "lambda path, _: arrays[path]",
        'lambda path, x: x if path.endswith((".m", ".v")) else arrays[path]',
        f"{STAGES} process",
    ),
    Mutant(
        19,
        "batches-one-on",
        "training/supervised.py",
        'self.step, self.metrics = int(counters["step"]), dict(progress["metrics"])',
        'self.step, self.metrics = int(counters["step"]) + 1, dict(progress["metrics"])',
        f"{STAGES} process",
    ),
    Mutant(
        19,
        "every-epoch-in-the-first-order",
        "training/supervised.py",
        "        while self._drawn < epoch:\n            self._generator.permutation(len(self.rows))\n",
        "        while self._drawn < epoch:\n",
        f"{STAGES} number_alone",
    ),
    Mutant(
        19,
        "partners-drawn-one-after-the-other",
        "training/reward_trainer.py",
        "        def compared(number: int) -> list[Ranking]:\n"
        "            generator = np.random.default_rng([config.seed, 1, number])\n",
        "        generator = np.random.default_rng([config.seed, 1])\n\n"
        "        def compared(number: int) -> list[Ranking]:\n",
        f"{STAGES} scored",
    ),
    Mutant(
        19,
        "dropout-from-the-seed",
        "training/training_state.py",
        '        set_random_state(state["random"])\n',
        "",
        f"{STAGES} process",
    ),
    Mutant(
        19,
        "patience-begun-anew",
        "training/early_stopping.py",
        'int(state["worse"])',
        "0",
        f"{STAGES} early",
    ),
    Mutant(
        19,
        "best-loss-forgotten",
        "training/early_stopping.py",
        'float(state["best"])',
        "math.inf",
        f"{STAGES} early",
    ),
    Mutant(
        19,
        "best-weights-forgotten",
        "training/early_stopping.py",
        "self.weights = dict(arrays) or None",
        "self.weights = None",
        f"{STAGES} early",
    ),
    Mutant(
        19,
        "reference-logprobs-computed-again",
        "training/preference_trainer.py",
        "            self.update(zip(rows, logprobs, strict=True))\n",
        "            del rows, logprobs\n",
        f"{STAGES} reference_said",
    ),
    Mutant(
        19,
        "lines-twice",
        "checkpointing/run_session.py",
        '            self.recorder.go_on_from(saved.update, position[1]["files"], run_folder_of(saved.path))\n',
        "",
        f"{STAGES} process",
    ),
)


class Verdict(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    caught_by: str  # the test that failed first; empty if none did
    problem: str  # why there is no verdict, or why it does not count; empty if there is one
    seconds: float


def problems(mutant: Mutant) -> str:
    """What is wrong with the mutant itself, in a sentence, or nothing."""
    source = ROOT / mutant.file
    if not source.is_file():
        return f"{mutant.name}: there is no file {mutant.file}"
    count = source.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        return f"{mutant.name}: its text stands {count} times in {mutant.file}, once is expected"
    files, words = selection(mutant)
    missing = [file for file in files if not (ROOT / file).is_file()]
    if missing:
        return f"{mutant.name}: there is no {missing[0]}"
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    unknown = [word for word in words.split() if word not in ("and", "or", "not") and word not in text]
    return f'{mutant.name}: no test of {" ".join(files)} has "{unknown[0]}" in its name' if unknown else ""


def selection(mutant: Mutant) -> tuple[list[str], str]:
    """The test files that are to notice it, and pytest's -k expression, empty for all of their tests."""
    files, _, words = mutant.tests.partition(" -k ")
    return files.split(), " ".join(shlex.split(words))


def judge(mutant: Mutant) -> Verdict:
    """Plant it in a copy of the checkout and run its tests."""
    start = time.perf_counter()
    files, words = selection(mutant)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_checkout(folder)
        source = copy / mutant.file
        text = source.read_text(encoding="utf-8")
        source.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        run = pytest_in(copy, ["-x", *files, *(["-k", words] if words else [])], TIME_LIMIT)
    seconds = time.perf_counter() - start
    if run is None:
        return Verdict(mutant, "", f"nothing failed within {TIME_LIMIT} s", seconds)
    failed = failures(run)
    if run.returncode == 1 and failed:
        (test, reason), *_ = failed.items()
        if NOTICED.match(reason):
            return Verdict(mutant, test, "", seconds)
        return Verdict(mutant, "", f"{test} crashed, which is no catch: {reason}", seconds)
    if run.returncode == 0:
        return Verdict(mutant, "", "", seconds)
    last = (run.stdout + run.stderr).strip().splitlines()[-1:]
    return Verdict(mutant, "", f"pytest ended with {run.returncode}: {' '.join(last)}", seconds)


def without_those_that_always_fail(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The control: a test that fails without any mutant has caught none."""
    tests = sorted({v.caught_by for v in verdicts if v.caught_by})
    if not tests:
        return list(verdicts)
    with tempfile.TemporaryDirectory() as folder:
        run = pytest_in(copy_of_checkout(folder), tests, 2 * TIME_LIMIT)
    if run is None or run.returncode not in (0, 1):
        why = "ran out of time" if run is None else f"ended with {run.returncode}: {run.stdout[-300:]}"
        raise RuntimeError(f"the control, the catching tests without any mutant, {why}")
    always = failures(run)
    return [
        (
            v._replace(caught_by="", problem=f"{v.caught_by} fails without it, too")
            if v.caught_by in always
            else v
        )
        for v in verdicts
    ]


def copy_of_checkout(folder: str) -> Path:
    """A checkout of one's own to plant in, without environments, runs and caches."""
    copy = Path(folder) / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "scratch", "__pycache__"))
    return copy


def pytest_in(
    checkout: Path, arguments: Sequence[str], limit: float
) -> subprocess.CompletedProcess[str] | None:
    """One run of pytest, or None if it took too long."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["COLUMNS"] = "1000"  # pytest cuts the reasons in its summary to the width of the terminal
    environment.pop("PYTHONPATH", None)  # the copy's packages, not the checkout's
    try:
        return subprocess.run(
            command,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def failures(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Which tests failed, each with the first line of why, from pytest's summary."""
    lines = [line.removeprefix("FAILED ") for line in run.stdout.splitlines() if line.startswith("FAILED ")]
    return {test: reason for test, _, reason in (line.partition(" - ") for line in lines)}


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The table of docs/correctness.md."""
    lines = ["| # | mistake | planted | caught by |", "|---|---|---|---|"]
    for number, mistake in MISTAKES.items():
        for verdict in (v for v in verdicts if v.mutant.mistake == number):
            caught_by = verdict.caught_by.rpartition("/")[2]
            cell = f"`{caught_by}`" if caught_by else f"**{outcome(verdict)}**"
            lines.append(f"| {number} | {mistake} | {verdict.mutant.name} | {cell} |")
            mistake = ""
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them and print; 0 if every one was caught."""
    parser = argparse.ArgumentParser(description="Plant mistakes; tests must notice.", allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=[m.name for m in MUTANTS], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="mutants side by side")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/correctness.md")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the verdicts as JSON")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or m.name in options.only]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.mistake:3d}  {mutant.name:42s} {mutant.file}")
        return 0
    stale = [problem for problem in map(problems, chosen) if problem]
    if stale:
        print("\n".join(stale), file=sys.stderr)
        return 1
    verdicts: list[Verdict] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for verdict in pool.imap(judge, chosen):
            verdicts.append(verdict)
            print(f"{verdict.mutant.name:42s} {verdict.seconds:4.0f} s  {outcome(verdict)}", flush=True)
    checked = without_those_that_always_fail(verdicts)
    for before, verdict in zip(verdicts, checked, strict=True):
        if before != verdict:
            print(f"{verdict.mutant.name:42s}         {outcome(verdict)}")
    if options.markdown:
        print(markdown(checked))
    if options.output is not None:
        rows = [{**v.mutant._asdict(), **v._asdict(), "mutant": v.mutant.name} for v in checked]
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    caught = sum(bool(v.caught_by) for v in checked)
    print(f"{caught} of {len(checked)} caught; the tests that caught them pass without the mutants")
    return 0 if caught == len(checked) else 1


def outcome(verdict: Verdict) -> str:
    """A verdict in words."""
    if verdict.problem:
        return f"NO VERDICT: {verdict.problem}"
    return f"caught by {verdict.caught_by}" if verdict.caught_by else "SURVIVED"


if __name__ == "__main__":
    raise SystemExit(main())
