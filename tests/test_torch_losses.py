"""Every loss and its gradient with respect to the logits, rebuilt in PyTorch from the papers' formulas.

    ./run test-torch tests/test_torch_losses.py

Torch computes in float64, row by row, over a list of each row's sampled tokens, so it has neither masks nor
padding to get wrong. Ours gets padded float32 arrays with NaN, infinities and huge numbers wherever the mask is
False. Values and gradients agree to 1e-5, and the gradient at hidden positions is 0 exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from advantage.gae_advantage import gae
from advantage.group_relative import group_advantages, leave_one_out
from advantage.reward_to_go import reward_to_go
from reward_kl.kl_divergence import kl_per_token
from token_attribution.logprob_computer import entropy_from_logits, statistics_from_states
from token_attribution.masking import masked_whiten
from training.importance_correction import importance_weights
from training.policy_loss import aggregate, importance_ratio, off_policy_sequence_mask, policy_loss
from training.preference_algorithms import PREFERENCE_ALGORITHMS, Answers, kto
from training.preference_loss import bradley_terry_loss, dpo_loss
from training.value_loss import value_loss

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

VOCABULARY = 11
MASK = np.array(
    [
        [0, 0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 1],  # a tool's output in the middle
        [0, 0, 0, 0, 0, 0, 0],  # nothing sampled
        [0, 1, 0, 0, 0, 0, 0],  # one token
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 0],
    ],
    dtype=bool,
)
ROWS, WIDTH = MASK.shape
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 0.7])
REDUCTIONS = ["token_mean", "sequence_mean", "fixed_length", "sequence_sum"]
ATOL = 1e-5


class Case(NamedTuple):
    """float64, with garbage wherever the mask is False."""

    tokens: np.ndarray  # (B, T+1)
    logits: np.ndarray  # (B, T, V)
    old: np.ndarray  # (B, T)
    ref: np.ndarray  # (B, T)
    behaviour: np.ndarray  # (B, T)
    advantages: np.ndarray  # (B, T)
    row_advantages: np.ndarray  # (B,)


def hide(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``x`` with garbage wherever the mask is False."""
    garbage = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], size=x.shape)
    mask = MASK if x.ndim == 2 else MASK[..., None]
    return np.where(mask, x, garbage)


def make_case(temperature: float, on_policy: bool, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCABULARY, size=(ROWS, WIDTH + 1))
    logits = rng.normal(0, 1.5, size=(ROWS, WIDTH, VOCABULARY)).astype(np.float32).astype(np.float64)
    scaled = logits / temperature
    every = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    now = np.take_along_axis(every, tokens[:, 1:, None], -1)[..., 0]

    def beside(spread: float) -> np.ndarray:
        return hide((now + rng.normal(0, spread, size=MASK.shape)).astype(np.float32).astype(np.float64), rng)

    return Case(
        tokens,
        hide(logits, rng),
        beside(0.0 if on_policy else 0.5),
        beside(0.4),
        beside(0.4),
        hide(rng.normal(size=MASK.shape).astype(np.float32).astype(np.float64), rng),
        rng.normal(size=ROWS).astype(np.float32).astype(np.float64),
    )


