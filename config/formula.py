"""What a resolved config trains, written down: scores, rewards, advantage, ratio, loss, in the signs of
``docs/algorithms.md``.

    π policy   π_old before the batch's first update   μ what sampled   π_ref reference   s score   y of n tokens
    d = log π − log π_ref   k1 = d   k2 = d²/2   k3 = exp(−d) − 1 + d   B completions   g group of one prompt
"""

from __future__ import annotations

from collections.abc import Callable

from config.ppo_config import PPOConfig

LEGEND = (
    "π policy, π_old the same before the batch's first update, π_ref reference, μ what sampled; Â advantage; "
    "y of n tokens, B of them"
)
#: Estimators of the KL with d = log π − log π_ref.
ESTIMATORS = {
    "k1": "d",
    "k2": "½d²",
    "mse": "½d²",
    "k3": "e⁻ᵈ − 1 + d",
    "k3_plain": "e⁻ᵈ − 1 + d",
    "abs": "|d|",
    "full": "Σ_v π_v (log π_v − log π_ref,v), over the vocabulary",
}
RATIOS = {
    "token": "ρₜ = π(yₜ)/{old}(yₜ)",
    "sequence": "ρ = (∏ₜ π(yₜ)/{old}(yₜ))^(1/n)",
    "sequence_product": "ρ = ∏ₜ π(yₜ)/{old}(yₜ)",
}
REDUCTIONS = {
    "token_mean": "Σᵢ Σₜ {loss} / Σᵢ nᵢ",
    "sequence_mean": "1/B Σᵢ 1/nᵢ Σₜ {loss}",
    "sequence_sum": "1/B Σᵢ Σₜ {loss}",
    "fixed_length": "1/(B·{longest}) Σᵢ Σₜ {loss}",
    "micro_batch_mean": "mean over micro-batches of Σᵢ Σₜ {loss} / Σᵢ nᵢ",
}
CREDIT_PER_TOKEN = ("from_critic", "from_return", "from_return_and_others", "from_return_and_greedy")


def formula(config: PPOConfig, advantage: str) -> list[tuple[str, str]]:
    """(what, formula) line by line.

    Args:
        config: as ``resolve_config`` leaves it.
        advantage: the name of the algorithm's credit function (``Algorithm.advantage``).
    """
    lines = [("score", _score(config))]
    if (config.uses_kl and config.kl_placement == "reward") or advantage in CREDIT_PER_TOKEN:
        lines.append(("reward", _reward(config)))
    lines.append(("advantage", _advantage(config, advantage)))
    if advantage == "from_critic":
        lines.append(("value", _value(config)))
    ratio = RATIOS[config.ratio or "token"].format(
        old="μ" if config.old_logprobs_from == "rollout" else "π_old"
    )
    lines.append(
        ("ratio", f"{ratio}{'' if config.temperature == 1 else f', at temperature {config.temperature:g}'}")
    )
    lines.append(("surrogate", f"ℓₜ = {_surrogate(config)}"))
    if config.correction != "none":
        lines.append(("weight", _weight(config)))
    if config.uses_kl:
        lines.append(("KL", _kl(config)))
    if left_out := _left_out(config):
        lines.append(("left out", left_out))
    lines.append(
        ("loss", _loss(config, shared=advantage == "from_critic" and config.value_network == "shared"))
    )
    return lines


