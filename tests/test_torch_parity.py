"""The same weights in PyTorch: the logprobs of a model that transformers saved. ``./run test-torch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from base_setup.tokenizer_setup import byte_tokenizer
from config.training_config import TrainingConfig
from models.policy_model import PolicyModel
from models.sft_model import load_language_model
from token_attribution.extractor import pad_sequences
from token_attribution.logprob_computer import token_logprobs

pytestmark = pytest.mark.torch

PROMPTS = [[10, 20, 30], [7], [99, 98, 97, 96, 95]]
COMPLETIONS = [[40, 50, 258], [1, 2, 3, 4, 5, 6], [200]]


def random_qwen3(folder: Path, tied: bool) -> Any:
    """A small Qwen3 of transformers, saved to ``folder`` with a tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # large, so that the distributions are far from uniform
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    """The model, and the folder it was saved to."""
    return random_qwen3(tmp_path, request.param), tmp_path


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_a_saved_qwen3_agree_with_torch(saved: tuple[Any, Path], temperature: float) -> None:
    """Each row alone in torch, without any padding; all of them padded together here."""
    import torch

    model, folder = saved
    policy = PolicyModel(load_language_model(TrainingConfig(model_name=str(folder))), TrainingConfig())
    tokens, mask = pad_sequences(PROMPTS, COMPLETIONS)
    ours = np.array(policy.logprobs(tokens, mask, temperature))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0].float() / temperature, dim=-1)
        theirs = [float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)]
        assert np.std(logp.numpy()) > 0.5
        np.testing.assert_allclose(ours[row][np.array(mask)[row]], theirs, atol=1e-4)
    assert float(mx.max(mx.abs(mx.array(ours) * ~mask))) == 0.0


def test_a_fresh_adapter_on_a_saved_qwen3_changes_no_bit(saved: tuple[Any, Path]) -> None:
    base = load_language_model(TrainingConfig(model_name=str(saved[1])))
    policy = PolicyModel(base, TrainingConfig(lora_r=4))
    assert policy.has_adapter
    tokens, mask = pad_sequences(PROMPTS, COMPLETIONS)
    for temperature in (1.0, 0.7):
        ours = np.array(policy.logprobs(tokens, mask, temperature))
        assert np.array_equal(ours, np.array(token_logprobs(base.model, tokens, mask, temperature)))
