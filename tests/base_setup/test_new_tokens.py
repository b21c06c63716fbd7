"""Tokens that a model did not have: known to the tokenizer, with rows of their own in embedding and head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from base_setup.new_tokens import add_tokens
from base_setup.tokenizer_setup import encode
from config.errors import InvalidConfigurationError
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, load_language_model, save_language_model, share_weights

TAGS = ["<answer>", "</answer>"]
IDS = mx.array([[72, 101, 108, 108, 111]])


def test_a_tag_is_one_token_that_begins_as_the_mean_and_stays_readable(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    base = load_language_model(make_config(new_special_tokens=TAGS))
    ids = encode(base.tokenizer, "a<answer>b</answer>")
    assert ids == [*encode(tiny.tokenizer, "a"), 259, *encode(tiny.tokenizer, "b"), 260]
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == "a<answer>b</answer>"
    old, new = (np.array(b.model.model.embed_tokens.weight) for b in (tiny, base))
    assert new.shape == (261, 32)
    assert base.config["vocab_size"] == 261
    assert np.array_equal(new[:259], old)
    np.testing.assert_allclose(new[259:], np.stack([old.mean(axis=0)] * 2), atol=1e-7)
    # The head is the embedding: old logits are what they were, and the new one is the mean of the old.
    logits, before = np.array(base.model(IDS)), np.array(tiny.model(IDS))
    np.testing.assert_allclose(logits[..., :259], before, atol=1e-6)
    np.testing.assert_allclose(logits[..., 259], before.mean(axis=-1), atol=1e-5)


def test_rows_can_be_drawn_instead(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    def rows(seed: int) -> np.ndarray:
        config = make_config(
            new_special_tokens=[f"<{i}>" for i in range(200)], init_new_embeddings_with_mean=False, seed=seed
        )
        model = load_language_model(config).model
        return np.array(model.model.embed_tokens.weight)[259:]

    assert np.array_equal(rows(1), rows(1))
    assert not np.array_equal(rows(1), rows(2))
    assert rows(1).std() == pytest.approx(0.02, rel=0.05)  # the embeddings' own spread
    assert abs(rows(1).mean()) < 1e-3


def test_a_head_of_its_own_and_rows_that_wait_are_used(
    tiny: LanguageModel, architecture: Callable[[str], nn.Module], make_config: Callable[..., Any]
) -> None:
    tokenizer = load_language_model(make_config()).tokenizer
    model = share_weights(architecture("llama"))  # 61 rows, and its head has weights of its own
    wide = mx.random.normal((270, 32), key=mx.random.key(0))
    model.model.embed_tokens.weight, model.lm_head.weight = wide, 2 * wide
    config = add_tokens(model, tokenizer, {"vocab_size": 270}, TAGS, mean=True, seed=0)
    assert config == {"vocab_size": 270}  # 259 tokens and 11 rows that none had: two of those
    for weight, factor in ((model.model.embed_tokens.weight, 1), (model.lm_head.weight, 2)):
        found, old = np.array(weight), factor * np.array(wide)
        assert np.array_equal(np.delete(found, [259, 260], axis=0), np.delete(old, [259, 260], axis=0))
        np.testing.assert_allclose(found[259:261], np.stack([old[:259].mean(axis=0)] * 2), atol=1e-6)
    assert add_tokens(model, tokenizer, config, TAGS, mean=False, seed=0) is config  # there already


def test_base_and_adapter_come_back_together(make_config: Callable[..., Any], tmp_path: Path) -> None:
    config = make_config(new_special_tokens=TAGS)
    base = load_language_model(config)
    assert base.is_altered
    policy = PolicyModel(base, config)
    policy.save(tmp_path)
    save_language_model(base, tmp_path / "base")
    model, tokenizer = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path))[:2]
    assert np.array_equal(np.array(model(IDS)), np.array(policy.model(IDS)))
    assert tokenizer.encode("<answer>") == [259]
    again = load_language_model(config.replace(model_name=str(tmp_path / "base")))
    assert not again.is_altered  # the tokens are there
    trained = PolicyModel(base, make_config(modules_to_save=["embed_tokens"])).model.trainable_parameters()
    assert trained["model"]["embed_tokens"]["weight"].shape == (261, 32)


def test_what_can_be_no_token_is_refused(make_config: Callable[..., Any]) -> None:
    with pytest.raises(InvalidConfigurationError, match="without spaces around it is expected, found ' <a>'"):
        load_language_model(make_config(new_special_tokens=[" <a>"]))
    config = make_config(new_special_tokens=["<a>"], quantize_base=4, quantize_group_size=32)
    base = load_language_model(config)  # grown first, then quantised
    with pytest.raises(InvalidConfigurationError, match="embeddings are quantised, so they cannot grow"):
        add_tokens(base.model, base.tokenizer, base.config, ["<b>"], mean=True, seed=0)