def _score(config: PPOConfig) -> str:
    names = [one if isinstance(one, str) else one["name"] for one in config.rewards or ()]
    weights = config.reward_weights or [
        1.0 if isinstance(one, str) else one.get("weight", 1.0) for one in config.rewards or ()
    ]
    total = "Σₖ wₖ·rewardₖ(y)"
    if names and len(weights) == len(names):
        plain = config.reward_composition == "sum"
        parts = [name if w == 1 or plain else f"{w:g}·{name}" for name, w in zip(names, weights, strict=True)]
        total = " + ".join(parts)
    if config.reward_composition == "weighted_mean_clip01":
        total = f"({total}) / Σₖ wₖ, limited to [0, 1]"
    elif config.reward_composition == "sum" and not names:
        total = "Σₖ rewardₖ(y)"
    text = f"s = {total}"
    if config.score_scaling != "none":
        text += {"std": ", divided by", "norm": ", less its running mean and divided by"}[
            config.score_scaling
        ]
        text += " its running deviation"
    if config.score_clip is not None:
        text += f", limited to ±{config.score_clip:g}"
    if config.missing_end_penalty:
        penalty = f"{config.missing_end_penalty:g} without an end token"
        text += f", less {penalty}" if config.missing_end_mode == "subtract" else f", or −{penalty}"
    if config.overlong_buffer and config.overlong_penalty:
        longest = config.max_new_tokens
        start = longest - round(config.overlong_buffer * longest)
        text += f", less 0 to {config.overlong_penalty:g} from {start} to {longest} tokens"
    return text


def _reward(config: PPOConfig) -> str:
    kl = (
        f" − {config.kl_coef:g}·{_estimated(config)}"
        if config.uses_kl and config.kl_placement == "reward"
        else ""
    )
    return f"rₜ = [t = n]·s{kl}{', divided by the deviation over the batch' if config.whiten_rewards else ''}"


def _advantage(config: PPOConfig, credit: str) -> str:
    penalised = config.uses_kl and config.kl_placement == "reward"
    outcome = "R" if penalised else "s"
    defined = ",   R = Σₜ rₜ" if penalised else ""
    gamma, to_go = f"{config.gamma:g}", "Σ_{k≥t} rₖ"
    if config.gamma != 1:
        to_go = f"Σ_{{k≥t}} {gamma}^(k−t)·rₖ"
    epsilon = f"{config.advantage_epsilon:g}"
    scale = {"group": f"(std_g + {epsilon})", "batch": f"(std of the batch + {epsilon})", "none": ""}[
        config.scale_rewards
    ]
    centred = f"{outcome}ᵢ − mean_g({outcome})"
    own = f"(sᵢₖ − mean_g(sₖ)) / {scale}" if scale else "(sᵢₖ − mean_g(sₖ))"
    known: dict[str, Callable[[], str]] = {
        "from_critic": lambda: f"Âₜ = Σ_{{k≥t}} ({gamma}·{config.lam:g})^(k−t)·δₖ,   δₖ = rₖ + {gamma}·Vₖ₊₁ − Vₖ",
        "from_group": lambda: f"Âᵢ = {f'({centred}) / {scale}' if scale else centred}{defined}",
        "from_others_of_group": lambda: f"Âᵢ = {outcome}ᵢ − mean_{{j≠i in g}} {outcome}ⱼ{defined}",
        "from_length_weighted_group": lambda: f"Âᵢ = {outcome}ᵢ − Σ_g nⱼ{outcome}ⱼ / Σ_g nⱼ{defined}",
        "from_each_reward": lambda: f"Âᵢ = normalised over the batch(Σₖ wₖ·{own})",
        "from_return": lambda: f"Âₜ = {to_go}",
        "from_return_and_others": lambda: f"Âₜ = {to_go} − mean_{{j≠i}} Rⱼ,   R = Σₜ rₜ",
        "from_return_and_greedy": lambda: f"Âₜ = {to_go} − s(likeliest answer)",
    }
    text = known[credit]() if credit in known else f"Â = {credit}(batch)"
    return f"{text},   then Â ← (Â − mean)/std over the batch's tokens" if config.whiten_advantages else text


def _value(config: PPOConfig) -> str:
    limit = config.clip_range_value
    error = "(V − R̂)²"
    if limit is not None:
        error = f"max({error}, (clip(V, V_old ± {limit:g}) − R̂)²)"
    where = "on the policy's trunk" if config.value_network == "shared" else "a network of its own"
    return f"L_V = ½ mean {error},   R̂ = Â + V_old before whitening; {where}"


