"""Whole optimiser steps: rollouts to updated weights, beside a plain PyTorch loop over the same weights.

    ./run test-torch tests/test_torch_steps.py

A random Qwen3 of transformers is saved, and loaded by both sides. Ours goes through ``ExperienceMaker`` and
``Updater`` in padded micro-batches. Torch's runs each completion alone, in float64, and spells out scores, KL,
advantages, loss, backward, clipping and AdamW for itself. After every optimiser step the loss and the gradient norm,
and at the end the logprobs of the updated policy (and the values of the critic), agree to 1e-4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from base_setup.tokenizer_setup import byte_tokenizer
from config.ppo_config import PPOConfig
from config.training_config import TrainingConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.policy_model import FrozenPolicy, PolicyModel
from models.sft_model import load_language_model
from models.value_model import ValueModel
from ppo_trainer.algorithms import find_algorithm
from ppo_trainer.experience_maker import ExperienceMaker
from ppo_trainer.resolution import resolve_config, updates_per_batch
from ppo_trainer.updater import Updater
from reward_kl.kl_divergence import FixedKLController
from rewards.composition import RewardSet
from rewards.scored_batch import ScoredBatch
from tests.test_torch_losses import KL, SURROGATES, cispo, gspo, ppo, reduced
from tests.test_torch_parity import random_qwen3
from token_attribution.extractor import extract

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ATOL = 1e-4
RATE, CLIP_NORM = 3e-4, 0.7
#: Two groups of three: prompts and completions of different lengths, one of a single token, one cut off.
PROMPTS = [[10, 20, 30], [10, 20, 30], [99, 98], [10, 20, 30], [99, 98], [99, 98]]
COMPLETIONS = [[40, 50, 258], [1, 2, 3, 4, 5, 6], [258], [61, 258], [77, 78, 79, 258], [200, 201, 258]]
SCORES = np.array([1.0, -0.5, 0.3, 0.0, 2.0, -1.0], dtype=np.float32)
GROUPS = [0, 0, 1, 0, 1, 1]


def perturbed(model: Any, folder: Path) -> Any:
    """The reference: the same model with every weight moved a little."""
    other = copy.deepcopy(model).float()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn_like(weight)
    other.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return other.double()


# --- torch's side


def logprobs_of(model: Any, temperature: float) -> tuple[list[Any], list[Any]]:
    """Logprobs of each completion's tokens and the entropies there, (n_i,) each; every row by itself."""
    logprobs, entropies = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits / temperature, dim=-1)
        logprobs.append(logp[torch.arange(len(completion)), torch.tensor(completion)])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return logprobs, entropies


