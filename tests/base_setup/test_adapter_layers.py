"""Which layers get adapters, of which kind, and that each kind has its base underneath and its place on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_adapters

from base_setup.lora_setup import (
    adapter_layers,
    adapters_off,
    fuse_adapters,
    load_adapter,
    prepare_trainable,
    save_adapter,
    strip_adapters,
)
from base_setup.parameters import count_parameters, named_arrays
from config.errors import CheckpointError, InvalidConfigurationError
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, save_language_model, share_weights
from token_attribution.trunk import find_trunk

IDS = mx.array([[5, 9, 2, 40, 8]])
#: Every kind that is low-rank, and what is special about it.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"fine_tune_type": "dora"},
    "rank-stabilised": {"lora_rslora": True},
    "some modules": {"lora_modules": ["q_proj", "v_proj"]},
    "some blocks": {"lora_blocks": "0"},
    "the last block": {"lora_layers": 1},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "whole modules and dora": {"fine_tune_type": "dora", "modules_to_save": ["embed_tokens"]},
}
DENSE_AND_EXPERTS = ("llama", "mixtral")


def prepared(model: nn.Module, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A copy with every trainable number moved, as after training, and its description."""
    copy = share_weights(model)
    description = prepare_trainable(copy, config)
    copy.eval()
    random = np.random.default_rng(0)
    moved = {
        name: x + mx.array(0.1 * random.normal(size=x.shape).astype(np.float32))
        for name, x in named_arrays(copy.trainable_parameters()).items()
    }
    copy.load_weights(list(moved.items()), strict=False)
    return copy, description


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(IDS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DENSE_AND_EXPERTS)
def test_the_base_is_underneath_to_the_last_bit(
    architecture: Callable[[str], nn.Module], make_config: Callable[..., Any], name: str, kind: str
) -> None:
    model = architecture(name)
    before = logits(model)
    adapted, _ = prepared(model, make_config(**KINDS[kind]))
    after, trains = logits(adapted), named_arrays(adapted.trainable_parameters()).keys()
    assert not np.allclose(after, before, atol=1e-2)
    with adapters_off(adapted) as bare:
        assert np.array_equal(logits(bare), before)
        assert adapter_layers(bare) == []
    assert np.array_equal(logits(adapted), after)
    assert named_arrays(adapted.trainable_parameters()).keys() == trains
    copy = share_weights(adapted)
    assert np.array_equal(logits(strip_adapters(copy)), before)
    assert np.array_equal(logits(adapted), after)
    assert np.array_equal(logits(model), before)
    fused = fuse_adapters(share_weights(adapted))
    np.testing.assert_allclose(logits(fused), after, atol=2e-5 * np.abs(after).max())
    assert {*named_arrays(fused.parameters())} == {*named_arrays(model.parameters())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DENSE_AND_EXPERTS)
