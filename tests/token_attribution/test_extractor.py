"""Where a prompt ends, where an answer ends, and what padding may not do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from experience_buffer.data_structures import Prompt, Rollout
from token_attribution.extractor import completion_mask, extract, pad_sequences


def test_the_alignment_by_example() -> None:
    """Column t of the mask speaks of column t + 1 of the tokens: of the first completion token, at |prompt| - 1."""
    tokens, mask = pad_sequences([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    assert tokens.tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 0]]
    assert mask.astype(mx.int32).tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]
    assert (tokens.dtype, mask.dtype) == (mx.int32, mx.bool_)
    sampled = [[token for token, m in zip(t[1:], row, strict=True) if m] for t, row in
               zip(tokens.tolist(), mask.tolist(), strict=True)]  # fmt: skip
    assert sampled == [[5, 6], [7, 8, 9]]


def test_rows_without_a_completion_and_no_rows_at_all_have_nothing_to_predict() -> None:
    tokens, mask = pad_sequences([[1], [2]], [[], []])
    assert (tokens.tolist(), mask.tolist()) == ([[1, 0], [2, 0]], [[False], [False]])
    tokens, mask = pad_sequences([[1, 2, 3], [4]], [[], [5]])
    assert mask.tolist() == [[False, False], [True, False]]
    tokens, mask = pad_sequences([], [])
    assert (tokens.shape, mask.shape) == ((0, 2), (0, 1))


@pytest.mark.parametrize(
    ("prompts", "completions", "sentence"),
    [
        ([[1]], [[2], [3]], "1 prompts but 2 completions"),
        ([[1], []], [[2], [3]], "an empty prompt has no position"),
    ],
)
def test_what_cannot_be_aligned_is_refused(
    prompts: list[list[int]], completions: list[list[int]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        pad_sequences(prompts, completions)


def test_a_rollouts_logprobs_stand_under_their_own_tokens() -> None:
    rollouts = [
        Rollout(Prompt(0, "abc", (1, 2, 3)), 0, (5, 0), (-0.5, -0.25), True, "x"),
        Rollout(Prompt(1, "d", (4,)), 0, (7, 8, 9), (-1.0, -2.0, -3.0), False, "y"),
    ]
    batch = extract(rollouts)
    assert batch.tokens.tolist() == [[1, 2, 3, 5, 0], [4, 7, 8, 9, 0]]  # an id 0 that was sampled counts
    assert batch.mask.astype(mx.int32).tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]
    assert batch.sampler_logprobs.tolist() == [[0, 0, -0.5, -0.25], [-1.0, -2.0, -3.0, 0]]


def test_the_end_token_counts_and_nothing_after_it_does() -> None:
    ids = mx.array([[3, 9, 4, 9], [9, 3, 3, 3], [3, 4, 5, 6], [3, 4, 5, 9]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert completion_mask(ids, [9]).astype(mx.int32).tolist() == expected


def test_it_makes_no_difference_that_the_padding_is_an_end_token() -> None:
    """Padding 9 = end: the first 9 was sampled, the others were not. An end in the last slot is no cut-off."""
    assert completion_mask(mx.array([[3, 9, 9, 9]]), {9}).tolist() == [[True, True, False, False]]
    assert completion_mask(mx.array([[3, 4, 5, 9]]), {9}).tolist() == [[True] * 4]
    assert completion_mask(mx.array([[9, 9, 9, 9]]), {9}).tolist() == [[True, False, False, False]]


def test_any_of_several_end_tokens_ends_and_without_one_nothing_does() -> None:
    ids = mx.array([[3, 8, 4, 9]])
    assert completion_mask(ids, (8, 9)).tolist() == [[True, True, False, False]]
    assert completion_mask(ids, iter([9])).tolist() == [[True] * 4]
    assert completion_mask(ids, []).tolist() == [[True] * 4]
    with pytest.raises(ValueError, match=r"ids must be \(B, C\)"):
        completion_mask(mx.array([3, 9]), [9])


def test_both_ways_of_making_a_mask_agree() -> None:
    """The completions' own mask, moved to where the prompts end, is the mask of the whole rows."""
    generator = np.random.default_rng(0)
    completions = generator.integers(5, 10, size=(20, 8))
    within = np.array(completion_mask(mx.array(completions), [9]))
    prompts = [[1] * int(n) for n in generator.integers(1, 6, size=20)]
    cut = [row[m].tolist() for row, m in zip(completions, within, strict=True)]
    _, mask = pad_sequences(prompts, cut)
    for row, (prompt, m) in enumerate(zip(prompts, within, strict=True)):
        start = len(prompt) - 1
        assert np.array(mask)[row, start : start + m.sum()].all()
        assert int(mx.sum(mask[row])) == m.sum()
