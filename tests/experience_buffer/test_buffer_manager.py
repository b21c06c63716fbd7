"""The experience buffer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from experience_buffer.buffer_manager import ExperienceBuffer, Minibatch
from experience_buffer.data_structures import Experience


def experience(prompt_lengths: list[int], lengths: list[int], *, extra_columns: int = 0) -> Experience:
    """Rows whose every number says which row and column it came from: row i, column t is 100 i + t."""
    width = max(p + n for p, n in zip(prompt_lengths, lengths, strict=True)) - 1 + extra_columns
    mask = np.zeros((len(lengths), width), dtype=bool)
    for row, (start, n) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        mask[row, start - 1 : start - 1 + n] = True
    names = 100 * np.arange(len(lengths))[:, None] + np.arange(width + 1)[None]
    numbers = [
        mx.array(names[:, :-1] + offset, dtype=mx.float32) for offset in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    ]
    return Experience(mx.array(names, dtype=mx.int32), mx.array(mask), *numbers)


def rows_of(minibatch: Minibatch) -> list[int]:
    return [first // 100 for part in minibatch.micro_batches for first in part.tokens[:, 0].tolist()]


@pytest.mark.parametrize(("size", "minibatch", "micro"), [(7, 3, 2), (7, None, None), (8, 4, 3), (5, 9, 1)])
def test_every_row_is_dealt_exactly_once_per_epoch(size: int, minibatch: int, micro: int) -> None:
    buffer = ExperienceBuffer(
        experience([2] * size, list(range(1, size + 1))), minibatch_size=minibatch, micro_batch_size=micro
    )
    for epoch in range(3):
        dealt = list(buffer.minibatches(0, 1, epoch))
        assert len(dealt) == buffer.minibatches_per_epoch == -(-size // min(minibatch or size, size))
        assert sorted(row for m in dealt for row in rows_of(m)) == list(range(size))
        assert max(m.n_rows for m in dealt) - min(m.n_rows for m in dealt) <= 1
        assert all(part.size <= (micro or size) for m in dealt for part in m.micro_batches)


def test_the_counts_of_a_minibatch_are_those_of_its_own_rows() -> None:
    """Row i has i + 1 sampled tokens, so a minibatch of rows R has sum(i + 1) of them."""
    buffer = ExperienceBuffer(experience([3] * 7, list(range(1, 8))), minibatch_size=3, micro_batch_size=2)
    for minibatch in buffer.minibatches(5):
        rows = rows_of(minibatch)
        assert minibatch.n_rows == len(rows)
        assert minibatch.n_tokens == sum(row + 1 for row in rows)
        assert minibatch.n_tokens == sum(int(mx.sum(part.mask)) for part in minibatch.micro_batches)


def test_the_order_is_a_function_of_the_seed_and_differs_between_epochs_and_steps() -> None:
    buffer = ExperienceBuffer(experience([2] * 16, [3] * 16), minibatch_size=4)

    def order(*seed: int) -> list[list[int]]:
        return [rows_of(minibatch) for minibatch in buffer.minibatches(*seed)]

    assert order(0, 1, 0) == order(0, 1, 0)
    different = [order(0, 1, 0), order(0, 1, 1), order(0, 2, 0), order(1, 1, 0)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_rows_keeps_what_belongs_together_and_drops_padding_alone() -> None:
    whole = experience([2, 5, 3], [4, 1, 6], extra_columns=4)
    taken = whole.rows([2, 0])
    # Row 2 is the longer: prompt 3 and completion 6 are 9 tokens, so 8 columns.
    assert taken.tokens.shape == (2, 9)
    for name, array in zip(Experience._fields, taken, strict=True):
        if array is None:
            assert name == "rewards"  # only before values are known
            continue
        full = np.array(getattr(whole, name))
        assert np.array_equal(np.array(array), full[[2, 0]][:, : array.shape[1]]), name
        if name != "tokens":
            assert array.shape == (2, 8)
    assert int(mx.sum(taken.mask)) == 4 + 6
    bare = Experience(whole.tokens, whole.mask, whole.advantages, whole.sampler_logprobs).rows([1])
    assert (bare.old_logprobs, bare.ref_logprobs, bare.values, bare.returns) == (None,) * 4


def test_a_row_without_a_sampled_token_can_be_taken_alone() -> None:
    whole = experience([2, 2], [3, 3])
    unscored = whole._replace(mask=whole.mask & mx.array([[True], [False]]))
    taken = unscored.rows([1])
    assert taken.mask.shape[1] >= 1
    assert int(mx.sum(taken.mask)) == 0
    assert taken.tokens.shape[1] == taken.mask.shape[1] + 1