def test_what_is_saved_loads_here_and_in_mlx_lm_where_that_knows_it(
    architecture: Callable[[str], nn.Module],
    make_config: Callable[..., Any],
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    model = architecture(name)
    adapted, description = prepared(model, make_config(**KINDS[kind]))
    save_adapter(adapted, description, tmp_path)
    again = share_weights(model)
    assert load_adapter(again, tmp_path) == description
    assert np.array_equal(logits(again.eval()), logits(adapted))
    theirs = share_weights(model)
    if "modules_to_save" in KINDS[kind]:  # refused, rather than read in half
        with pytest.raises(ValueError, match="not an adapter parameter in the model"):
            load_adapters(theirs, str(tmp_path))
    else:
        assert np.array_equal(logits(load_adapters(theirs, str(tmp_path)).eval()), logits(adapted))


@pytest.mark.parametrize("kind", ["dora", "whole modules and dora", "whole modules"])
@pytest.mark.parametrize("name", DENSE_AND_EXPERTS)
def test_checkpointing_changes_no_gradient(
    architecture: Callable[[str], nn.Module], make_config: Callable[..., Any], name: str, kind: str
) -> None:
    adapted, _ = prepared(architecture(name), make_config(**KINDS[kind], lora_dropout=0.0))

    def gradient(checkpoint: bool) -> dict[str, mx.array]:
        trunk = find_trunk(adapted, checkpoint=checkpoint)
        assert trunk is not None
        loss = lambda: mx.sum(mx.sin(3 * trunk.head(trunk.hidden(IDS))))  # noqa: E731
        return named_arrays(nn.value_and_grad(adapted, loss)()[1])

    plain, forgetful = gradient(False), gradient(True)
    assert plain.keys() == forgetful.keys() == named_arrays(adapted.trainable_parameters()).keys()
    for which, exact in plain.items():
        size = max(float(mx.abs(exact).max()), 1e-3)
        np.testing.assert_allclose(
            np.array(forgetful[which]), np.array(exact), atol=2e-5 * size, err_msg=which
        )
    assert sum(bool(mx.any(g)) for g in plain.values()) > 3


def test_lora_is_its_papers_formula(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    """y = W x + (α / r) Bᵀ Aᵀ x, α 8 and r 4, in NumPy; embeddings and experts go by the same factors."""
    adapted, _ = prepared(tiny.model, make_config(lora_r=4, lora_alpha=8))
    layer = adapted.model.layers[1].mlp.down_proj  # 64 → 32: no square that a transposition would fit
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    a, b, w = (np.array(v) for v in (layer.lora_a, layer.lora_b, layer.linear.weight))
    assert (a.shape, b.shape) == ((64, 4), (4, 32))
    np.testing.assert_allclose(np.array(layer(mx.array(x))), x @ w.T + 2 * x @ a @ b, atol=1e-5)


def test_dora_begins_as_the_base(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    fresh = PolicyModel(tiny, make_config(fine_tune_type="dora")).model
    np.testing.assert_allclose(logits(fresh), logits(tiny.model), atol=1e-6)
    layer = fresh.model.layers[0].mlp.up_proj
    lengths = np.linalg.norm(np.array(layer.linear.weight, dtype=np.float64), axis=1)
    np.testing.assert_allclose(np.array(layer.m), lengths, rtol=1e-5)


def test_dora_is_its_papers_formula(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    """W' = m · (W + s·(A·B)ᵀ) / ‖W + s·(A·B)ᵀ‖ by rows, in NumPy."""
    adapted, description = prepared(tiny.model, make_config(fine_tune_type="dora"))
    layer = adapted.model.layers[0].self_attn.q_proj
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    a, b, m, w = (np.array(v) for v in (layer.lora_a, layer.lora_b, layer.m, layer.linear.weight))
    direction = w + description["lora_parameters"]["scale"] * (a @ b).T
    weight = m[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(layer(mx.array(x))), x @ weight.T, atol=1e-5)


def test_the_scale_is_alpha_over_r_or_over_its_root(make_config: Callable[..., Any]) -> None:
    assert make_config(lora_r=16, lora_alpha=8).lora_scale == 0.5
    assert make_config(lora_r=16, lora_alpha=8, lora_rslora=True).lora_scale == 2.0


def test_layers_are_chosen_by_name_and_by_number(
    architecture: Callable[[str], nn.Module], make_config: Callable[..., Any]
) -> None:
    def adapted(name: str = "llama", **options: Any) -> set[str]:
        model = share_weights(architecture(name))
        prepare_trainable(model, make_config(**options))
        return {path.removeprefix("model.layers.") for path, _ in adapter_layers(model)}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    dense = {f"self_attn.{p}" for p in attention} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert adapted() == {f"{block}.{name}" for block in (0, 1) for name in dense}
    assert adapted(lora_layers=1) == adapted(lora_blocks="1") == {f"1.{name}" for name in dense}
    assert adapted(lora_blocks="0") == {f"0.{name}" for name in dense}
    assert adapted(lora_blocks="0", lora_modules=["self_attn"]) == {f"0.self_attn.{p}" for p in attention}
    assert adapted(lora_layers=1, lora_modules=["down_proj", "lm_head"]) == {"1.mlp.down_proj", "lm_head"}
    assert adapted(modules_to_save=["layers.0.mlp"]) == adapted() - {
        f"0.mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    experts = adapted("mixtral", lora_blocks="0")
    kept = adapted("mixtral", lora_blocks="0", fine_tune_type="dora")
    assert {name.rsplit(".", 1)[0] for name in experts - kept} == {"0.block_sparse_moe.switch_mlp"}
    assert {name.rsplit(".", 1)[-1] for name in kept} == attention | {"gate"}


def test_modules_train_whole_in_float32_over_a_base_in_16_bits(
    architecture: Callable[[str], nn.Module], make_config: Callable[..., Any]
) -> None:
    model = share_weights(architecture("llama"))
    model.set_dtype(mx.bfloat16)
    before = np.array(model(IDS).astype(mx.float32))
    adapted, description = prepared(model, make_config(modules_to_save=["lm_head"]))
    assert description["modules_to_save"] == ["lm_head"]
    assert adapted.lm_head.weight.dtype == mx.float32
    with adapters_off(adapted) as bare:
        assert bare.lm_head.weight.dtype == mx.bfloat16
        assert np.array_equal(np.array(bare(IDS).astype(mx.float32)), before)


def test_how_much_trains_is_counted(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    """Width 32, rank 4, two blocks: q 32→32, k and v 32→16, o 32→32, gate and up 32→64, down 64→32."""
    whole = sum(x.size for x in named_arrays(tiny.model.parameters()).values())
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    low_rank, magnitudes = (2 * sum(4 * (i + o) for i, o in shapes), 2 * sum(o for _, o in shapes))

    def counted(**options: Any) -> tuple[int, int]:
        return count_parameters(PolicyModel(tiny, make_config(**options)).model)

    assert counted() == (low_rank, whole + low_rank)
    assert counted(fine_tune_type="dora")[0] == low_rank + magnitudes
    assert counted(fine_tune_type="soft_prompt", soft_prompt_tokens=3) == (3 * 32, whole + 3 * 32)
    assert counted(modules_to_save=["norm"])[0] == low_rank + 32
    assert counted(fine_tune_type="full") == (whole, whole)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"lora_modules": ["q_prj"]},
            r'no layer "q_prj"; did you mean "q_proj"\? there are|did you mean "q_proj"',
        ),
        ({"lora_blocks": "1-2"}, "names block 2, and the model's 2 blocks are numbered 0 to 1"),
        ({"lora_layers": 3}, "3 is more than the model's 2 blocks"),
        ({"modules_to_save": ["lm_head"]}, "its head is the embedding: name that"),
        ({"modules_to_save": ["nrm"]}, 'no module "nrm"; did you mean "norm"'),
        ({"modules_to_save": ["rope"]}, "rope has no weights; leave it out"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    tiny: LanguageModel, make_config: Callable[..., Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        PolicyModel(tiny, make_config(**options))


def test_a_folder_that_lacks_a_part_is_refused(
    tiny: LanguageModel, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    policy = PolicyModel(tiny, make_config(soft_prompt_tokens=2, modules_to_save=["norm"]))
    policy.save(tmp_path)
    whole = named_arrays(mx.load(str(tmp_path / "adapters.safetensors")))
    mx.eval(whole)
    for missing in ("model.soft_prompt", "model.norm.weight", "model.layers.0.self_attn.q_proj.lora_a"):
        part = {name: x for name, x in whole.items() if name != missing}
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), part)
        with pytest.raises(CheckpointError, match=r"does not fit the model .* is missing"):
            PolicyModel(tiny, make_config(adapter_path=str(tmp_path)))


def test_a_fresh_process_reads_dora_by_mlx_lm_alone(
    tiny: LanguageModel, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    save_language_model(tiny, tmp_path / "base")
    adapted, description = prepared(tiny.model, make_config(fine_tune_type="dora", lora_blocks="1"))
    save_adapter(adapted, description, tmp_path / "adapter")
    model = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapter"))[0]
    assert np.array_equal(logits(model), logits(adapted))
