"""Models made on the spot, and weights that are shared."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx.utils import tree_map

from base_setup.parameters import named_arrays
from config.training_config import TrainingConfig
from models.sft_model import (
    LanguageModel,
    build_embedded,
    load_language_model,
    save_language_model,
    share_weights,
)
from tests.small_models import IDS, SMALL, logits, numbers


def test_an_embedded_model_is_a_function_of_its_seed_alone() -> None:
    mx.random.seed(0)
    first = logits(build_embedded(SMALL, seed=1).model)
    mx.random.seed(99)
    assert np.array_equal(first, logits(build_embedded(SMALL, seed=1).model))
    assert not np.array_equal(first, logits(build_embedded(SMALL, seed=2).model))


def test_a_saved_model_is_one_that_mlx_lm_loads(base: LanguageModel, tmp_path: Path) -> None:
    save_language_model(base, tmp_path / "model")
    model, tokenizer = mlx_lm.load(str(tmp_path / "model"))[:2]
    assert np.array_equal(logits(model), logits(base.model))
    assert tokenizer.encode("héllo\n") == base.tokenizer.encode("héllo\n")
    assert tokenizer.eos_token_ids == base.tokenizer.eos_token_ids
    again = load_language_model(TrainingConfig(model_name=str(tmp_path / "model")))
    assert np.array_equal(logits(again.model), logits(base.model))
    assert named_arrays(base.model.parameters())  # saving has not emptied the live model


def test_a_second_tree_shares_every_array_and_keeps_its_numbers(base: LanguageModel) -> None:
    second = share_weights(base.model)
    mine, theirs = (named_arrays(m.parameters()) for m in (base.model, second))
    assert all(mine[name] is theirs[name] for name in mine)
    before = logits(second)
    base.model.update(tree_map(lambda x: x + 1, base.model.parameters()))
    assert np.array_equal(logits(second), before)
    assert not np.array_equal(logits(base.model), before)


def test_an_optimiser_step_on_one_tree_leaves_the_other_bit_identical(base: LanguageModel) -> None:
    second = share_weights(base.model)
    before = numbers(second)
    gradient = nn.value_and_grad(base.model, lambda x: mx.sum(base.model(x)[..., 0] ** 2))(IDS)[1]
    optimizer = optim.AdamW(learning_rate=0.1)
    optimizer.update(base.model, gradient)
    mx.eval(base.model.parameters())
    after = numbers(base.model)
    assert [name for name in before if after[name] == before[name]] == []  # every array of this one moved
    assert numbers(second) == before
