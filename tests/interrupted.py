"""Short runs that something goes wrong with, and whether two runs are one and the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from base_setup.parameters import named_arrays
from checkpointing.durable import sha256_of
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from ppo_trainer.ppo_trainer import PPOTrainer

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
PROMPTS = ["a", "bb", "ccc", "dd", "eee"]  # with batches of two the last one of an epoch is short


def letters(completions: Sequence[str], **columns: Any) -> list[float]:
    """How many different characters a completion has, in tens."""
    return [len(set(text)) / 10 for text in completions]


def short_run(folder: Path, *, reward: Any = letters, **options: Any) -> PPOTrainer:
    """A trainer of five steps with a checkpoint at each."""
    settings = {
        "model_name": "embedded",
        "embedded_model": SMALLEST,
        "seed": 1,
        "lora_r": 4,
        "batch_size": 2,
        "max_new_tokens": 5,
        "num_steps": 5,  # into the second epoch
        "num_epochs_per_rollout": 2,
        "save_every": 1,
        "keep_last_n": 100,
        "min_free_gb": 0,
        "learning_rate": 1e-2,
        "log_samples_every": 1,
        "output_dir": str(folder),
        "verbose": False,
    }
    return PPOTrainer(PPOConfig(**{**settings, **options}), reward_model=reward)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's file, without what a clock has said."""
    records = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [
        {k: v for k, v in r.items() if "time/" not in k and "tokens_per_second" not in k} for r in records
    ]


def weights(trainer: PPOTrainer) -> dict[str, np.ndarray]:
    """What trains of the policy, as it is now."""
    return {
        name: np.array(x) for name, x in named_arrays(trainer.policy.model.trainable_parameters()).items()
    }


def differences(straight: Path, other: Path) -> list[str]:
    """Where two run folders differ in lines or in the trained weights; empty: they are the same run, bit for bit."""
    found = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        if lines(straight, name) != lines(other, name):
            found.append(name)
    files = sorted((straight / "final").rglob("*.safetensors"))
    assert files
    for path in files:
        theirs = other / "final" / path.relative_to(straight / "final")
        if not theirs.is_file() or sha256_of(path) != sha256_of(theirs):
            found.append(str(theirs))
    return found
