"""What is saved loads by mlx-lm alone, and computes what the model did."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

from base_setup.lora_setup import save_adapter
from command_line import convert as command
from config.errors import CheckpointError, InvalidConfigurationError, ModelLoadError
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, save_language_model
from tools import converting
from tools.converting import Conversion, convert
from tools.fusing import fuse
from tools.loading import load_for_use

IDS = mx.array([[5, 9, 2, 40, 7]])

FRESH = """
import sys, json, mlx_lm, mlx.core as mx
model, tokenizer = mlx_lm.load(sys.argv[1])
ids = [5, 9, 2]
for _ in range(8):
    ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
print(json.dumps(ids))
"""


def greedy(model: nn.Module, count: int = 8) -> list[int]:
    ids = [5, 9, 2]
    for _ in range(count):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    return ids


def in_a_fresh_process(folder: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", f"import base_setup.backend\n{FRESH}", str(folder)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def saved(tiny: LanguageModel, tmp_path: Path) -> Path:
    save_language_model(tiny, tmp_path / "base")
    return tmp_path / "base"


def adapter(saved: Path, folder: Path, *, dora: bool = False, scale: float = 2.0) -> tuple[Path, nn.Module]:
    """An adapter with an update that is not zero, and the model that has it."""
    model, _ = mlx_lm.load(str(saved))
    model.freeze()
    parameters = {"rank": 4, "scale": scale, "dropout": 0.0}
    mx.random.seed(3)
    linear_to_lora_layers(model, 2, parameters, use_dora=dora)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    description = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 2,
        "lora_parameters": parameters,
    }
    save_adapter(model, {**description, "model": str(saved)}, folder)
    model.eval()
    return folder, model


def test_the_command_offers_what_there_is() -> None:
    assert (command.DTYPES, command.MODES, command.RECIPES) == (
        converting.DTYPES,
        converting.MODES,
        converting.RECIPES,
    )


def test_a_converted_model_generates_the_same_in_a_fresh_process(saved: Path, tmp_path: Path) -> None:
    convert(str(saved), tmp_path / "q", Conversion(quantize=True, bits=8, group_size=32))
    model, _ = mlx_lm.load(str(tmp_path / "q"))
    assert in_a_fresh_process(tmp_path / "q") == greedy(model)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 32)
    # 8 bits: each weight is within a step, 1/255 of its group's range (MLX puts one end on the grid exactly)
    plain, packed = mlx_lm.load(str(saved))[0].model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    back = mx.dequantize(packed.weight, packed.scales, packed.biases, 32, 8)
    groups = np.array(plain.weight).reshape(-1, 32)
    step = (groups.max(1) - groups.min(1)) / 255
    assert (np.abs(np.array(back).reshape(-1, 32) - groups).max(1) <= step + 1e-7).all()


def test_there_and_back(saved: Path, tmp_path: Path) -> None:
    convert(str(saved), tmp_path / "q", Conversion(quantize=True, bits=8, group_size=32))
    convert(str(tmp_path / "q"), tmp_path / "back", Conversion(dequantize=True))
    packed, plain = (mlx_lm.load(str(tmp_path / name))[0] for name in ("q", "back"))
    assert mx.allclose(packed(IDS), plain(IDS), atol=1e-4)
    assert "quantization" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_dtype_and_end_token(saved: Path, tmp_path: Path) -> None:
    (saved / "generation_config.json").write_text('{"eos_token_id": 258}')
    convert(str(saved), tmp_path / "h", Conversion(dtype="float16", eos_token="<|endoftext|>"))
    model, tokenizer = mlx_lm.load(str(tmp_path / "h"))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == mx.float16
    assert tokenizer.eos_token_ids == {256}
    assert tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 4}, "--q-bits: 4 is given, but not --quantize"),
        ({"quantize": True, "bits": 7}, "--q-bits: one of 2, 3, 4, 5, 6, 8 is expected, found 7"),
        ({"quantize": True, "dequantize": True}, "both are given"),
        ({"quantize": True, "mode": "mxfp4", "bits": 4}, "mxfp4 has its own bits"),
        ({"dequantize": True}, "is not quantised; leave it out"),
        ({"quantize": True, "group_size": 128}, "no layer's width is a multiple of 128"),
        ({"eos_token": "nothing"}, 'the tokenizer has no token "nothing"'),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(
    saved: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        convert(str(saved), tmp_path / "out", Conversion(**options))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base"]


def test_a_missing_path_is_no_name_on_the_hub_and_a_taken_one_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r'--hf-path: there is no folder "\./nope"'):
        convert("./nope", tmp_path / "out", Conversion())
    with pytest.raises(CheckpointError, match="weights of two models must not mix"):
        convert(str(saved), saved, Conversion())


@pytest.mark.parametrize("dora", [False, True])
def test_a_fused_model_is_the_adapted_one(saved: Path, tmp_path: Path, dora: bool) -> None:
    folder, adapted = adapter(saved, tmp_path / "adapter", dora=dora)
    assert "14 " in fuse(str(saved), str(folder), tmp_path / "fused")
    model, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert mx.allclose(model(IDS), adapted(IDS), atol=1e-4)
    assert not mx.allclose(model(IDS), mlx_lm.load(str(saved))[0](IDS), atol=1e-2)
    assert in_a_fresh_process(tmp_path / "fused") == greedy(adapted)


def test_a_fused_weight_by_hand(saved: Path, tmp_path: Path) -> None:
    """W + scale · bᵀ aᵀ, in NumPy."""
    folder, adapted = adapter(saved, tmp_path / "adapter", scale=3.0)
    fuse(str(saved), str(folder), tmp_path / "fused")
    layer = adapted.model.layers[1].mlp.down_proj
    a, b, w = (np.array(x, dtype=np.float64) for x in (layer.lora_a, layer.lora_b, layer.linear.weight))
    fused = np.array(
        mx.load(str(tmp_path / "fused/model.safetensors"))["model.layers.1.mlp.down_proj.weight"]
    )
    np.testing.assert_allclose(fused, w + 3.0 * (a @ b).T, atol=1e-6)


def test_a_quantised_base_stays_packed_unless_asked(saved: Path, tmp_path: Path) -> None:
    convert(str(saved), tmp_path / "q", Conversion(quantize=True, bits=8, group_size=32))
    folder, _ = adapter(saved, tmp_path / "adapter")
    fuse(str(tmp_path / "q"), str(folder), tmp_path / "packed")
    fuse(str(tmp_path / "q"), str(folder), tmp_path / "plain", de_quantize=True)
    exact = load_for_use(str(tmp_path / "q"), str(folder)).model(IDS)
    packed, plain = (mlx_lm.load(str(tmp_path / name))[0] for name in ("packed", "plain"))
    assert isinstance(packed.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert mx.allclose(plain(IDS), exact, atol=1e-4)
    assert mx.allclose(packed(IDS), exact, atol=0.1)


@pytest.mark.parametrize(
    "options", [{"fine_tune_type": "soft_prompt"}, {"soft_prompt_tokens": 2}], ids=["alone", "with lora"]
)
def test_a_soft_prompt_is_refused_with_its_reason(
    saved: Path,
    tmp_path: Path,
    tiny: LanguageModel,
    make_config: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    PolicyModel(tiny, make_config(**options)).save(tmp_path / "adapter")
    with pytest.raises(
        InvalidConfigurationError, match=r"has a soft prompt, and vectors .* no part of any weight"
    ):
        fuse(str(saved), str(tmp_path / "adapter"), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_gguf_where_mlx_lm_writes_it(
    saved: Path, tmp_path: Path, tiny: LanguageModel, architecture: Callable[[str], nn.Module]
) -> None:
    folder, _ = adapter(saved, tmp_path / "adapter")
    with pytest.raises(
        InvalidConfigurationError,
        match="mlx-lm writes GGUF for llama, mistral, mixtral, and this model is qwen3",
    ):
        fuse(str(saved), str(folder), tmp_path / "fused", gguf="m.gguf")
    assert not (tmp_path / "fused").exists()
