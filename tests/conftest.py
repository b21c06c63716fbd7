"""Models of a few thousand weights, made on the spot.

They last for the whole session: nothing here may write into an array. Training a ``PolicyModel`` over one of
them replaces arrays of its own copy and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes

from config.model_config import ModelConfig
from config.training_config import TrainingConfig
from models.sft_model import LanguageModel, build_embedded
from token_attribution import host_math

TINY = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)

#: What the architectures below have in common.
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
#: One of each kind: what distinguishes its config.json.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {  # grouped heads and soft-capped logits: no visible head, and no mask per row
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt2": {  # learned positions
        "n_ctx": 128,
        "n_embd": 32,
        "n_head": 2,
        "n_layer": 2,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "mamba2": {  # recurrent
        "num_heads": 4,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": (0.0, float("inf")),
        "time_step_rank": "auto",
    },
    "lfm2": {  # convolutions and attention
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
}


@pytest.fixture(autouse=True)
def numpy_however_little_there_is_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models here are so small that NumPy would otherwise hardly be asked."""
    monkeypatch.setattr(host_math, "FEW", 0)


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    """The embedded model, at its smallest."""
    return build_embedded(TINY, seed=1)


@pytest.fixture
def base() -> LanguageModel:
    """The same, made anew for each test, which may do with it what it likes."""
    return build_embedded(TINY, seed=1)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """A config for ``tiny``: any class of them, its further options by keyword."""

    def make(cls: type[TrainingConfig] = TrainingConfig, **options: Any) -> Any:
        small = {"model_name": "embedded", "embedded_model": TINY, "seed": 1, "lora_r": 4, "lora_alpha": 8}
        return cls(**{**small, **options})

    return make


@pytest.fixture(scope="session")
def architecture() -> Callable[[str], nn.Module]:
    """A random model of an architecture in ``ARCHITECTURES``, its predictions far from uniform."""

    @cache
    def build(name: str) -> nn.Module:
        config = {**SHAPE, **ARCHITECTURES[name], "model_type": name}
        model_class, args_class = _get_classes(config)
        mx.random.seed(0)
        model = model_class(args_class.from_dict(config))
        model.update(tree_map(lambda x: 2 * x if x.ndim > 1 else x, model.parameters()))
        model.eval()
        mx.eval(model.parameters())
        return model

    return build
