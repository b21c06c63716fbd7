"""Learning from preferences without RL: every algorithm is a row of this table, a loss of summed logprobs.

Notation: π the policy, π_ref the reference, y_c and y_r a chosen and a rejected answer to one prompt, |y| the tokens of
an answer, σ the logistic function, ℓ(y) = log π(y) − log π_ref(y). Logprobs are *summed* over an answer, its end token
included; where an algorithm wants the mean, its row divides by |y|.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx

from token_attribution.masking import check_same_shape
from training.preference_loss import implicit_reward


class Answers(NamedTuple):
    """Answers in tokens' terms. All are (B,); logprobs float32, in nats."""

    logprobs: mx.array  # log π(y), summed
    ref_logprobs: mx.array  # log π_ref(y), summed; zeros where an algorithm has no reference
    lengths: mx.array  # |y|


Options = Mapping[str, float]
#: chosen, rejected, options -> the loss of each pair (B,).
PairLoss = Callable[[Answers, Answers, Options], mx.array]
#: What an answer is worth to the policy by the algorithm's own measure (B,): accuracy and margin are read off it.
Worth = Callable[[Answers, Options], mx.array]


def minus_log_sigmoid(x: mx.array) -> mx.array:
    """−log σ(x), without overflow."""
    return mx.logaddexp(mx.array(0.0), -x)


# Worth ---------------------------------------------------------------------------------------------------


def log_ratio_worth(answers: Answers, options: Options) -> mx.array:
    r"""β (log π − log π_ref), the implicit reward."""
    return implicit_reward(answers.logprobs, answers.ref_logprobs, options["preference_beta"])


def logprob_worth(answers: Answers, options: Options) -> mx.array:
    """β log π."""
    return options["preference_beta"] * answers.logprobs


def mean_logprob_worth(answers: Answers, options: Options) -> mx.array:
    """β log π / |y|."""
    return options["preference_beta"] * mean_logprob(answers)


def log_odds_worth(answers: Answers, options: Options) -> mx.array:
    """log P/(1 − P), P the geometric mean of the tokens' probabilities."""
    return log_odds(mean_logprob(answers))


def mean_logprob(answers: Answers) -> mx.array:
    """log π(y) / |y|, (B,)."""
    check_same_shape(logprobs=answers.logprobs, lengths=answers.lengths)
    return answers.logprobs / answers.lengths.astype(mx.float32)


def log_odds(logp: mx.array) -> mx.array:
    """log P/(1 − P) of P = exp(logp). 1e-7 below 0 counts as certain: beyond it float32 has no odds."""
    logp = mx.minimum(logp, -1e-7)
    return logp - mx.log(-mx.expm1(logp))


# Losses --------------------------------------------------------------------------------------------------


def dpo(chosen: Answers, rejected: Answers, options: Options) -> mx.array:
    r"""Direct preference optimisation; with label smoothing ε its conservative form (cDPO).

    .. math:: -(1-\varepsilon) \log\sigma(h) - \varepsilon \log\sigma(-h), \qquad h = \beta\,(\ell(y_c) - \ell(y_r))
    """
    lead = log_ratio_worth(chosen, options) - log_ratio_worth(rejected, options)
    smoothing = options["label_smoothing"]
    losses = minus_log_sigmoid(lead)
    return losses if smoothing == 0 else (1 - smoothing) * losses + smoothing * minus_log_sigmoid(-lead)


def ipo(chosen: Answers, rejected: Answers, options: Options) -> mx.array:
    r"""Identity preference optimisation: the lead is driven to 1/(2β) and no further.

    .. math:: \big(\ell(y_c) - \ell(y_r) - \tfrac{1}{2\beta}\big)^2

    The paper's β is τ, and its logprobs are sums; TRL averages over tokens, which asks for another β.
    """
    unit = {**options, "preference_beta": 1.0}
    lead = log_ratio_worth(chosen, unit) - log_ratio_worth(rejected, unit)
    return mx.square(lead - 1 / (2 * options["preference_beta"]))


def simpo(chosen: Answers, rejected: Answers, options: Options) -> mx.array:
    r"""Simple preference optimisation: mean logprobs, a target margin γ, no reference.

    .. math:: -\log\sigma\big(\beta \log\pi(y_c)/|y_c| - \beta \log\pi(y_r)/|y_r| - \gamma\big)
    """
    lead = mean_logprob_worth(chosen, options) - mean_logprob_worth(rejected, options)
    return minus_log_sigmoid(lead - options["target_margin"])


