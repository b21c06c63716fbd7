"""The formula printed for a config: against docs/algorithms.md, row by row, and by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config.explain import explain
from config.formula import formula
from config.loader import load_config
from config.ppo_config import PPOConfig
from ppo_trainer.algorithms import ALGORITHMS, find_algorithm
from ppo_trainer.resolution import resolve_config

DOCUMENT = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
#: What the table's words look like in a formula.
RATIOS = {
    "token": "ρₜ = π(yₜ)/π_old(yₜ)",
    "sequence, geometric mean": "ρ = (∏ₜ π(yₜ)/π_old(yₜ))^(1/n)",
    "sequence, product": "ρ = ∏ₜ π(yₜ)/π_old(yₜ)",
}
REDUCTIONS = {
    "token mean": "L = Σᵢ Σₜ {} / Σᵢ nᵢ",
    "token mean of each micro-batch": "L = mean over micro-batches of Σᵢ Σₜ {} / Σᵢ nᵢ",
    "mean of completions' means": "L = 1/B Σᵢ 1/nᵢ Σₜ {}",
    "mean of completions": "L = 1/B Σᵢ 1/nᵢ Σₜ {}",
    "mean of completions' sums": "L = 1/B Σᵢ Σₜ {}",
    "sum / (B · max_new_tokens)": "L = 1/(B·64) Σᵢ Σₜ {}",
}
ADVANTAGES = {
    "(s − mean) / std of the group": "(sᵢ − mean_g(s)) / (std_g + ",
    "grpo's": "(sᵢ − mean_g(s)) / (std_g + ",
    "s − mean of the group": "Âᵢ = sᵢ − mean_g(s)",
    "s − length-weighted mean of the group": "sᵢ − Σ_g nⱼsⱼ / Σ_g nⱼ",
    "s − β Σk1 − mean of the group's others": "Rᵢ − mean_{j≠i in g} Rⱼ",
    "return − mean of the batch's others": "Σ_{k≥t} rₖ − mean_{j≠i} Rⱼ",
    "return − score of the likeliest answer": "Σ_{k≥t} rₖ − s(likeliest answer)",
    "return": "Âₜ = Σ_{k≥t} rₖ",
    "GAE from a value network": "δₖ = rₖ + 0.99·Vₖ₊₁ − Vₖ",
    "each reward normalised alone, then their sum": "Σₖ wₖ·(sᵢₖ − mean_g(sₖ)) / (std_g",
}


def rows() -> dict[str, list[str]]:
    """The first table of the document: row → its columns."""
    lines = re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCUMENT.split("`dapo` also samples")[0], re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in lines}


def written(config: PPOConfig) -> dict[str, str]:
    algorithm = find_algorithm(config.algorithm)
    return dict(formula(resolve_config(config, algorithm), algorithm.advantage))


def test_the_document_has_every_row() -> None:
    assert list(rows()) == list(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_formula_is_what_the_document_says_of_the_row(name: str) -> None:
    advantage, ratio, bound, reduction, kl = rows()[name]
    config = PPOConfig(algorithm=name, max_new_tokens=64)
    if name == "gdpo":
        config = config.replace(rewards=["jaccard", "format"])
    found = written(config)
    plain = advantage.removesuffix(", whitened")
    assert ADVANTAGES[plain] in found["advantage"]
    assert ("over the batch's tokens" in found["advantage"]) == advantage.endswith(", whitened")
    assert found["ratio"] == RATIOS[ratio]
    if clip := re.fullmatch(r"clip ±([\d.]+)", bound):
        assert found["surrogate"] == f"ℓₜ = −min(ρ·Â, clip(ρ, 1−{clip[1]}, 1+{clip[1]})·Â)"
    elif clip := re.fullmatch(r"clip −([\d.e-]+), \+([\d.e-]+)", bound):
        low, high = (f"{float(x):g}" for x in clip.groups())
        assert found["surrogate"] == f"ℓₜ = −min(ρ·Â, clip(ρ, 1−{low}, 1+{high})·Â)"
    else:
        expected = {"none": "−ρ·Â", "weight ≤ 5, detached": "min(ρ, 5)·Â·log π", "soft gate": "σ(τ(ρ − 1))·Â"}
        assert expected[bound] in found["surrogate"]
    beta = re.search(r"β = ([\d.]+)", found.get("KL", ""))
    term = {"ρ·k3 in the loss": "(ℓₜ + {}·ρₜ·k3ₜ)", "k2 in the loss": "(ℓₜ + {}·k2ₜ)"}.get(kl, "ℓₜ")
    assert found["loss"] == REDUCTIONS[reduction].format(term.format(beta[1] if beta else ""))
    if kl == "k1 in the reward":
        assert beta is not None
        assert found["reward"] == f"rₜ = [t = n]·s − {beta[1]}·k1ₜ"
    assert ("KL" in found) == (kl != "–")


def test_what_options_change_by_hand() -> None:
    found = written(
        PPOConfig(
            algorithm="grpo",
            rewards=["jaccard", {"name": "format", "weight": 0.5}],
            scale_rewards="none",
            clip_epsilon=0.1,
            delta=4.0,
            kl_estimator="full",
            quantize_for_rollouts=True,
            importance_cap=3.0,
            entropy_coef=0.01,
            temperature=0.7,
            score_clip=5.0,
            missing_end_penalty=1.0,
            overlong_buffer=0.25,
            max_new_tokens=100,
        )
    )
    assert found["score"] == (
        "s = jaccard + 0.5·format, limited to ±5, less 1 without an end token, less 0 to 1 from 75 to 100 tokens"
    )
    assert found["advantage"] == "Âᵢ = sᵢ − mean_g(s)"
    assert found["surrogate"] == "ℓₜ = −min(min(ρ, 4)·Â, clip(ρ, 1−0.1, 1+0.1)·Â)"
    assert found["ratio"].endswith(", at temperature 0.7")
    assert found["weight"] == "w = π_old(yₜ)/μ(yₜ), limited to [0, 3]"
    # The sum over the vocabulary was not sampled, so it has no weight.
    assert found["loss"] == "L = 1/B Σᵢ 1/nᵢ Σₜ (w·ℓₜ + 0.04·KLₜ) − 0.01·mean H(π)"


def test_how_rewards_become_a_score() -> None:
    rewards = ["jaccard", {"name": "format", "weight": 0.5}]
    for composition, score in [
        ("weighted_sum", "s = jaccard + 0.5·format"),
        ("sum", "s = jaccard + format"),
        ("weighted_mean_clip01", "s = (jaccard + 0.5·format) / Σₖ wₖ, limited to [0, 1]"),
    ]:
        config = PPOConfig(rewards=rewards).replace(reward_composition=composition)
        assert written(config)["score"] == score


def test_a_shared_trunk_and_a_loss_without_kl() -> None:
    found = written(PPOConfig(algorithm="ppo", value_network="shared", vf_coef=0.5, kl_coef=0.0))
    assert "KL" not in found
    assert found["reward"] == "rₜ = [t = n]·s"
    assert found["loss"] == "L = Σᵢ Σₜ ℓₜ / Σᵢ nᵢ + 0.5·L_V"


def test_the_page_has_every_value_with_its_origin() -> None:
    loaded = load_config(PPOConfig, preset="grpo", environ={"MLX_PPO_SEED": "5"}, overrides=["gamma=0.5"])
    algorithm = find_algorithm("grpo")
    config = resolve_config(loaded.config, algorithm)
    page = explain(config, loaded.resolved(config).origins, advantage=algorithm.advantage)
    for line in (
        r"^\[rollouts\]$",
        r"^  seed +5 +environment MLX_PPO_SEED$",
        r"^  gamma +0\.5 +command line --gamma$",
        r"^  group_size +8 +preset grpo$",
        r"^  kl_coef +0\.04 +algorithm grpo$",
        r"^  lam +0\.95 +default$",
        r"^  loss +L = 1/B Σᵢ 1/nᵢ Σₜ \(ℓₜ \+ 0\.04·ρₜ·k3ₜ\)$",
    ):
        assert re.search(line, page, re.MULTILINE), line
