r"""KL between the policy and its reference: estimators from sampled tokens, and the coefficient of the KL.

Write d = log pi(y) - log pi_ref(y) for a token y that the policy sampled. Schulman's estimators of
KL(pi || pi_ref) (http://joschu.net/blog/kl-approx.html):

    k1 = d                  unbiased, can be negative
    k2 = d^2 / 2            biased, low variance
    k3 = exp(-d) - 1 + d    unbiased, never negative

An unbiased *value* does not make an unbiased *gradient*. What each one minimises depends on where it stands
(tests/reward_kl/test_kl_gradients.py enumerates a small vocabulary and checks the exact expectations):

                                    k1            k2                      k3
    detached, in the reward         reverse KL    wrong                   wrong
    in the loss, as it is           nothing       reverse KL, on-policy   forward KL
    in the loss, times the ratio    reverse KL    wrong                   reverse KL, on- and off-policy

So PPO subtracts k1 from the reward, and a critic-free method adds ``ratio * k3`` to its loss, with
``ratio = exp(logprobs - old_logprobs)`` left *differentiable* (``training.policy_loss.importance_ratio``):
even on-policy, where the ratio is 1, it carries the part of the gradient that plain k3 lacks
(DeepSeek-V3.2, https://arxiv.org/abs/2512.02556).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import mlx.core as mx

from token_attribution.masking import check_same_shape, zero_masked

Estimator = Literal["k1", "k2", "k3", "abs", "mse"]
KLUnit = Literal["sequence", "token"]

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far beyond anything to learn from, far below overflow


def kl_per_token(
    logprobs: mx.array,
    ref_logprobs: mx.array,
    estimator: Estimator = "k1",
    mask: mx.array | None = None,
) -> mx.array:
    """Estimate the KL to the reference at every token: (B, T) float32.

    Args:
        logprobs: Of the policy, (B, T).
        ref_logprobs: Of the reference, (B, T). It receives no gradient.
        estimator: With d = logprobs - ref_logprobs,
            ``k1``: d; ``k2``: d^2 / 2; ``k3``: exp(-d) - 1 + d; ``abs``: |d|; ``mse``: d^2 / 2, the name that
            some toolkits give to k2. Only k3 has an exponential; there -d is limited to 20 from above (from
            below it cannot overflow). Beyond that limit, 9 digits of probability apart, k3 is constant and
            has no gradient.
        mask: Where given, False positions become 0 before the exponential. Without it the inputs must be
            finite everywhere, or the gradient of k3 at padding may be NaN even if its value is masked later.

    Example:
        >>> kl_per_token(mx.array([[-1.0]]), mx.array([[-1.5]]), "k2").item()
        0.125
    """
    if estimator not in get_args(Estimator):
        raise ValueError(
            f"Unknown KL estimator {estimator!r}; choose one of {', '.join(get_args(Estimator))}."
        )
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs.astype(mx.float32) - mx.stop_gradient(ref_logprobs).astype(mx.float32)  # (B, T)
    if mask is not None:
        log_ratio = zero_masked(log_ratio, mask)

    if estimator == "k1":
        return log_ratio
    if estimator == "abs":
        return mx.abs(log_ratio)
    if estimator == "k3":
        # expm1(q) - q: near q = 0 the difference exp(q) - 1 - q would lose all its digits.
        reversed_ratio = mx.minimum(-log_ratio, MAX_LOG_RATIO)
        return mx.expm1(reversed_ratio) - reversed_ratio
    return 0.5 * mx.square(log_ratio)  # k2, mse


def kl_full(logits: mx.array, ref_logits: mx.array, temperature: float = 1.0) -> mx.array:
    r"""Exact KL of the next-token distributions, summed over the vocabulary: (..., V) -> (...) float32.

    .. math:: \sum_v p[v]\, (\log p[v] - \log p_{ref}[v])

    Exact and without variance, but it needs both models' logits at once: for tests, and for small
    vocabularies. A token that the policy cannot produce (logit -inf) adds 0; one that only the reference
    cannot produce makes the KL infinite, as it is. The reference receives no gradient.
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, but it is {temperature}.")
    logp = _log_softmax(logits.astype(mx.float32) / temperature)  # (..., V)
    ref_logp = _log_softmax(mx.stop_gradient(ref_logits).astype(mx.float32) / temperature)  # (..., V)
    log_ratio = mx.where(logp == -mx.inf, 0.0, logp - ref_logp)  # 0 * -inf would be nan
    return mx.sum(mx.exp(logp) * log_ratio, axis=-1)


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class FixedKLController:
    """A KL coefficient that stays what it is; the adaptive controller's interface without its behaviour."""

    def __init__(self, kl_coef: float, *, unit: KLUnit = "sequence") -> None:
        if not (math.isfinite(kl_coef) and kl_coef >= 0):
            raise ValueError(f"kl_coef must be a finite number >= 0, but it is {kl_coef}.")
        if unit not in get_args(KLUnit):
            raise ValueError(f"unit must be 'sequence' or 'token', but it is {unit!r}.")
        self.value = float(kl_coef)
        self.unit: KLUnit = unit

    def update(self, kl: float, n_samples: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps: the coefficient. The other settings come from the config."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = float(state["value"])


class AdaptiveKLController(FixedKLController):
    r"""A proportional controller that holds the KL near a target (Ziegler et al., 2019, section 2.2).

    .. math:: \beta \leftarrow \beta\, (1 + \text{clip}(KL / target - 1, -0.2, 0.2)\; n / horizon)

    https://arxiv.org/abs/1909.08593. n counts the completions of the update, not tokens or steps; ``horizon``
    is in the same unit. Update once per rollout batch, after its rewards have used the old value.

    The unit of the KL is the caller's affair, and a trap: Ziegler's target of 6 nats is the KL *summed over a
    sequence*; fed a mean *per token*, it never binds and the coefficient decays to 0. ``unit`` records which
    of the two the target means, for the caller to obey; the arithmetic does not depend on it.
    """

    max_error = 0.2

    def __init__(
        self, init_kl_coef: float, target: float, horizon: float, *, unit: KLUnit = "sequence"
    ) -> None:
        super().__init__(init_kl_coef, unit=unit)
        if not target > 0:
            raise ValueError(f"target must be greater than 0, but it is {target}.")
        if not horizon > 0:
            raise ValueError(f"horizon must be greater than 0, but it is {horizon}.")
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float, n_samples: int) -> None:
        """Move the coefficient after ``n_samples`` completions whose mean KL (in ``unit``) was ``kl``."""
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"The KL coefficient cannot be adapted to a KL of {kl}.")
        if n_samples * self.max_error >= self.horizon:
            # One step could take the coefficient to 0 or below, and from 0 it never returns.
            raise ValueError(
                f"horizon {self.horizon:g} is too short for updates of {n_samples} samples; "
                f"it must be greater than {n_samples * self.max_error:g}."
            )
        error = min(max(kl / self.target - 1.0, -self.max_error), self.max_error)
        self.value *= 1.0 + error * n_samples / self.horizon