def orpo(chosen: Answers, rejected: Answers, options: Options) -> mx.array:
    r"""Odds-ratio preference optimisation: SFT on the chosen answer and λ times the odds ratio's loss.

    .. math:: -\tfrac{1}{|y_c|}\log\pi(y_c) - \lambda \log\sigma\big(\log\text{odds}(y_c) - \log\text{odds}(y_r)\big)

    with odds = P/(1 − P) and log P = log π(y)/|y|; λ is ``preference_beta``.
    """
    lead = log_odds_worth(chosen, options) - log_odds_worth(rejected, options)
    return -mean_logprob(chosen) + options["preference_beta"] * minus_log_sigmoid(lead)


def cpo(chosen: Answers, rejected: Answers, options: Options) -> mx.array:
    r"""Contrastive preference optimisation: DPO against a uniform reference, and SFT on the chosen answer.

    .. math:: -\log\sigma\big(\beta\log\pi(y_c) - \beta\log\pi(y_r)\big) - w \log\pi(y_c)
    """
    lead = logprob_worth(chosen, options) - logprob_worth(rejected, options)
    return minus_log_sigmoid(lead) - options["nll_weight"] * chosen.logprobs


def kto(answers: Answers, desirable: mx.array, baseline: mx.array, options: Options) -> mx.array:
    r"""Kahneman–Tversky optimisation: single answers, each known to be good or bad.

    .. math:: \lambda_D\,\big(1 - \sigma(\beta(\ell(y) - z_0))\big) \text{ if good}, \quad
              \lambda_U\,\big(1 - \sigma(\beta(z_0 - \ell(y)))\big) \text{ if bad}

    Args:
        desirable: (B,) bool, True for good answers.
        baseline: z0, a scalar ≥ 0 without gradient: the KL to the reference, see :func:`kto_baseline`.
    """
    check_same_shape(logprobs=answers.logprobs, desirable=desirable)
    beta = options["preference_beta"]
    lead = log_ratio_worth(answers, options) - beta * mx.stop_gradient(baseline)
    good = options["desirable_weight"] * (1 - mx.sigmoid(lead))
    bad = options["undesirable_weight"] * (1 - mx.sigmoid(-lead))
    return mx.where(desirable, good, bad)


def kto_baseline(logprobs: mx.array, ref_logprobs: mx.array) -> mx.array:
    """z0 = max(0, mean of log π(y′|x) − log π_ref(y′|x)) over prompts x with answers y′ to *other* prompts.

    A biased estimate of the KL that needs no sampling (section 4.1 of the paper). It has no gradient.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return mx.stop_gradient(mx.maximum(mx.mean(logprobs - ref_logprobs), 0.0))


# The table -----------------------------------------------------------------------------------------------


class PreferenceAlgorithm(NamedTuple):
    """One row. ``loss`` is None for what learns from single answers (KTO)."""

    name: str
    paper: str
    loss: PairLoss | None
    worth: Worth
    has_reference: bool
    options: Mapping[str, float]  # what it reads, with its own defaults

    @property
    def learns_from_pairs(self) -> bool:
        """Whether it needs two answers to a prompt; else one, with a label."""
        return self.loss is not None


_TABLE = (
    PreferenceAlgorithm(
        "dpo",
        "https://arxiv.org/abs/2305.18290",
        dpo,
        log_ratio_worth,
        True,
        {"preference_beta": 0.1, "label_smoothing": 0.0},
    ),
    PreferenceAlgorithm(
        "ipo", "https://arxiv.org/abs/2310.12036", ipo, log_ratio_worth, True, {"preference_beta": 0.1}
    ),
    PreferenceAlgorithm(
        "simpo",
        "https://arxiv.org/abs/2405.14734",
        simpo,
        mean_logprob_worth,
        False,
        {"preference_beta": 2.0, "target_margin": 1.0},
    ),
    PreferenceAlgorithm(
        "orpo", "https://arxiv.org/abs/2403.07691", orpo, log_odds_worth, False, {"preference_beta": 0.1}
    ),
    PreferenceAlgorithm(
        "kto",
        "https://arxiv.org/abs/2402.01306",
        None,
        log_ratio_worth,
        True,
        {"preference_beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    ),
    PreferenceAlgorithm(
        "cpo",
        "https://arxiv.org/abs/2401.08417",
        cpo,
        logprob_worth,
        False,
        {"preference_beta": 0.1, "nll_weight": 1.0},
    ),
)
PREFERENCE_ALGORITHMS: Mapping[str, PreferenceAlgorithm] = {row.name: row for row in _TABLE}
