"""Embedded models for tests, and what is read off them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from base_setup.parameters import named_arrays
from config.model_config import ModelConfig
from config.training_config import TrainingConfig
from models.policy_model import PolicyModel
from models.sft_model import (
    LanguageModel,
    build_embedded,
)
from token_attribution.host_kernels import fast_kernels

SMALL = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
#: Weights large enough that greedy tokens differ from position to position.
BOLD = SMALL.replace(init_std=0.3)
IDS = mx.array([[72, 101, 108, 108, 111]])


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(model_name="embedded", embedded_model=SMALL, lora_r=4, lora_alpha=8, **options)


def moved(policy: PolicyModel) -> PolicyModel:
    """The policy with every trainable number changed, as after training."""
    key = mx.random.key(5)
    policy.model.update(
        tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape, key=key), policy.model.trainable_parameters())
    )
    return policy


def logits(model: Any) -> np.ndarray:
    with fast_kernels():  # as the trunk of a PolicyModel computes, so that bits can be compared
        return np.array(model(IDS))


def numbers(model: nn.Module) -> dict[str, bytes]:
    return {name: np.array(x).tobytes() for name, x in named_arrays(model.parameters()).items()}


def readable(seed: int) -> LanguageModel:
    """A model whose likeliest tokens are printable ASCII, ids 0 to 93: every other logit is exactly 0."""
    base = build_embedded(BOLD, seed=seed)
    embedding = base.model.model.embed_tokens
    embedding.weight = mx.where(mx.arange(embedding.weight.shape[0])[:, None] < 94, embedding.weight, 0)
    return base