def _surrogate(config: PPOConfig) -> str:
    if config.surrogate == "unclipped":
        return "−ρ·Â"
    if config.surrogate == "cispo":
        return f"−{'ρ' if config.ratio_cap is None else f'min(ρ, {config.ratio_cap:g})'}·Â·log π(yₜ), no gradient in ρ"
    if config.surrogate == "sapo":
        return (
            f"−(4/τ)·σ(τ(ρ − 1))·Â,   τ = {config.sapo_temperature_pos:g} if Â > 0, else "
            f"{config.sapo_temperature_neg:g}"
        )
    low = config.clip_epsilon
    high = low if config.clip_epsilon_high is None else config.clip_epsilon_high
    free = "ρ" if config.delta is None else f"min(ρ, {config.delta:g})"
    text = f"−min({free}·Â, clip(ρ, 1−{low:g}, 1+{high:g})·Â)"
    return text if config.dual_clip is None else f"{text}, at most −{config.dual_clip:g}·Â where Â < 0"


def _weight(config: PPOConfig) -> str:
    kind, _, action = config.correction.partition("_")
    each = "π_old(yₜ)/μ(yₜ)" if kind == "token" else "∏ₜ π_old(yₜ)/μ(yₜ)"
    bounds = f"[{config.importance_floor:g}, {config.importance_cap:g}]"
    return f"w = {each}, {'limited to' if action == 'truncate' else '0 outside'} {bounds}"


def _left_out(config: PPOConfig) -> str:
    """What teaches nothing."""
    parts = []
    if config.mask_truncated_completions:
        parts.append("completions that were cut off")
    if config.top_entropy_quantile < 1:
        parts.append(f"all tokens but the {config.top_entropy_quantile:g} of highest entropy")
    if config.off_policy_mask_threshold is not None:
        parts.append(f"y with Â < 0 and mean log μ/π > {config.off_policy_mask_threshold:g} (m = 0)")
    if config.dynamic_sampling:
        parts.append("groups of equal scores, replaced by other prompts'")
    return "; ".join(parts)


def _estimated(config: PPOConfig) -> str:
    return (
        "KLₜ" if config.kl_estimator == "full" else f"{(config.kl_estimator or 'k1').removesuffix('_plain')}ₜ"
    )


def _kl(config: PPOConfig) -> str:
    estimator = config.kl_estimator or "k1"
    weight = f"β = {config.kl_coef:g}"
    if config.kl_target is not None:
        weight += f", steered to {config.kl_target:g} nats per {config.kl_unit}"
    where = "in the reward" if config.kl_placement == "reward" else "in the loss"
    return f"{_estimated(config)} = {ESTIMATORS[estimator]},   d = log π(yₜ) − log π_ref(yₜ),   {weight}, {where}"


def _loss(config: PPOConfig, *, shared: bool) -> str:
    keep = "" if config.off_policy_mask_threshold is None else "m·"
    term, weight = f"{keep}ℓₜ", "" if config.correction == "none" else "w·"
    in_loss = config.uses_kl and config.kl_placement == "loss"
    if in_loss:
        ratio = "ρₜ·" if config.kl_estimator == "k3" else ""
        kl = f"{config.kl_coef:g}·{ratio}{_estimated(config)}"
        if weight and config.kl_estimator == "full":  # summed over the vocabulary, so not sampled
            term, weight = f"{weight}{term} + {kl}", ""
        else:
            term = f"{term} + {kl}"
    term = f"{weight}({term})" if " + " in term else f"{weight}{term}"
    text = (
        f"L = {REDUCTIONS[config.reduction or 'token_mean'].format(loss=term, longest=config.max_new_tokens)}"
    )
    if config.entropy_coef:
        sign = "−" if config.entropy_coef > 0 else "+"
        text += f" {sign} {abs(config.entropy_coef):g}·mean H(π)"
    return f"{text} + {config.vf_coef:g}·L_V" if shared else text
