"""Adapters: put on, taken off, fused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from base_setup.lora_setup import adapter_layers, adapters_off, fuse_adapters
from base_setup.parameters import count_parameters, named_arrays
from base_setup.tokenizer_setup import (
    encode,
)
from models.policy_model import PolicyModel
from models.sft_model import (
    LanguageModel,
    save_language_model,
    share_weights,
)
from tests.small_models import IDS, config, logits, moved, readable


def test_a_fresh_adapter_changes_no_bit_and_trains_the_few(base: LanguageModel) -> None:
    policy = PolicyModel(base, config())
    assert np.array_equal(np.array(policy.forward(IDS).logits), logits(base.model))
    trainable, total = count_parameters(policy.model)
    assert 0 < trainable < total / 2
    assert {name.rsplit(".", 1)[1] for name in named_arrays(policy.model.trainable_parameters())} == {
        "lora_a",
        "lora_b",
    }


def test_adapters_off_is_the_base_bit_for_bit_and_only_within_the_block(base: LanguageModel) -> None:
    policy = moved(PolicyModel(base, config()))
    adapted = np.array(policy.forward(IDS).logits)
    with policy.adapters_off() as model:
        assert np.array_equal(logits(model), logits(base.model))
    assert np.array_equal(np.array(policy.forward(IDS).logits), adapted)
    assert not np.allclose(adapted, logits(base.model), atol=1e-2)
    with adapters_off(base.model) as plain:  # no adapters: nothing to switch off
        assert np.array_equal(logits(plain), logits(base.model))


def test_an_error_within_the_block_brings_the_adapters_back(base: LanguageModel) -> None:
    policy = moved(PolicyModel(base, config()))
    adapted = np.array(policy.forward(IDS).logits)
    paths = [path for path, _ in adapter_layers(policy.model)]

    def fail() -> None:
        with policy.adapters_off() as model:
            assert adapter_layers(model) == []
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path for path, _ in adapter_layers(policy.model)] == paths != []
    assert np.array_equal(np.array(policy.forward(IDS).logits), adapted)


def test_a_frozen_copy_stays_what_the_policy_was(base: LanguageModel) -> None:
    policy = moved(PolicyModel(base, config()))
    whole, bare = policy.frozen_copy(), policy.frozen_copy(with_adapter=False)
    then = np.array(policy.forward(IDS).logits)
    moved(policy)
    assert np.array_equal(logits(whole.model), then)
    assert np.array_equal(logits(bare.model), logits(base.model))
    assert named_arrays(whole.model.trainable_parameters()) == {}


def test_fusing_keeps_the_function_and_drops_the_adapters(base: LanguageModel) -> None:
    policy = moved(PolicyModel(base, config()))
    fused = fuse_adapters(share_weights(policy.model))
    np.testing.assert_allclose(logits(fused), np.array(policy.forward(IDS).logits), atol=1e-5)
    assert adapter_layers(fused) == []
    assert adapter_layers(policy.model) != []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_mlx_lm_loads_what_was_trained(base: LanguageModel, tmp_path: Path, kind: str) -> None:
    save_language_model(base, tmp_path / "base")
    policy = moved(PolicyModel(base, config(fine_tune_type=kind)))
    policy.save(tmp_path / "adapter")
    model = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapter"))[0]
    assert np.array_equal(logits(model), np.array(policy.forward(IDS).logits))


def test_full_fine_tuning_computes_and_saves_float32_whatever_the_base_is(
    base: LanguageModel, tmp_path: Path
) -> None:
    base.model.set_dtype(mx.bfloat16)
    save_language_model(base, tmp_path / "base")
    fresh = PolicyModel(base, config(fine_tune_type="full"))
    assert {x.dtype for x in named_arrays(fresh.model.parameters()).values()} == {mx.float32}
    policy = moved(fresh)
    assert {x.dtype for x in named_arrays(base.model.parameters()).values()} == {mx.bfloat16}
    assert not policy.has_adapter
    policy.save(tmp_path / "adapter")
    model = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapter"))[0]
    assert np.array_equal(logits(model), np.array(policy.forward(IDS).logits))


def test_the_commands_of_mlx_lm_take_an_adapter_as_it_is(tmp_path: Path) -> None:
    base = readable(seed=1)
    save_language_model(base, tmp_path / "base")
    policy = moved(PolicyModel(base, config()))
    policy.save(tmp_path / "adapter")
    model = ["--model", str(tmp_path / "base"), "--adapter-path", str(tmp_path / "adapter")]

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "mlx_lm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    run("fuse", *model, "--save-path", str(tmp_path / "fused"))
    fused = mlx_lm.load(str(tmp_path / "fused"))[0]
    np.testing.assert_allclose(logits(fused), np.array(policy.forward(IDS).logits), atol=1e-4)
    options = ["--prompt", "ab", "--ignore-chat-template", "--max-tokens", "12", "--temp", "0"]
    shown = run("generate", *model, *options, "--verbose", "False")

    def greedy(policy: PolicyModel) -> str:
        ids = mx.array([encode(policy.tokenizer, "ab")])
        tokens = policy.generate(ids, max_new_tokens=12, temperature=0)
        return policy.tokenizer.decode(tokens[0, 2:].tolist())

    assert shown == greedy(policy) + "\n"
    assert len(set(shown)) > 3
    assert greedy(policy) != greedy(PolicyModel(base, config()))  # the adapter has been read, not left out
