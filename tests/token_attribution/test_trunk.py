"""Who owns the weights of the vocabulary head."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.lora import LoRALinear

from models.sft_model import share_weights
from token_attribution.trunk import Trunk, find_trunk

IDS = mx.array([[3, 1, 4]])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt2", "mixtral", "gemma3_text", "lfm2"])
def test_the_head_module_owns_all_that_the_head_computes_with(
    architecture: Callable[[str], nn.Module], name: str
) -> None:
    model = share_weights(architecture(name))
    trunk = find_trunk(model)
    assert trunk is not None
    assert trunk.head_module is not None
    states = trunk.hidden(IDS)
    before = np.array(trunk.head(states))
    trunk.head_module().update(tree_map(lambda x: 2 * x, trunk.head_module().parameters()))
    assert before.any()
    assert np.array_equal(np.array(trunk.head(states)), 2 * before)


def test_an_adapter_that_comes_later_is_the_head_module(architecture: Callable[[str], nn.Module]) -> None:
    model = share_weights(architecture("llama"))
    trunk = find_trunk(model)
    assert trunk is not None
    assert trunk.head_module is not None
    assert trunk.head_module() is model.lm_head
    model.lm_head = LoRALinear.from_base(model.lm_head, r=2)
    assert trunk.head_module() is model.lm_head
    assert "lora_a" in trunk.head_module()


def test_two_halves_are_enough_to_make_one() -> None:
    assert Trunk(lambda tokens: tokens, lambda states: states).head_module is None