class Critic(torch.nn.Module):
    """A trunk of its own and a linear head, with the weights that ours gets too."""

    def __init__(self, model: Any, head: np.ndarray) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(model.model)
        self.head = torch.nn.Linear(len(head), 1).double()
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(head)[None])
            self.head.bias.zero_()

    def values(self) -> list[Any]:
        """The value before each token of each completion, (n_i,)."""
        values = []
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            states = self.trunk(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
            values.append(self.head(states)[len(prompt) - 1 : -1, 0])
        return values


def adamw(module: Any, rate: float = RATE) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def torch_step(module: Any, optimizer: Any, loss: Any) -> tuple[float, float]:
    """Backward, clip, update; loss and gradient norm."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
    optimizer.step()
    return loss.item(), norm.item()


def group_normalised(scores: Any) -> list[Any]:
    """GRPO: minus the group's mean, divided by its standard deviation + 1e-4."""
    advantages = []
    for score, group in zip(scores, GROUPS, strict=True):
        members = torch.stack([s for s, g in zip(scores, GROUPS, strict=True) if g == group])
        advantages.append((score - members.mean()) / (members.std() + 1e-4))
    return advantages


def group_centred(scores: Any) -> list[Any]:
    return [
        score - torch.stack([s for s, g in zip(scores, GROUPS, strict=True) if g == group]).mean()
        for score, group in zip(scores, GROUPS, strict=True)
    ]


def others_of_group(scores: Any) -> list[Any]:
    """RLOO: minus the mean of the two others."""
    return [
        score - torch.stack([s for j, s in enumerate(scores) if GROUPS[j] == GROUPS[i] and j != i]).mean()
        for i, score in enumerate(scores)
    ]


# --- ours


def build(folder: Path, **options: Any) -> tuple[PolicyModel, PPOConfig]:
    config = PPOConfig(
        model_name=str(folder),
        fine_tune_type="full",
        learning_rate=RATE,
        max_grad_norm=CLIP_NORM,
        batch_size=len(set(GROUPS)),
        max_new_tokens=9,
        micro_batch_size=4,  # of six rows: an uneven split
        verbose=False,
        **options,
    )
    config = resolve_config(config, find_algorithm(config.algorithm))
    return PolicyModel(load_language_model(config), config), config


def rollouts() -> list[Rollout]:
    return [
        Rollout(
            prompt=Prompt(GROUPS[i], "", tuple(PROMPTS[i])),
            member=i,
            completion_ids=tuple(completion),
            logprobs=(0.0,) * len(completion),  # what the sampler said is not used without a correction
            terminated=completion[-1] == 258,
            text="",
        )
        for i, completion in enumerate(COMPLETIONS)
    ]


def update(
    policy: PolicyModel,
    value: ValueModel | None,
    reference: FrozenPolicy | None,
    config: PPOConfig,
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """One batch through our pipeline; loss and gradient norm of each optimiser step of policy and critic."""
    controller = FixedKLController(config.kl_coef)
    scored = ScoredBatch(SCORES, {"given": SCORES})
    rewards = RewardSet([lambda completions: SCORES])
    rewards.names = ["given"]
    maker = ExperienceMaker(
        policy, value, reference, rewards, find_algorithm(config.algorithm), controller, config
    )
    experience, _ = maker.make(
        rollouts(), scored, single_update=updates_per_batch(config, len(COMPLETIONS)) == 1
    )
    updater = Updater(policy, value, reference, controller, config, total_steps=10)
    steps: tuple[list[tuple[float, float]], ...] = ([], [])
    for trainer, seen in zip((updater.policy_trainer, updater.value_trainer), steps, strict=True):
        if trainer is None:
            continue

        def recorded(
            *arguments: Any, step: Callable[..., Any] = trainer.step, seen: Any = seen, **keywords: Any
        ) -> Any:
            report = step(*arguments, **keywords)
            seen.append((report.loss, report.grad_norm))
            return report

        trainer.step = recorded  # type: ignore[method-assign]
    updater.update(experience, 1)
    return steps[0], steps[1]


def our_logprobs(policy: PolicyModel, temperature: float) -> list[np.ndarray]:
    batch = extract(rollouts())
    logprobs, mask = np.array(policy.logprobs(batch.tokens, batch.mask, temperature)), np.array(batch.mask)
    return [row[real] for row, real in zip(logprobs, mask, strict=True)]


def assert_same(mine: Any, reference: Any) -> None:
    """To 1e-4; gradient norms in the hundreds, as three steps of RLOO's unbounded ratio have, to as many digits."""
    for one, other in zip(mine, reference, strict=True):
        other = other.detach().numpy() if isinstance(other, torch.Tensor) else other
        np.testing.assert_allclose(one, other, rtol=3e-5, atol=ATOL)


def assert_moved(before: list[Any], after: list[Any], least: float = 0.01) -> None:
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(before, after, strict=True))
    assert moved > least


# --- the critic-free rows

CENTRED = {"dr_grpo": group_centred, "rloo": others_of_group}
#: options of ours; torch's surrogate of one row; reduction; coefficient of ratio * k3 in the loss; of the entropy
ROWS: dict[str, tuple[dict[str, Any], Any, str, float, float]] = {
    "grpo": ({"kl_coef": 0.2}, ppo, "sequence_mean", 0.2, 0.0),
    "grpo-entropy": ({"kl_coef": 0.0, "entropy_coef": 0.05}, ppo, "sequence_mean", 0.0, 0.05),
    "dr_grpo": ({}, ppo, "fixed_length", 0.0, 0.0),
    "dapo": ({}, SURROGATES["dapo"][0], "token_mean", 0.0, 0.0),
    "gspo": ({}, lambda *x: gspo(*x, low=3e-4, high=4e-4), "sequence_mean", 0.0, 0.0),
    "luspo": ({}, lambda *x: gspo(*x, low=2e-3, high=2.5e-3), "sequence_sum", 0.0, 0.0),
    "cispo": ({"ratio_cap": 1.01}, lambda *x: cispo(*x, cap=1.01), "token_mean", 0.0, 0.0),
    "sapo": ({}, SURROGATES["sapo"][0], "sequence_mean", 0.0, 0.0),
    "rloo": ({"kl_coef": 0.0}, SURROGATES["rloo"][0], "sequence_mean", 0.0, 0.0),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_critic_free_steps(name: str, steps: int, temperature: float, tmp_path: Path) -> None:
    options, surrogate, reduction, beta, entropy_coef = ROWS[name]
    algorithm = name.partition("-")[0]
    theirs = random_qwen3(tmp_path / "model", tied=temperature == 1.0).double()
    ref = perturbed(theirs, tmp_path / "reference")
    policy, config = build(
        tmp_path / "model",
        algorithm=algorithm,
        group_size=3,
        num_epochs_per_rollout=steps,
        temperature=temperature,
        overlong_buffer=0.0,
        dynamic_sampling=False,
        **options,
    )
    frozen = None
    if beta:
        frozen = FrozenPolicy(
            load_language_model(TrainingConfig(model_name=str(tmp_path / "reference"))).model
        )
    mine, _ = update(policy, None, frozen, config)

    with torch.no_grad():
        old, ref_logprobs = logprobs_of(theirs, temperature)[0], logprobs_of(ref, temperature)[0]
    advantages = CENTRED.get(algorithm, group_normalised)(torch.tensor(SCORES.astype(np.float64)))
    optimizer, expected = adamw(theirs), []
    for _ in range(steps):
        logprobs, entropies = logprobs_of(theirs, temperature)
        losses = []
        for lp, before, reference, a in zip(logprobs, old, ref_logprobs, advantages, strict=True):
            ratio = torch.exp(lp - before)
            losses.append(surrogate(lp, before, a) + beta * ratio * KL["k3"](lp - reference))
        loss = reduced(losses, reduction, width=9) - entropy_coef * torch.cat(entropies).mean()
        expected.append(torch_step(theirs, optimizer, loss))

    assert_same(mine, expected)
    updated = logprobs_of(theirs, temperature)[0]
    assert_moved(old, updated)
    assert_same(our_logprobs(policy, temperature), updated)


# --- PPO with a critic of its own


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ppo_steps_with_a_separate_critic(tied: bool, temperature: float, tmp_path: Path) -> None:
    """KL in the reward, GAE, whitening, then two epochs of policy and critic."""
    beta, gamma, lam = 0.1, 0.98, 0.9
    theirs = random_qwen3(tmp_path / "model", tied).double()
    ref = perturbed(theirs, tmp_path / "reference")
    policy, config = build(
        tmp_path / "model",
        algorithm="ppo",
        group_size=3,
        num_epochs_per_rollout=2,
        temperature=temperature,
        kl_coef=beta,
        gamma=gamma,
        lam=lam,
        missing_end_penalty=0.7,
        value_learning_rate=2 * RATE,
        clip_range_value=0.01,
    )
    head = np.random.default_rng(2).normal(0, 0.3, size=32).astype(np.float32)
    value = ValueModel(policy.base, config)
    value.module.head.weight = mx.array(head[None])
    frozen = FrozenPolicy(load_language_model(TrainingConfig(model_name=str(tmp_path / "reference"))).model)
    mine, mine_value = update(policy, value, frozen, config)

    critic = Critic(theirs, head.astype(np.float64))
    with torch.no_grad():
        old, ref_logprobs = logprobs_of(theirs, temperature)[0], logprobs_of(ref, temperature)[0]
        old_values = critic.values()
    raw, returns = [], []
    for i, v in enumerate(old_values):
        rewards = -beta * (old[i] - ref_logprobs[i])
        rewards[-1] += float(SCORES[i]) - (0.0 if COMPLETIONS[i][-1] == 258 else 0.7)
        following, advantages = 0.0, torch.zeros_like(v)
        for t in reversed(range(len(v))):
            delta = rewards[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t]
            following = delta + gamma * lam * following
            advantages[t] = following
        raw.append(advantages)
        returns.append(advantages + v)
    every = torch.cat(raw)
    advantages = [(a - every.mean()) / torch.sqrt(every.var() + 1e-8) for a in raw]

    optimizer, value_optimizer = adamw(theirs), adamw(critic, 2 * RATE)
    expected, expected_value = [], []
    for _ in range(2):
        logprobs = logprobs_of(theirs, temperature)[0]
        losses = [ppo(*row) for row in zip(logprobs, old, advantages, strict=True)]
        expected.append(torch_step(theirs, optimizer, torch.cat(losses).mean()))
        v, before, target = torch.cat(critic.values()), torch.cat(old_values), torch.cat(returns)
        clipped = torch.clamp(v, before - 0.01, before + 0.01)
        loss = 0.5 * torch.maximum((v - target) ** 2, (clipped - target) ** 2).mean()
        expected_value.append(torch_step(critic, value_optimizer, loss))

    assert_same(mine, expected)
    assert_same(mine_value, expected_value)
    updated = logprobs_of(theirs, temperature)[0]
    assert_moved(old, updated)
    assert_same(our_logprobs(policy, temperature), updated)
    batch = extract(rollouts())
    our_values, mask = np.array(value.values(batch.tokens, batch.mask)), np.array(batch.mask)
    assert_moved(old_values, critic.values())
    assert_same([row[real] for row, real in zip(our_values, mask, strict=True)], critic.values())
