"""The logprobs of sampled tokens under a whole model, against every position through the head in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from base_setup.lora_setup import prepare_trainable
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, share_weights
from token_attribution.extractor import pad_sequences
from token_attribution.logprob_computer import token_logprobs, token_statistics
from token_attribution.trunk import find_trunk

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
COMPLETIONS = [[7, 8, 9, 10, 3, 2], [2, 5], [1]]
#: Which of them show trunk and head; the others transform the logits, or keep their trunk elsewhere.
VISIBLE = {
    "llama": True,
    "qwen2": True,
    "gemma": True,
    "gemma2": False,
    "gpt2": True,
    "mixtral": True,
    "gemma3_text": True,
    "mamba2": False,
    "lfm2": True,
}


def log_softmax(logits: mx.array, temperature: float) -> np.ndarray:
    z = np.array(logits.astype(mx.float32)).astype(np.float64) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def row_by_row(model: nn.Module, temperature: float) -> list[list[float]]:
    """Each row alone, without padding: the logprob of token n is read at position n - 1."""
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logp = log_softmax(model(mx.array([[*prompt, *completion]])), temperature)[0]
        rows.append([logp[len(prompt) + i - 1, token] for i, token in enumerate(completion)])
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", VISIBLE)
def test_they_are_the_full_softmax_of_each_row_alone_whatever_the_architecture(
    architecture: Callable[[str], nn.Module], name: str, temperature: float
) -> None:
    model = architecture(name)
    assert (find_trunk(model) is not None) == VISIBLE[name]
    tokens, mask = pad_sequences(PROMPTS, COMPLETIONS)
    ours, sampled = np.array(token_logprobs(model, tokens, mask, temperature)), np.array(mask)
    for row, expected in enumerate(row_by_row(model, temperature)):
        assert min(expected) < -1  # nothing here is near 0 by accident
        np.testing.assert_allclose(ours[row][sampled[row]], expected, atol=1e-4)
    assert not ours[~sampled].any()


def test_with_and_without_a_visible_trunk_they_are_the_same(tiny: LanguageModel) -> None:
    tokens, mask = pad_sequences(PROMPTS, COMPLETIONS)
    seen = token_statistics(tiny.model, tokens, mask, 0.7)
    hidden = token_statistics(lambda ids: tiny.model(ids), tokens, mask, 0.7)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.array(seen.logprobs), np.array(hidden.logprobs), atol=1e-6)
    np.testing.assert_allclose(np.array(seen.entropy), np.array(hidden.entropy), atol=1e-6)
    assert np.array(seen.entropy)[np.array(mask)].min() > 1


def test_appending_tokens_changes_nothing_before_them(tiny: LanguageModel) -> None:
    short = pad_sequences([[1, 2]], [[3, 4, 5]])
    long = pad_sequences([[1, 2]], [[3, 4, 5, 6, 7]])
    ours, theirs = (np.array(token_logprobs(tiny.model, *batch)) for batch in (short, long))
    np.testing.assert_allclose(ours[0], theirs[0, :4], atol=1e-6)
    assert theirs[0, 4:].all()


def test_an_answer_depends_on_its_question(architecture: Callable[[str], nn.Module]) -> None:
    model = architecture("llama")
    ours, theirs = (token_logprobs(model, *pad_sequences([p], [[3, 4, 5]])) for p in ([1, 2], [9, 2]))
    assert float(mx.min(mx.abs(ours - theirs)[0, 1:])) > 1e-3


def garbage(tokens: mx.array, mask: mx.array) -> mx.array:
    """Other ids in the padding: everything after the last column that the mask speaks of."""
    columns = np.arange(tokens.shape[1])[None]
    last = (np.array(mask) * (columns[:, :-1] + 1)).max(axis=1, keepdims=True)
    noise = np.random.default_rng(0).integers(0, 61, size=tokens.shape)
    return mx.array(np.where(columns > last, noise, np.array(tokens)).astype(np.int32))


def test_what_stands_in_the_padding_changes_neither_value_nor_gradient(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    model = PolicyModel(tiny, make_config(fine_tune_type="full")).model
    tokens, mask = pad_sequences(PROMPTS, COMPLETIONS)
    other = garbage(tokens, mask)
    assert not mx.array_equal(tokens, other)
    loss = nn.value_and_grad(model, lambda ids: mx.sum(token_logprobs(model, ids, mask, 0.7)))
    (value, gradient), (again, same) = loss(tokens), loss(other)
    assert float(value) == pytest.approx(float(again), abs=1e-5)
    size = max(float(mx.max(mx.abs(g))) for _, g in tree_flatten(gradient))
    for (name, g), (_, h) in zip(tree_flatten(gradient), tree_flatten(same), strict=True):
        assert float(mx.max(mx.abs(g - h))) < 1e-5 * size, name


def test_a_token_that_the_mask_leaves_out_is_no_target() -> None:
    """A model whose logits are a table of its input: only rows of the table that predict a True one learn."""
    table = mx.random.normal((6, 6), key=mx.random.key(0))
    tokens, mask = mx.array([[1, 2, 3, 4, 0]]), mx.array([[False, True, True, False]])

    def total(table: mx.array) -> mx.array:
        return mx.sum(token_logprobs(lambda ids: table[ids], tokens, mask))  # type: ignore[arg-type]

    gradient = np.array(mx.grad(total)(table))
    probabilities = np.exp(log_softmax(table, 1.0))
    expected = np.zeros((6, 6))
    for seen, target in ((2, 3), (3, 4)):  # columns 1 and 2: after 2 comes 3, after 3 comes 4
        expected[seen] = np.eye(6)[target] - probabilities[seen]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert not gradient[[0, 1, 4, 5]].any()


def test_a_row_without_a_sampled_token_gives_zeros_and_no_gradient(tiny: LanguageModel) -> None:
    tokens = mx.array([[1, 2, 3]])
    nowhere = mx.array([[False, False]])
    statistics = token_statistics(tiny.model, tokens, nowhere)
    assert not np.array(statistics.logprobs).any()
    assert not np.array(statistics.entropy).any()
    some, mask = mx.array([[1, 2, 3], [4, 5, 6]]), mx.array([[False, False], [True, True]])
    ours = np.array(token_logprobs(tiny.model, some, mask))
    assert not ours[0].any()
    np.testing.assert_allclose(
        ours[1], np.array(token_logprobs(tiny.model, some[1:], mask[1:]))[0], atol=1e-5
    )


def test_adapters_that_come_after_the_trunk_was_found_are_seen(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    model, batch = share_weights(tiny.model), pad_sequences(PROMPTS, COMPLETIONS)
    trunk = find_trunk(model)
    before = np.array(token_logprobs(model, *batch, trunk=trunk))
    prepare_trainable(model, make_config(lora_dropout=0.0))
    model.update(tree_map(lambda x: x + 0.1, model.trainable_parameters()))
    after = np.array(token_logprobs(model, *batch, trunk=trunk))
    assert not np.allclose(before, after, atol=1e-2)
    assert np.array_equal(after, np.array(token_logprobs(model, *batch)))


def test_arrays_that_do_not_fit_are_refused(tiny: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, T\+1\)"):
        token_logprobs(tiny.model, mx.array([[1, 2, 3]]), mx.array([[True, True, True]]))
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        token_logprobs(tiny.model, mx.array([[1, 2]]), mx.array([[True]]), 0.0)
