"""Adapters over a 4-bit base, as mlx-lm makes one: they train in float32, and what is packed stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.convert import convert

from base_setup.lora_setup import adapter_layers
from base_setup.parameters import named_arrays
from config.errors import InvalidConfigurationError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from config.training_config import TrainingConfig
from models.policy_model import PolicyModel
from models.sft_model import (
    LanguageModel,
    build_embedded,
    load_language_model,
    save_language_model,
    share_weights,
)
from ppo_trainer.ppo_trainer import PPOTrainer
from token_attribution.extractor import pad_sequences
from training.reward_trainer import RewardTrainer
from training.sft_trainer import SFTTrainer

SHAPE = ModelConfig(
    hidden_size=64, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=128
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with 4-bit weights in groups of 32, written by mlx-lm's own converter."""
    root = tmp_path_factory.mktemp("models")
    save_language_model(build_embedded(SHAPE, seed=1), root / "plain")
    convert(str(root / "plain"), mlx_path=str(root / "q4"), quantize=True, q_group_size=32, q_bits=4)
    return root / "q4"


@pytest.fixture
def base(folder: Path) -> LanguageModel:
    return load_language_model(TrainingConfig(model_name=str(folder)))


def dequantized(model: nn.Module) -> nn.Module:
    """The same model over plain float32 layers."""
    plain = share_weights(model)
    layers: list[tuple[str, nn.Module]] = []
    for path, layer in plain.named_modules():
        if "scales" not in layer:
            continue
        weight = mx.dequantize(layer["weight"], layer["scales"], layer["biases"], group_size=32, bits=4)
        rows, columns = weight.shape
        embedding = isinstance(layer, nn.QuantizedEmbedding)
        new = nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows, bias=False)
        new.weight = weight
        layers.append((path, new))
    plain.update_modules(tree_unflatten(layers))
    return plain


def copied(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in named_arrays(model.parameters()).items()}


def check_only_adapters_moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    assert before.keys() == after.keys()
    for name, array in after.items():
        moved = not np.array_equal(before[name], array)
        assert moved == ("lora_a" in name or "lora_b" in name), name


def test_what_trains_is_float32_and_what_is_packed_is_frozen(base: LanguageModel) -> None:
    policy = PolicyModel(base, TrainingConfig(lora_r=4))
    trainable = named_arrays(policy.model.trainable_parameters())
    assert len(trainable) == 2 * 2 * 7  # two factors, two blocks, seven linear layers
    assert {x.dtype for x in trainable.values()} == {mx.float32}
    assert all(name.endswith(("lora_a", "lora_b")) for name in trainable)
    assert len(adapter_layers(policy.model)) == 14
    packed = named_arrays(policy.model.parameters())["model.layers.0.mlp.up_proj.linear.weight"]
    assert packed.dtype == mx.uint32
    assert packed.nbytes == 128 * 64 / 2
    assert policy.trunk is not None


def test_the_gradient_is_that_of_the_dequantised_base(base: LanguageModel) -> None:
    plain = LanguageModel(dequantized(base.model), base.tokenizer, base.config, base.name)
    tokens, mask = pad_sequences([[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [10, 11]])
    gradients = []
    for one in (base, plain):
        policy = PolicyModel(one, TrainingConfig(lora_r=4, seed=3))
        generator = np.random.default_rng(0)
        for _, layer in adapter_layers(policy.model):  # away from zero, or lora_a would have no gradient
            layer.lora_b = mx.array(0.1 * generator.standard_normal(layer.lora_b.shape).astype(np.float32))

        def loss(policy: PolicyModel = policy) -> mx.array:
            return -mx.sum(policy.logprobs(tokens, mask))

        value, gradient = nn.value_and_grad(policy.model, loss)()
        gradients.append((float(value), {k: np.array(x) for k, x in named_arrays(gradient).items()}))
    (value, mine), (expected_value, expected) = gradients
    assert value == pytest.approx(expected_value, rel=1e-5)
    assert mine.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(array).max() > 0
        np.testing.assert_allclose(mine[name], array, atol=1e-4 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("bits", [32, 8])
def test_supervised_training_moves_the_adapters_alone(base: LanguageModel, bits: int) -> None:
    options: dict[str, Any] = {"lora_r": 4, "learning_rate": 1e-2, "optimizer_bits": bits, "num_steps": 30}
    trainer = SFTTrainer(base, SFTConfig(**options))
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "hello", "completion": "world"}]
    before, loss = copied(trainer.policy.model), trainer.loss(rows)
    trainer.train(rows)
    assert trainer.loss(rows) < 0.9 * loss
    check_only_adapters_moved(before, copied(trainer.policy.model))


def test_a_reward_model_trains_over_it(base: LanguageModel) -> None:
    trainer = RewardTrainer(base, RewardModelConfig(lora_r=4, learning_rate=1e-2, num_steps=10))
    rows = [
        {"prompt": "p", "chosen": "aaaa", "rejected": "zz"},
        {"prompt": "q", "chosen": "a", "rejected": "z"},
    ]
    trainer.train(rows)
    assert trainer.accuracy(rows) == 1


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_reinforcement_learning_moves_the_adapters_alone(
    folder: Path, tmp_path: Path, algorithm: str
) -> None:
    config = PPOConfig(
        model_name=str(folder),
        algorithm=algorithm,
        batch_size=2,
        group_size=4,
        max_new_tokens=6,
        lora_r=4,
        learning_rate=1e-2,
        output_dir=str(tmp_path / algorithm),
        verbose=False,
    )
    trainer = PPOTrainer(
        config, reward_model=lambda completions, **_: [float(len(set(c))) for c in completions]
    )
    before = copied(trainer.policy.model)
    trainer.train(["hello", "you"], num_epochs=3)
    check_only_adapters_moved(before, copied(trainer.policy.model))


def test_training_every_weight_of_it_is_refused(base: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigurationError, match=r'^fine_tune_type: "full" .* is quantised .* "lora"'):
        PolicyModel(base, TrainingConfig(fine_tune_type="full"))
