"""A base quantised while it is loaded: adapters train over it, and base and adapter come back together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from base_setup.parameters import named_arrays
from config.errors import InvalidConfigurationError
from models.policy_model import PolicyModel
from models.sft_model import load_language_model, save_language_model

IDS = mx.array([[72, 101, 108, 108, 111]])
FORMATS = [(bits, "affine") for bits in (2, 3, 4, 5, 6, 8)] + [(4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4")]


def options(bits: int, mode: str) -> dict[str, Any]:
    group = {"quantize_group_size": 32} if mode == "affine" else {}
    return {"quantize_base": bits, "quantize_mode": mode, **group}


@pytest.mark.parametrize(("bits", "mode"), FORMATS)
def test_adapters_train_over_it_and_come_back_in_mlx_lm(
    make_config: Callable[..., Any], tmp_path: Path, bits: int, mode: str
) -> None:
    config = make_config(**options(bits, mode))
    base = load_language_model(config)
    plain = load_language_model(make_config())
    layer, weight = (b.model.model.layers[0].self_attn.q_proj for b in (base, plain))
    packed = {k: layer[k] for k in ("scales", "biases") if k in layer}
    values = mx.dequantize(layer.weight, **packed, group_size=layer.group_size, bits=bits, mode=mode)
    # One step of evenly spaced numbers over a group's range; of floats the widest gap, or what is cut off.
    bound = {"affine": 2 / (2**bits - 1), "mxfp8": 1 / 8}.get(mode, 1 / 2) * float(
        mx.abs(weight.weight).max()
    )
    assert 0 < float(mx.abs(values - weight.weight).max()) <= bound
    policy = PolicyModel(base, config)
    before = np.array(policy.forward(IDS).logits)
    with policy.adapters_off():
        assert np.array_equal(np.array(policy.forward(IDS).logits), before)
    gradient = nn.value_and_grad(policy.model, lambda: mx.sum(mx.sin(9 * policy.model(IDS))))()[1]
    moved = {
        name: x - 0.5 * mx.sign(named_arrays(gradient)[name])
        for name, x in named_arrays(policy.model.trainable_parameters()).items()
    }
    policy.model.load_weights(list(moved.items()), strict=False)
    after = np.array(policy.forward(IDS).logits)
    assert np.isfinite(after).all()
    assert not np.allclose(after, before, atol=1e-3)
    with policy.adapters_off():
        assert np.array_equal(np.array(policy.forward(IDS).logits), before)
    assert base.is_altered
    save_language_model(base, tmp_path / "base")
    policy.save(tmp_path)
    model = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path))[0]
    assert np.array_equal(np.array(model(IDS)), np.array(policy.model(IDS)))
    again = load_language_model(config.replace(model_name=str(tmp_path / "base")))  # so already: left alone
    assert not again.is_altered


@pytest.mark.parametrize("bits", [3, 4])
def test_dora_goes_where_mlx_lm_has_it(make_config: Callable[..., Any], bits: int) -> None:
    config = make_config(fine_tune_type="dora", **options(bits, "affine"))
    base = load_language_model(config)
    if bits == 4:
        policy = PolicyModel(base, config)
        np.testing.assert_allclose(np.array(policy.model(IDS)), np.array(base.model(IDS)), atol=1e-6)
        return
    with pytest.raises(
        InvalidConfigurationError, match=r"quantised to 3 bits, and mlx-lm has DoRA for .* 2, 4 and 8"
    ):
        PolicyModel(base, config)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"quantize_mode": "mxfp4"}, "mxfp4 is 4 bits in groups of 32, found quantize_base = None"),
        (
            {"quantize_mode": "nvfp4", "quantize_base": 8},
            "nvfp4 is 4 bits in groups of 16, found quantize_base = 8",
        ),
        ({"quantize_base": 4, "fine_tune_type": "full"}, "quantize_base: with fine_tune_type = full"),
        ({"quantize_base": 4, "quantize_group_size": 16}, "16 is for quantize_mode = nvfp4"),
        (
            {"quantize_base": 4, "quantize_group_size": 128},
            r"multiple of 128 \(there are 32, 64\); choose a smaller",
        ),
    ],
)
def test_what_cannot_be_quantised_so_is_refused(
    make_config: Callable[..., Any], given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        load_language_model(make_config(**given))


def test_a_base_quantised_in_another_way_and_whole_modules_of_it_are_refused(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    save_language_model(load_language_model(make_config(**options(4, "affine"))), tmp_path)
    config = make_config(model_name=str(tmp_path), **options(8, "affine"))
    with pytest.raises(InvalidConfigurationError, match="quantised already, to 4 bits in groups of 32"):
        load_language_model(config)
    base = load_language_model(make_config(model_name=str(tmp_path)))
    with pytest.raises(InvalidConfigurationError, match="embed_tokens is quantised, and packed weights"):
        PolicyModel(base, make_config(modules_to_save=["embed_tokens"]))