def array(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


def rows_of(x: Any) -> list[Any]:
    """The sampled tokens of each row, (n_i,) or (n_i, V) each, of an array or of a tensor."""
    return [x[i][MASK[i]] if isinstance(x, np.ndarray) else x[i][torch.tensor(MASK[i])] for i in range(ROWS)]


def tensors_of(x: np.ndarray) -> list[Any]:
    return [torch.tensor(row) for row in rows_of(x)]


def ours(case: Case, temperature: float, loss: Any) -> tuple[float, np.ndarray]:
    """``loss`` of our logprobs (B, T), and its gradient with respect to the logits."""
    tokens, mask = mx.array(case.tokens.astype(np.int32)), mx.array(MASK)

    def total(logits: mx.array) -> mx.array:
        statistics = statistics_from_states(logits, lambda z: z, tokens, mask, temperature)
        return loss(statistics.logprobs)

    value, gradient = mx.value_and_grad(total)(array(case.logits))
    return float(value), np.array(gradient)


def theirs(case: Case, temperature: float, loss: Any) -> tuple[float, np.ndarray]:
    """``loss`` of torch's logprobs, a list of (n_i,), and its gradient with respect to the logits."""
    leaves = [row.requires_grad_() for row in tensors_of(case.logits)]
    targets = tensors_of(case.tokens[:, 1:])
    logprobs = [
        torch.log_softmax(logits / temperature, -1)[torch.arange(len(ids)), ids]
        for logits, ids in zip(leaves, targets, strict=True)
    ]
    value = loss(logprobs)
    value.backward()
    gradient = np.zeros(case.logits.shape)
    for i, leaf in enumerate(leaves):
        gradient[i][MASK[i]] = 0.0 if leaf.grad is None else leaf.grad.numpy()
    return value.item(), gradient


def assert_agree(
    mine: tuple[float, np.ndarray], reference: tuple[float, np.ndarray], least: float = 1e-2
) -> None:
    np.testing.assert_allclose(mine[0], reference[0], rtol=0, atol=ATOL)
    np.testing.assert_allclose(mine[1], reference[1], rtol=0, atol=ATOL)
    assert (mine[1][~MASK] == 0).all()
    assert np.abs(reference[1]).max() > least  # something was compared


def reduced(losses: list[Any], reduction: str, width: int = WIDTH) -> Any:
    """Losses of the sampled tokens of each row to one number."""
    total = sum(row.sum() for row in losses)
    if reduction == "token_mean":
        return total / sum(len(row) for row in losses)
    if reduction == "sequence_mean":
        return sum(row.mean() for row in losses if len(row)) / len(losses)
    if reduction == "fixed_length":
        return total / (len(losses) * width)
    return total / len(losses)  # sequence_sum


# --- the surrogates: torch's side takes one row's logprobs, old logprobs and advantage(s)


def ppo(lp: Any, old: Any, a: Any, low: float = 0.2, high: float = 0.2) -> Any:
    r = torch.exp(lp - old)
    return -torch.minimum(r * a, torch.clamp(r, 1 - low, 1 + high) * a)


def dapo(lp: Any, old: Any, a: Any) -> Any:
    return ppo(lp, old, a, 0.2, 0.28)


def dual_clip(lp: Any, old: Any, a: Any, c: float = 1.5) -> Any:
    """Ye et al. 2020, eq. 5: max(min(r A, clip(r) A), c A) for A < 0, to be maximised."""
    objective = -ppo(lp, old, a)
    return -torch.where(a < 0, torch.maximum(objective, c * a), objective)


def two_sided(lp: Any, old: Any, a: Any, delta: float = 1.5) -> Any:
    """INTELLECT-2, section 4.1: min(min(r, delta) A, clip(r) A), to be maximised."""
    r = torch.exp(lp - old)
    return -torch.minimum(torch.clamp(r, max=delta) * a, torch.clamp(r, 0.8, 1.2) * a)


def gspo(lp: Any, old: Any, a: Any, low: float = 0.05, high: float = 0.1) -> Any:
    """Eq. 5 and 7: one loss for the sequence, given to each of its tokens."""
    if not len(lp):
        return lp
    s = torch.exp((lp - old).mean())
    return -torch.minimum(s * a, torch.clamp(s, 1 - low, 1 + high) * a).expand(len(lp))


def rloo(lp: Any, old: Any, a: Any) -> Any:
    return (-torch.exp((lp - old).sum()) * a).expand(len(lp))


def unclipped(lp: Any, old: Any, a: Any) -> Any:
    return -torch.exp(lp - old) * a


def cispo(lp: Any, old: Any, a: Any, cap: float = 1.3) -> Any:
    """MiniMax-M1, eq. 4, without its lower bound."""
    return -torch.clamp(torch.exp(lp - old), max=cap).detach() * a * lp


def sapo(lp: Any, old: Any, a: Any, positive: float = 1.0, negative: float = 1.05) -> Any:
    r = torch.exp(lp - old)
    gate_positive = 4 / positive * torch.sigmoid(positive * (r - 1))
    gate_negative = 4 / negative * torch.sigmoid(negative * (r - 1))
    return -torch.where(a > 0, gate_positive, gate_negative) * a


SURROGATES: dict[str, tuple[Any, dict[str, Any], bool]] = {  # torch's, our options, one advantage per row?
    "ppo": (ppo, {}, False),
    "grpo": (ppo, {"clip_epsilon": 0.2}, True),
    "dapo": (dapo, {"clip_epsilon_high": 0.28}, False),
    "dual_clip": (dual_clip, {"dual_clip": 1.5}, False),
    "delta": (two_sided, {"delta": 1.5}, False),
    "gspo": (gspo, {"ratio": "sequence", "clip_epsilon": 0.05, "clip_epsilon_high": 0.1}, True),
    "rloo": (rloo, {"ratio": "sequence_product", "surrogate": "unclipped"}, True),
    "unclipped": (unclipped, {"surrogate": "unclipped"}, False),
    "cispo": (cispo, {"surrogate": "cispo", "ratio_cap": 1.3}, False),
    "sapo": (sapo, {"surrogate": "sapo"}, False),
    "sapo_hot": (
        lambda *x: sapo(*x, positive=2.0, negative=5.0),
        {"surrogate": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 5.0},
        False,
    ),
}


@TEMPERATURES
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name: str, reduction: str, on_policy: bool, temperature: float) -> None:
    formula, options, by_row = SURROGATES[name]
    case = make_case(temperature, on_policy)
    advantages = case.row_advantages if by_row else case.advantages

    def mine(logprobs: mx.array) -> mx.array:
        losses = policy_loss(logprobs, array(case.old), array(advantages), mx.array(MASK), **options)
        return aggregate(losses, mx.array(MASK), reduction)  # type: ignore[arg-type]

    def reference(logprobs: list[Any]) -> Any:
        a = torch.tensor(advantages) if by_row else tensors_of(advantages)
        return reduced(
            [formula(*row) for row in zip(logprobs, tensors_of(case.old), a, strict=True)], reduction
        )

    assert_agree(ours(case, temperature, mine), theirs(case, temperature, reference))


