"""Whole trainers on a model of a few thousand weights: their configs, rewards, and what is read off them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten

from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Experience, Prompt, Rollout
from monitoring.metrics_file import read_metrics
from ppo_trainer.ppo_trainer import PPOTrainer
from ppo_trainer.updater import Updater

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
#: Of different lengths, so that every batch is padded.
PROMPTS = ["ab", "abc", "q", "hello there"]
PPO: dict[str, Any] = {"algorithm": "ppo"}
SHARED: dict[str, Any] = {"algorithm": "ppo", "value_network": "shared"}
GRPO: dict[str, Any] = {"algorithm": "grpo", "group_size": 4}
KINDS = pytest.mark.parametrize("kind", [PPO, SHARED, GRPO], ids=["ppo", "ppo-shared", "grpo"])
PPO_AND_GRPO = pytest.mark.parametrize("kind", [PPO, GRPO], ids=["ppo", "grpo"])


def config(folder: Path, **options: Any) -> PPOConfig:
    return PPOConfig(
        **{
            "model_name": "embedded",
            "embedded_model": SMALLEST,
            "output_dir": str(folder / "run"),
            "max_new_tokens": 5,
            "verbose": False,
            **options,
        }
    )


def ascii_share(completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of a completion's characters that are ASCII: about a half for a fresh model."""
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]


def even_share(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def constant(completions: Sequence[str], **columns: Any) -> list[float]:
    return [0.3] * len(completions)


def judged_by_length(prompts: Sequence[str], **columns: Any) -> list[float]:
    """Equal within a group, different between groups."""
    return [float(len(prompt)) for prompt in prompts]


def arrays(module: Any) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(module.parameters())}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)


def largest_difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(one[k] - other[k]).max()) for k in one)


def weights(trainer: PPOTrainer) -> dict[str, np.ndarray]:
    """Everything that could train: the policy, and the value network where there is one."""
    value = {} if trainer.value_model is None else arrays(trainer.value_model.module)
    return arrays(trainer.policy.model) | {f"value.{name}": x for name, x in value.items()}


def steps_of(folder: str | Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "kind" not in line]


def fixed_batch(trainer: PPOTrainer, group_size: int = 2, seed: int = 0) -> list[Rollout]:
    """Rollouts of every length from 1 to 2 G, of ids and with logprobs that have nothing to do with sampling."""
    random = np.random.default_rng(seed)
    rollouts = []
    for index, text in enumerate(["ab", "a longer one"]):
        prompt = Prompt(index, text, tuple(trainer.policy.tokenizer.encode(text)), {})
        for member in range(group_size):
            ids = tuple(random.integers(0, 200, size=1 + index * group_size + member).tolist())
            rollouts.append(Rollout(prompt, member, ids, (-5.0,) * len(ids), member % 2 == 0, f"{member}"))
    return rollouts


# AdamW's first step from a gradient g is lr · g / (|g| + eps), moments being unbiased. With lr = eps = 1 the
# weights move by u = -g / (|g| + 1), so that g = -u / (1 - |u|): gradients can be read off an update.
READABLE = {
    "learning_rate": 1.0,
    "adam_eps": 1.0,
    "max_grad_norm": None,
    "fine_tune_type": "full",
    "num_epochs_per_rollout": 1,
}


def gradients(trainer: PPOTrainer, experience: Experience) -> dict[str, np.ndarray]:
    """Of policy and value network together, for one update with all rows; the trainer stays as it was."""
    before = weights(trainer)
    modules = [trainer.policy.model] if trainer.value_model is None else []
    if trainer.value_model is not None:
        modules = [trainer.policy.model, trainer.value_model.module]
    kept = [module.parameters() for module in modules]
    updater = Updater(
        trainer.policy,
        trainer.value_model,
        trainer.algorithm,
        trainer.kl_controller,
        trainer.config,
        total_steps=1,
    )
    updater.update(experience, step=1)
    after = weights(trainer)
    for module, parameters in zip(modules, kept, strict=True):
        module.update(parameters)
    assert same(weights(trainer), before)
    moved = {name: after[name] - before[name] for name in before}
    return {name: -u / (1 - np.abs(u)) for name, u in moved.items()}
