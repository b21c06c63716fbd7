"""Presets: each loads, resolves and says at its head what it needs."""

from __future__ import annotations

import re

import pytest

from base_setup.memory_estimate import GB, predict
from config.loader import load_config
from config.ppo_config import PPOConfig
from config.preset_files import preset_header, preset_names
from ppo_trainer.algorithms import ALGORITHMS, find_algorithm
from ppo_trainer.resolution import resolve_config
from rewards.composition import RewardSet

#: config.json of the models that presets name, as far as memory depends on it.
QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "num_key_value_heads": 8, "head_dim": 128}
MODELS = {
    "Qwen/Qwen3-0.6B-Base": QWEN
    | {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "intermediate_size": 3072},
    "Qwen/Qwen3-4B-Base": QWEN
    | {"model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "intermediate_size": 9728},
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN
    | {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960},
}


def test_there_is_one_for_each_algorithm_and_system_and_size() -> None:
    names = preset_names()
    assert set(ALGORITHMS) <= set(names)
    assert {"smoke_test", "small", "standard", "large", "mlx_grpo", "mlx_rl_trainer", "mlx_rlhf"} <= set(
        names
    )
    assert {
        f"mlx_grpo_gsm8k{v}" for v in ("", "_smoke_test", "_prod", "_medium", "_nanochat", "_nanochat_d32")
    } <= set(names)


@pytest.mark.parametrize("name", preset_names())
def test_it_loads_resolves_and_is_headed(name: str) -> None:
    loaded = load_config(PPOConfig, preset=name, environ={})
    algorithm = find_algorithm(loaded.config.algorithm)
    config = resolve_config(loaded.config, algorithm)
    if name in ALGORITHMS:
        assert config.algorithm == name
    if config.rewards is not None:
        RewardSet.build(config.rewards)
    head = preset_header(name)
    assert head.startswith(f"{name}: ")
    assert "Expect" in head
    assert "inutes" in head
    stated = re.search(r"Memory: ([\d.]+) GB at the peak of a run on a Mac with (\S+)", head)
    if stated is not None:
        estimate = predict(MODELS[stated[2]], config, critic=algorithm.needs_critic, device="metal")
        assert estimate.peak / GB == pytest.approx(float(stated[1]), abs=0.06)
        if config.max_memory_gb is not None:
            assert estimate.peak / GB <= config.max_memory_gb