@pytest.mark.parametrize("name", ["ppo", "dapo", "dual_clip", "delta", "gspo", "cispo", "sapo"])
def test_the_cases_reach_what_the_surrogates_differ_in(name: str) -> None:
    """Off-policy, each gradient differs from that of the plain ratio: else the tests above would show little."""
    formula, _, by_row = SURROGATES[name]
    case = make_case(1.0, on_policy=False)
    plain = {"gspo": lambda *x: gspo(*x, low=1.0, high=1e9), "dual_clip": ppo, "delta": ppo, "dapo": ppo}
    advantages = torch.tensor(case.row_advantages) if by_row else tensors_of(case.advantages)

    def gradient(loss: Any) -> np.ndarray:
        def total(logprobs: list[Any]) -> Any:
            return sum(
                loss(*row).sum() for row in zip(logprobs, tensors_of(case.old), advantages, strict=True)
            )

        return theirs(case, 1.0, total)[1]

    assert np.abs(gradient(formula) - gradient(plain.get(name, unclipped))).max() > 0.05


# --- KL, entropy, the sampler's weights


KL = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: torch.exp(-d) - 1 + d,
    "abs": lambda d: d.abs(),
    "mse": lambda d: d**2 / 2,
}


@TEMPERATURES
@pytest.mark.parametrize("times_ratio", [False, True], ids=["plain", "times-ratio"])
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", KL)
def test_kl_terms(estimator: Any, on_policy: bool, times_ratio: bool, temperature: float) -> None:
    case = make_case(temperature, on_policy)
    mask = mx.array(MASK)

    def mine(logprobs: mx.array) -> mx.array:
        kl = kl_per_token(logprobs, array(case.ref), estimator, mask)
        ratio = importance_ratio(logprobs, array(case.old), mask) if times_ratio else 1.0
        return aggregate(ratio * kl, mask, "sequence_mean")

    def reference(logprobs: list[Any]) -> Any:
        losses = []
        for lp, old, ref in zip(logprobs, tensors_of(case.old), tensors_of(case.ref), strict=True):
            ratio = torch.exp(lp - old) if times_ratio else 1.0
            losses.append(ratio * KL[estimator](lp - ref))
        return reduced(losses, "sequence_mean")

    assert_agree(ours(case, temperature, mine), theirs(case, temperature, reference))


