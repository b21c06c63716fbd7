"""Files of mlx-rlhf as adapter folders: the arithmetic is its own, by hand."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import main
from base_setup.soft_prompt import soft_prompt_of
from config.errors import CheckpointError
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, save_language_model
from tools.loading import adapter_folder, load_for_use
from tools.older_adapters import convert_adapter

IDS = mx.array([[5, 9, 2, 40, 7]])


@pytest.fixture
def base(tiny: LanguageModel, tmp_path: Path) -> str:
    save_language_model(tiny, tmp_path / "base")
    return str(tmp_path / "base")


def factors(rank: int = 3) -> dict[str, np.ndarray]:
    """What ``sft.py`` saves after LoRA on the queries and values of the last block (32 → 32, 32 → 16)."""
    random = np.random.default_rng(0)
    found = {"value_head.weight": random.normal(size=(1, 32)), "value_head.bias": np.zeros(1)}
    for name, width in (("q_proj", 32), ("v_proj", 16)):
        path = f"model.layers.1.self_attn.{name}"
        found[f"{path}.lora_a"] = random.normal(size=(32, rank), scale=0.3)
        found[f"{path}.lora_b"] = random.normal(size=(rank, width), scale=0.3)
    return {key: array.astype(np.float32) for key, array in found.items()}


def test_low_rank_factors_add_ten_times_their_product(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = factors()
    np.savez(tmp_path / "peft_weights.npz", **arrays)
    words = ["convert", "--hf-path", base, "--adapter-file", str(tmp_path / "peft_weights.npz")]
    assert main.main([*words, "--mlx-path", str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    assert "lora adapter with 4 arrays" in said
    assert "left out: value_head.bias, value_head.weight" in said
    plain, _ = mlx_lm.load(base)
    for name in ("q_proj", "v_proj"):
        layer = plain.model.layers[1].self_attn[name]
        a, b = (arrays[f"model.layers.1.self_attn.{name}.{leaf}"] for leaf in ("lora_a", "lora_b"))
        layer.weight = mx.array(np.array(layer.weight) + 10 * (a @ b).T)
    expected = np.array(plain(IDS))
    adapted, _ = mlx_lm.load(base, adapter_path=str(tmp_path / "adapter"))  # by mlx-lm alone, too
    for model in (adapted, load_for_use(base, str(tmp_path / "adapter")).model):
        np.testing.assert_allclose(np.array(model(IDS)), expected, atol=1e-4)
    assert not np.allclose(expected, np.array(mlx_lm.load(base)[0](IDS)), atol=1e-2)


def test_prompt_vectors_stand_before_every_prompt(
    base: str, tmp_path: Path, make_config: Callable[..., Any]
) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    arrays = {"prompts.weight": rows, "model.value_head.weight": np.zeros((1, 32), np.float32)}
    np.savez(tmp_path / "prompts.npz", **arrays)
    assert "soft_prompt adapter" in convert_adapter(tmp_path / "prompts.npz", base, tmp_path / "adapter")
    loaded = load_for_use(base, str(tmp_path / "adapter"))
    assert np.array_equal(np.array(soft_prompt_of(loaded.model)), rows)
    config = make_config(model_name=base, adapter_path=str(tmp_path / "adapter"))
    assert np.array_equal(np.array(soft_prompt_of(PolicyModel(loaded, config).model)), rows)


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_what_is_no_such_file_is_refused_and_nothing_in_it_runs(base: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "a.npz"
    path = "model.layers.1.self_attn.q_proj"

    def refused(match: str, target: str = "out", **options: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            convert_adapter(file, base, tmp_path / target, **options)
        assert not (tmp_path / target).exists()
        assert not marker.exists()

    refused("there is no file")
    file.write_bytes(pickle.dumps(_Runs(marker)))
    refused("cannot be read")
    np.savez(file, x=np.array([_Runs(marker)], dtype=object))
    refused("cannot be read .* an .npz file of plain arrays is expected")
    np.savez(file, x=np.arange(3))
    refused("x is of int64; floating numbers")
    np.savez(file, **{"model.norm.weight": np.zeros((3, 3), np.float32)})
    refused(r"model.norm.weight \(3, 3\) is no part of an adapter that mlx-rlhf writes")
    a, b = np.zeros((32, 3), np.float32), np.zeros((4, 32), np.float32)
    np.savez(file, **{f"{path}.lora_a": a, f"{path}.lora_b": b})
    refused(r"one rank is expected, found \[3, 4\]")
    np.savez(file, **{f"{path}.lora_a": a})
    refused("q_proj.lora_b is missing")
    np.savez(file, **{f"{path}.lora_a": a[:8], f"{path}.lora_b": b[:3]})
    refused(r"lora_a has shape \(8, 3\), here it is \(32, 3\)")


def test_where_a_folder_is_expected_the_sentence_says_how_to_make_one(
    base: str, tmp_path: Path, make_config: Callable[..., Any], tiny: LanguageModel
) -> None:
    np.savez(tmp_path / "a.npz", **factors())
    sentence = r"as mlx-rlhf writes adapters; python main.py convert --hf-path BASE --adapter-file .*a\.npz"
    with pytest.raises(CheckpointError, match=sentence):
        adapter_folder(str(tmp_path / "a.npz"))
    with pytest.raises(CheckpointError, match=sentence):
        PolicyModel(tiny, make_config(adapter_path=str(tmp_path / "a.npz")))
    assert main.main(["convert", "--hf-path", base, "--lora-scale", "2"]) == 2
