"""Vectors in front of every prompt: a prompt of real tokens, written as vectors, must do what the tokens do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache

from base_setup.lora_setup import prepare_trainable
from base_setup.parameters import named_arrays
from base_setup.soft_prompt import (
    first_rows,
    remove_soft_prompt,
    set_soft_prompt,
    soft_prompt_of,
)
from config.errors import CheckpointError, InvalidConfigurationError
from models.decoding import complete
from models.policy_model import PolicyModel
from models.sampling import Sampling, uniforms_for
from models.sft_model import LanguageModel, save_language_model, share_weights
from models.value_model import ValueModel
from tests.conftest import ARCHITECTURES
from token_attribution import sampled_states
from token_attribution.extractor import pad_sequences
from token_attribution.logprob_computer import token_logprobs
from token_attribution.trunk import find_trunk

LEAD = [7, 3, 11]
IDS = mx.array([[5, 9, 2, 40, 8]])
#: Recurrent mamba2 has no embedding that could be seen.
PROMPTED = [name for name in ARCHITECTURES if name != "mamba2"]
#: Two groups of unlike prompts, one prompt alone, and completions of several lengths.
GROUPS = [([5, 9, 2, 40], [[8, 1, 3], [4], [6, 6]]), ([12], [[9, 9, 9, 2], [3]]), ([1, 2, 3], [[7, 8]])]


def led_by(model: nn.Module, lead: list[int] = LEAD) -> nn.Module:
    """A copy whose soft prompt says what the tokens ``lead`` would."""
    copy = share_weights(model)
    set_soft_prompt(copy, first_rows(copy, None, lead, seed=0))
    return copy


def batch(lead: list[int]) -> tuple[mx.array, mx.array]:
    prompts = [lead + prompt for prompt, group in GROUPS for _ in group]
    return pad_sequences(prompts, [completion for _, group in GROUPS for completion in group])


@pytest.mark.parametrize("name", PROMPTED)
def test_the_tokens_written_as_vectors_do_what_the_tokens_do(
    architecture: Callable[[str], nn.Module], name: str
) -> None:
    model = architecture(name)
    before = np.array(model(IDS))
    led = led_by(model)
    expected = np.array(model(mx.array([LEAD + IDS.tolist()[0]])))[:, len(LEAD) :]
    np.testing.assert_allclose(np.array(led(IDS)), expected, atol=2e-5 * np.abs(expected).max())
    assert not np.allclose(np.array(led(IDS)), before, atol=1e-2)  # every later position sees it
    assert np.array_equal(np.array(model(IDS)), before)  # and the model that it was made from does not
    remove_soft_prompt(led)
    assert np.array_equal(np.array(led(IDS)), before)
    assert type(led.model if hasattr(led, "model") else led.transformer).__module__.startswith("mlx_lm")


@pytest.mark.parametrize("checkpoint", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("shares", [True, False], ids=["prompts shared", "each row alone"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text"])
def test_logprobs_and_gradients_are_those_of_tokens_with_rows_of_their_own(
    architecture: Callable[[str], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shares: bool,
    checkpoint: bool,
) -> None:
    """The oracle is a plain model whose embedding has three more rows, and tokens that name them."""
    monkeypatch.setattr(sampled_states, "_PASS_TOKENS", {"cpu": 0, "metal": 0, "cuda": 0})
    model = architecture(name)
    rows = first_rows(model, 3, None, seed=3)
    led, plain = share_weights(model), share_weights(model)
    led.freeze()
    set_soft_prompt(led, rows)
    plain.freeze()
    embedding = plain.model.embed_tokens
    size = embedding.weight.shape[0]
    embedding.weight = mx.concatenate([embedding.weight, rows])
    embedding.unfreeze()
    trunk = find_trunk(led, checkpoint=checkpoint)
    assert trunk is not None
    assert trunk.sharing is not None
    assert trunk.sharing.ability.even
    trunk = trunk if shares else trunk._replace(sharing=None)
    weight = mx.array(np.random.default_rng(0).normal(size=batch([])[1].shape).astype(np.float32))

    def loss() -> tuple[mx.array, mx.array]:
        found = token_logprobs(led, *batch([]), 0.7, trunk=trunk)
        return mx.sum(weight * found), found

    def oracle() -> tuple[mx.array, mx.array]:
        tokens, mask = batch([size, size + 1, size + 2])
        logits = plain(tokens[:, :-1])[..., :size].astype(mx.float32) / 0.7
        found = mx.take_along_axis(logits, (tokens[:, 1:] % size)[..., None], -1)[..., 0]
        found = mx.where(mask, found - mx.logsumexp(logits, axis=-1), 0)[:, 3:]
        return mx.sum(weight * found), found

    (_, logprobs), gradient = nn.value_and_grad(led, loss)()
    (_, expected), slopes = nn.value_and_grad(plain, oracle)()
    np.testing.assert_allclose(np.array(logprobs), np.array(expected), atol=2e-5)
    [(which, found)] = named_arrays(gradient).items()
    assert which == "model.soft_prompt"
    exact = np.array(slopes["model"]["embed_tokens"]["weight"])[size:]
    assert np.abs(exact).min(axis=1).max() > 0
    np.testing.assert_allclose(np.array(found), exact, atol=2e-5 * np.abs(exact).max())


@pytest.mark.parametrize("places", [2, 9])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text", "lfm2"])
def test_rollouts_are_those_of_prompts_that_begin_with_the_tokens(
    architecture: Callable[[str], nn.Module], name: str, places: int
) -> None:
    model = architecture(name)
    prompts = [prompt for prompt, _ in GROUPS]
    rows = [0, 1, 2, 0, 1, 2, 0]
    uniforms = np.stack([uniforms_for(0, 0, row, 0, 7) for row in range(len(rows))])

    def sampled(model: nn.Module, prompts: list[list[int]]) -> list[Any]:
        return complete(
            model,
            prompts,
            rows,
            uniforms,
            end_ids=frozenset({4}),
            max_new_tokens=7,
            sampling=Sampling(),
            max_rows=places,
        )

    expected = sampled(model, [LEAD + prompt for prompt in prompts])
    for found, other in zip(sampled(led_by(model), prompts), expected, strict=True):
        assert found.ids == other.ids
        np.testing.assert_allclose(found.logprobs, other.logprobs, atol=1e-4)


def test_mlx_lm_generates_from_the_live_model(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    policy = PolicyModel(tiny, make_config(soft_prompt_text="Even:", fine_tune_type="soft_prompt"))
    prompt = [72, 101, 108]
    stream = mlx_lm.stream_generate(policy.model, tiny.tokenizer, prompt, max_tokens=6)
    tokens = [response.token for response in stream]
    expected = policy.generate(mx.array([prompt]), max_new_tokens=6, temperature=0).tolist()[0][3:]
    assert tokens[: len(expected)] == expected


def test_mlx_lm_generates_batches_and_rows_padded_on_the_left_are_refused(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    policy = PolicyModel(tiny, make_config(fine_tune_type="soft_prompt"))
    prompts = [[1, 2, 3, 9], [4], [7, 8]]
    texts = mlx_lm.batch_generate(policy.model, tiny.tokenizer, prompts, max_tokens=6).texts
    for prompt, text in zip(prompts, texts, strict=True):
        ids = policy.generate(mx.array([prompt]), max_new_tokens=6, temperature=0).tolist()[0]
        assert text == tiny.tokenizer.decode(ids[len(prompt) :])
    with pytest.raises(ValueError, match="these rows begin with padding"):
        policy.model(mx.array([[0, 1], [2, 3]]), cache=[BatchKVCache([1, 0]) for _ in range(2)])
    with pytest.raises(ValueError, match="takes token ids, not embeddings"):
        policy.model(IDS, input_embeddings=mx.zeros((1, 5, 32)))


# Beginning, saving, loading --------------------------------------------------------------------------------


def test_it_begins_as_the_text_repeated_or_cut_or_as_tokens_there_are(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    embedding = np.array(tiny.model.model.embed_tokens.weight)

    def rows(**options: Any) -> np.ndarray:
        return np.array(soft_prompt_of(PolicyModel(tiny, make_config(**options)).model))

    ids = tiny.tokenizer.encode("abc")
    assert np.array_equal(rows(soft_prompt_text="abc"), embedding[ids])
    assert np.array_equal(rows(soft_prompt_text="abc", soft_prompt_tokens=2), embedding[ids[:2]])
    assert np.array_equal(rows(soft_prompt_text="abc", soft_prompt_tokens=5), embedding[ids + ids[:2]])
    random = rows(fine_tune_type="soft_prompt")
    assert random.shape == (10, 32)
    assert all((embedding == row).all(axis=1).any() for row in random)
    assert np.array_equal(random, rows(fine_tune_type="soft_prompt"))
    assert not np.array_equal(random, rows(fine_tune_type="soft_prompt", seed=2))
    assert soft_prompt_of(PolicyModel(tiny, make_config()).model) is None


@pytest.mark.parametrize("kind", ["soft_prompt", "lora", "dora"])
def test_a_prompt_alone_or_beside_adapters_saves_loads_and_goes_back_to_the_base(
    tiny: LanguageModel, make_config: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    config = make_config(fine_tune_type=kind, soft_prompt_tokens=4)
    policy = PolicyModel(tiny, config)
    leaves = {name.rsplit(".", 1)[-1] for name in named_arrays(policy.model.trainable_parameters())}
    assert leaves == {"soft_prompt"} | {"soft_prompt": set(), "lora": {"lora_a", "lora_b"}}.get(
        kind, {"lora_a", "lora_b", "m"}
    )
    moved = {k: v + 0.1 for k, v in named_arrays(policy.model.trainable_parameters()).items()}
    policy.model.load_weights(list(moved.items()), strict=False)
    now = np.array(policy.forward(IDS).logits)
    plain = np.array(PolicyModel(tiny, make_config()).forward(IDS).logits)
    with policy.adapters_off():
        assert np.array_equal(np.array(policy.forward(IDS).logits), plain)
    assert np.array_equal(np.array(policy.forward(IDS).logits), now)
    assert named_arrays(policy.model.trainable_parameters()).keys() == moved.keys()
    bare = policy.frozen_copy(with_adapter=False)
    assert soft_prompt_of(bare.model) is None
    assert bare.trunk is not None
    assert np.array_equal(np.array(bare.trunk.head(bare.trunk.hidden(IDS))), plain)

    policy.save(tmp_path)
    again = PolicyModel(tiny, make_config(adapter_path=str(tmp_path)))
    assert np.array_equal(np.array(again.forward(IDS).logits), now)
    assert named_arrays(again.model.trainable_parameters()).keys() == moved.keys()
    restored = PolicyModel(tiny, config)
    restored.load(tmp_path)
    assert np.array_equal(np.array(restored.forward(IDS).logits), now)
    assert not policy.begins_as_base
    assert policy.has_adapter
    # mlx-lm, which knows no soft prompt, refuses the folder rather than leave the prompt out.
    save_language_model(tiny, tmp_path / "base")
    with pytest.raises((ValueError, AttributeError)):
        mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path))
    with pytest.raises(CheckpointError, match="the model has a soft prompt"):
        save_language_model(LanguageModel(policy.model, tiny.tokenizer, tiny.config, "x"), tmp_path / "no")


def test_a_critic_has_a_prompt_of_its_own(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    value = ValueModel(tiny, make_config(fine_tune_type="soft_prompt", soft_prompt_text="abc"))
    value.module.head.weight = mx.ones((1, 32))
    tokens = tiny.tokenizer.encode("abc") + IDS.tolist()[0]
    trunk = find_trunk(tiny.model)
    assert trunk is not None
    expected = np.array(trunk.hidden(mx.array([tokens]))).sum(axis=-1)[:, 3:]
    np.testing.assert_allclose(np.array(value.forward(IDS)), expected, atol=1e-4)
    assert {*named_arrays(value.module.trainable_parameters())} == {
        "model.model.soft_prompt",
        "head.weight",
        "head.bias",
    }


def test_a_base_that_came_with_one_keeps_it(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    """The result of a stage with a soft prompt is a base for the next: its own prompt is part of it."""
    base = LanguageModel(led_by(tiny.model), tiny.tokenizer, tiny.config, "x")
    before = np.array(base.model(IDS))
    for options in ({}, {"fine_tune_type": "soft_prompt"}, {"soft_prompt_tokens": 5}):
        policy = PolicyModel(base, make_config(**options))
        trains = "model.soft_prompt" in named_arrays(policy.model.trainable_parameters())
        assert trains == bool(options)
        rows = soft_prompt_of(policy.model)
        assert rows is not None
        assert rows.shape[0] == (5 if "soft_prompt_tokens" in options else 3)
        moved = {k: v + 0.1 for k, v in named_arrays(policy.model.trainable_parameters()).items()}
        policy.model.load_weights(list(moved.items()), strict=False)
        assert not np.allclose(np.array(policy.model(IDS)), before)
        assert np.array_equal(np.array(policy.frozen_copy(with_adapter=False).model(IDS)), before)
        with policy.adapters_off() as model:
            assert np.array_equal(np.array(model(IDS)), before)
        assert ("model.soft_prompt" in named_arrays(policy.model.trainable_parameters())) == trains


def test_what_cannot_be_is_refused_in_a_sentence(
    tiny: LanguageModel, make_config: Callable[..., Any], architecture: Callable[[str], nn.Module]
) -> None:
    with pytest.raises(InvalidConfigurationError, match="'' has no tokens to begin from"):
        PolicyModel(tiny, make_config(fine_tune_type="soft_prompt", soft_prompt_text=""))
    with pytest.raises(InvalidConfigurationError, match="0 leaves nothing to train"):
        make_config(fine_tune_type="soft_prompt", soft_prompt_tokens=0)
    with pytest.raises(InvalidConfigurationError, match="soft_prompt_tokens: with fine_tune_type = full"):
        make_config(fine_tune_type="full", soft_prompt_tokens=3)
    with pytest.raises(InvalidConfigurationError, match="mamba2 does not show its token embeddings"):
        prepare_trainable(share_weights(architecture("mamba2")), make_config(fine_tune_type="soft_prompt"))
    with pytest.raises(InvalidConfigurationError, match=r"\(n, 32\) are expected, found \(3, 8\)"):
        set_soft_prompt(share_weights(tiny.model), mx.zeros((3, 8)))