@TEMPERATURES
def test_entropy_bonus(temperature: float) -> None:
    case = make_case(temperature, on_policy=True)
    sampled = mx.array(np.flatnonzero(MASK).astype(np.int32))

    def mine(logits: mx.array) -> mx.array:
        entropies = entropy_from_logits(logits.reshape(-1, VOCABULARY)[sampled], temperature)
        return -0.3 * mx.mean(entropies)

    value, gradient = mx.value_and_grad(mine)(array(case.logits))
    logits = torch.tensor(np.concatenate(rows_of(case.logits)), requires_grad=True)
    bonus = -0.3 * torch.distributions.Categorical(logits=logits / temperature).entropy().mean()
    bonus.backward()
    expected = np.zeros(case.logits.shape)
    expected[MASK] = logits.grad.numpy()
    assert_agree((float(value), np.array(gradient)), (bonus.item(), expected), least=1e-3)


CORRECTIONS: dict[str, Any] = {
    "none": lambda d: torch.ones_like(d),
    "token_truncate": lambda d: torch.clamp(torch.exp(d), 0.8, 1.4),
    "token_mask": lambda d: torch.exp(d) * ((torch.exp(d) >= 0.8) & (torch.exp(d) <= 1.4)),
    "sequence_truncate": lambda d: torch.clamp(torch.exp(d.sum()), 0.8, 1.4).expand(len(d)),
    "sequence_mask": lambda d: torch.exp(d.sum()).expand(len(d)) * (0.8 <= float(d.sum().exp()) <= 1.4),
}


@TEMPERATURES
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_importance_weighted_loss(mode: Any, temperature: float) -> None:
    """The sampler's weights on all that is estimated from its tokens: the policy term and the KL's."""
    case, mask, beta = make_case(temperature, on_policy=False), mx.array(MASK), 0.1
    weights = importance_weights(array(case.old), array(case.behaviour), mask, mode, cap=1.4, floor=0.8)
    used = [
        CORRECTIONS[mode](o - b)
        for o, b in zip(tensors_of(case.old), tensors_of(case.behaviour), strict=True)
    ]
    assert mode == "none" or len({round(float(w), 6) for row in used for w in row}) > 1

    def mine(logprobs: mx.array) -> mx.array:
        policy = policy_loss(logprobs, array(case.old), array(case.advantages), mask)
        kl = kl_per_token(logprobs, array(case.ref), "k3", mask)
        ratio = importance_ratio(logprobs, array(case.old), mask)
        return aggregate(weights * (policy + beta * ratio * kl), mask, "token_mean")

    def reference(logprobs: list[Any]) -> Any:
        old, ref, a = (tensors_of(x) for x in (case.old, case.ref, case.advantages))
        losses = [
            used[i] * (ppo(lp, old[i], a[i]) + beta * torch.exp(lp - old[i]) * KL["k3"](lp - ref[i]))
            for i, lp in enumerate(logprobs)
        ]
        return reduced(losses, "token_mean")

    assert_agree(ours(case, temperature, mine), theirs(case, temperature, reference))


