"""A policy that nothing trains, and prompts for it."""

from __future__ import annotations

import pytest

from config.model_config import ModelConfig
from config.training_config import TrainingConfig
from data_loading.prepared_prompts import PreparedPrompts
from experience_buffer.data_structures import Prompt
from models.policy_model import PolicyModel
from models.sft_model import build_embedded

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(build_embedded(SMALLEST, seed=3), TrainingConfig(model_name="embedded"))


@pytest.fixture(scope="module")
def prompts(policy: PolicyModel) -> list[Prompt]:
    texts = ["a", "two words", "a", "longer than the others", "?"]
    return list(PreparedPrompts(policy.tokenizer, texts, max_prompt_length=64))