@TEMPERATURES
def test_off_policy_sequence_mask(temperature: float) -> None:
    """DeepSeek-V3.2: a dropped completion still counts in the denominator."""
    case, mask, threshold = make_case(temperature, on_policy=False, seed=8), mx.array(MASK), 0.1
    behaviour = tensors_of(case.behaviour)
    dropped: set[bool] = set()

    def mine(logprobs: mx.array) -> mx.array:
        advantages = array(case.row_advantages)
        losses = policy_loss(logprobs, array(case.old), advantages, mask)
        kept = off_policy_sequence_mask(logprobs, array(case.behaviour), advantages, mask, threshold)
        return aggregate(kept * losses, mask, "sequence_mean")

    def reference(logprobs: list[Any]) -> Any:
        losses = []
        for i, lp in enumerate(logprobs):
            a = torch.tensor(case.row_advantages[i])
            drop = bool(len(lp) and a < 0 and (behaviour[i] - lp).mean() > threshold)
            dropped.add(drop)
            losses.append(ppo(lp, tensors_of(case.old)[i], a) * (not drop))
        return reduced(losses, "sequence_mean")

    assert_agree(ours(case, temperature, mine), theirs(case, temperature, reference))
    assert dropped == {True, False}


# --- values and preferences


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss(clip: float | None) -> None:
    rng = np.random.default_rng(3)
    values, returns = (rng.normal(size=MASK.shape).astype(np.float32) for _ in range(2))
    old = values + rng.normal(0, 0.3, size=MASK.shape).astype(np.float32)
    dirty = [hide(x, rng) for x in (values, old, returns)]
    value, gradient = mx.value_and_grad(
        lambda v: value_loss(v, array(dirty[1]), array(dirty[2]), mx.array(MASK), clip)
    )(array(dirty[0]))

    v = torch.tensor(values[MASK].astype(np.float64), requires_grad=True)
    o, r = (torch.tensor(x[MASK].astype(np.float64)) for x in (old, returns))
    errors = (v - r) ** 2
    if clip is not None:
        errors = torch.maximum(errors, (torch.clamp(v, o - clip, o + clip) - r) ** 2)
    loss = 0.5 * errors.mean()
    loss.backward()
    expected = np.zeros(MASK.shape)
    expected[MASK] = v.grad.numpy()
    assert_agree((float(value), np.array(gradient)), (loss.item(), expected))
    assert (clip is None) or (v.grad == 0).any()  # the clip has been reached


@pytest.mark.parametrize(
    "options", [{}, {"margin": True}, {"centering": 0.01}, {"margin": True, "centering": 0.1}]
)
def test_bradley_terry(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    chosen, rejected, margin = rng.normal(0, 3, size=(3, 9)).astype(np.float32)
    c, r = (torch.tensor(x.astype(np.float64), requires_grad=True) for x in (chosen, rejected))
    lead = c - r - (torch.tensor(margin.astype(np.float64)) if "margin" in options else 0.0)
    loss = (
        -torch.nn.functional.logsigmoid(lead).mean() + options.get("centering", 0.0) * ((c + r) ** 2).mean()
    )
    loss.backward()
    keywords = {**options, **({"margin": mx.array(margin)} if "margin" in options else {})}
    value, gradients = mx.value_and_grad(lambda a, b: bradley_terry_loss(a, b, **keywords), argnums=(0, 1))(
        mx.array(chosen), mx.array(rejected)
    )
    assert float(value) == pytest.approx(loss.item(), abs=ATOL)
    for mine, leaf in zip(gradients, (c, r), strict=True):
        np.testing.assert_allclose(np.array(mine), leaf.grad.numpy(), rtol=0, atol=ATOL)


def test_dpo() -> None:
    """Rows 0 and 1 chosen, rows 4 and 5 rejected; whole-completion logprobs, gradient down to the logits."""
    case, beta = make_case(1.0, on_policy=True), 0.3
    mask, won, lost = mx.array(MASK), mx.array([0, 1]), mx.array([4, 5])

    def mine(logprobs: mx.array) -> mx.array:
        sums = mx.sum(logprobs, axis=1)
        ref = mx.sum(mx.where(mask, array(case.ref), 0.0), axis=1)
        return dpo_loss(sums[won], sums[lost], ref[won], ref[lost], beta)

    def reference(logprobs: list[Any]) -> Any:
        gain = [lp.sum() - ref.sum() for lp, ref in zip(logprobs, tensors_of(case.ref), strict=True)]
        pairs = [(gain[0] - gain[4]), (gain[1] - gain[5])]
        return sum(-torch.log(torch.sigmoid(beta * lead)) for lead in pairs) / 2

    assert_agree(ours(case, 1.0, mine), theirs(case, 1.0, reference))


# --- advantages: no gradient, so plain sums over the sampled tokens, straight from the definitions


def back_in_place(rows: list[list[float]]) -> np.ndarray:
    result = np.zeros(MASK.shape)
    for i, row in enumerate(rows):
        result[i][MASK[i]] = row
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_and_returns(gamma: float, lam: float) -> None:
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, R_t = A_t + V_t, with V = 0 after the last token."""
    rng = np.random.default_rng(2)
    rewards, values = (hide(rng.normal(size=MASK.shape), rng) for _ in range(2))
    advantages, returns, rewards_to_go = [], [], []
    for r, v in zip(tensors_of(rewards), tensors_of(values), strict=True):
        n = len(r)
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        a = [float(sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))) for t in range(n)]
        advantages.append(a)
        returns.append([a[t] + float(v[t]) for t in range(n)])
        rewards_to_go.append([float(sum(gamma ** (k - t) * r[k] for k in range(t, n))) for t in range(n)])
    mine = gae(array(rewards), array(values), mx.array(MASK), gamma, lam)
    np.testing.assert_allclose(np.array(mine[0]), back_in_place(advantages), rtol=0, atol=ATOL)
    np.testing.assert_allclose(np.array(mine[1]), back_in_place(returns), rtol=0, atol=ATOL)
    to_go = reward_to_go(array(rewards), mx.array(MASK), gamma)
    np.testing.assert_allclose(np.array(to_go), back_in_place(rewards_to_go), rtol=0, atol=ATOL)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean: bool) -> None:
    rng = np.random.default_rng(9)
    x = hide(rng.normal(3.0, 2.0, size=MASK.shape), rng)
    sampled = torch.cat(tensors_of(x))
    white = (sampled - sampled.mean()) / torch.sqrt(
        sampled.var() + 1e-8
    )  # torch's variance has Bessel's correction
    white = white if shift_mean else white + sampled.mean()
    expected = np.zeros(MASK.shape)
    expected[MASK] = white.numpy()
    mine = masked_whiten(array(x), mx.array(MASK), shift_mean)
    np.testing.assert_allclose(np.array(mine), expected, rtol=0, atol=ATOL)


def test_group_advantages_and_leave_one_out() -> None:
    """Groups of 5, 3 and 2 in no order, one row without a score."""
    groups = np.array([7, 2, 7, 5, 2, 7, 5, 7, 2, 7])
    scores = np.random.default_rng(1).normal(size=len(groups))
    scores[5] = np.nan
    scorable = torch.tensor(scores[~np.isnan(scores)])
    expected: dict[str, list[float]] = {"group": [], "batch": [], "none": [], "loo": []}
    for i, score in enumerate(scores):
        others = [s for j, s in enumerate(scores) if groups[j] == groups[i] and j != i and not np.isnan(s)]
        if np.isnan(score):
            for values in expected.values():
                values.append(0.0)
            continue
        group = torch.tensor([score, *others])
        centred = float(score - group.mean())
        expected["group"].append(centred / float(group.std() + 1e-4))
        expected["batch"].append(centred / float(scorable.std() + 1e-4))
        expected["none"].append(centred)
        expected["loo"].append(float(score - torch.tensor(others).mean()))
    ids = mx.array(groups.astype(np.int32))
    for scale in ("group", "batch", "none"):
        mine = np.array(group_advantages(array(scores), ids, scale))  # type: ignore[arg-type]
        np.testing.assert_allclose(mine, expected[scale], rtol=0, atol=ATOL)
    np.testing.assert_allclose(
        np.array(leave_one_out(array(scores), ids)), expected["loo"], rtol=0, atol=ATOL
    )


# Preferences without RL ----------------------------------------------------------------------------------

#: Options away from their defaults, so that each is seen.
PREFERENCE_OPTIONS = {
    "dpo": {"preference_beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"preference_beta": 0.3},
    "simpo": {"preference_beta": 2.5, "target_margin": 0.7},
    "orpo": {"preference_beta": 0.4},
    "cpo": {"preference_beta": 0.2, "nll_weight": 0.6},
    "kto": {"preference_beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8},
}


def torch_preference(name: str, now: list[Any], ref: list[Any], o: dict[str, float]) -> Any:
    """The papers' formulas on lists of token logprobs; rows 0 and 2 are chosen, 1 and 3 rejected (good and bad)."""
    logsigmoid = torch.nn.functional.logsigmoid
    beta, losses = o["preference_beta"], []
    if name == "kto":
        for i, (x, r) in enumerate(zip(now, ref, strict=True)):
            lead = beta * ((x.sum() - r.sum()) - 0.4)
            good = i % 2 == 0
            weight = o["desirable_weight"] if good else o["undesirable_weight"]
            losses.append(weight - weight * torch.sigmoid(lead if good else -lead))
        return torch.stack(losses).sum()
    for c, r, ref_c, ref_r in zip(now[::2], now[1::2], ref[::2], ref[1::2], strict=True):
        h = (c.sum() - ref_c.sum()) - (r.sum() - ref_r.sum())
        if name == "dpo":
            e = o["label_smoothing"]
            losses.append(-(1 - e) * logsigmoid(beta * h) - e * logsigmoid(-beta * h))
        elif name == "ipo":
            losses.append((h - 1 / (2 * beta)) ** 2)
        elif name == "simpo":
            losses.append(-logsigmoid(beta * c.mean() - beta * r.mean() - o["target_margin"]))
        elif name == "orpo":
            odds_c, odds_r = (torch.exp(x.mean()) / (1 - torch.exp(x.mean())) for x in (c, r))
            losses.append(-c.mean() - beta * logsigmoid(torch.log(odds_c) - torch.log(odds_r)))
        else:
            losses.append(-logsigmoid(beta * c.sum() - beta * r.sum()) - o["nll_weight"] * c.sum())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("name", PREFERENCE_OPTIONS)
def test_preference_losses_and_their_gradient_to_the_logits(name: str) -> None:
    """Rows 0, 1, 4 and 5 of the case, as two pairs."""
    case, rows, options = make_case(1.0, False, seed=3), [0, 1, 4, 5], PREFERENCE_OPTIONS[name]
    tokens, mask = mx.array(case.tokens.astype(np.int32)), mx.array(MASK)
    hidden = mx.array(np.where(MASK, case.ref, 0).astype(np.float32))
    lengths = mx.array(MASK.sum(axis=1).astype(np.float32))

    def total(logits: mx.array) -> mx.array:
        statistics = statistics_from_states(logits, lambda z: z, tokens, mask)
        sums, refs = mx.sum(statistics.logprobs, axis=1), mx.sum(hidden, axis=1)
        if name == "kto":
            picked = mx.array(rows)
            answers = Answers(sums[picked], refs[picked], lengths[picked])
            return mx.sum(kto(answers, mx.array([True, False] * 2), mx.array(0.4), options))
        sides = [Answers(sums[i], refs[i], lengths[i]) for i in (mx.array(rows[::2]), mx.array(rows[1::2]))]
        loss = PREFERENCE_ALGORITHMS[name].loss
        assert loss is not None
        return mx.sum(loss(*sides, options))

    value, gradient = mx.value_and_grad(total)(array(case.logits))
    logits = torch.tensor(np.where(MASK[..., None], case.logits, 0), requires_grad=True)
    chosen = torch.tensor(case.tokens[:, 1:, None])
    logp = torch.log_softmax(logits, -1).gather(-1, chosen)[..., 0]
    now = [logp[i][torch.tensor(MASK[i])] for i in rows]
    expected = torch_preference(name, now, [torch.tensor(case.ref[i][MASK[i]]) for i in rows], options)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), logits.grad.numpy(), rtol=1e-4, atol=ATOL)
    assert (np.array(gradient)[~MASK] == 0).all()
