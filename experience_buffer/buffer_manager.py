"""The experience buffer: one batch of rollouts, dealt out in shuffled minibatches, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experience_buffer.data_structures import Experience
from token_attribution.sampled_states import prompt_numbers


class Minibatch(NamedTuple):
    """The rows of one optimiser step, split for memory, with the counts that its means divide by."""

    micro_batches: list[Experience]
    n_rows: int  # rows with a True position: a row that could not be scored is not there
    n_tokens: int  # True positions of the mask over all rows, those left out of the micro-batches included
    rows: list[list[int]]  # which of the batch's rows each micro-batch has


class ExperienceBuffer:
    """Deals out an :class:`Experience`; which rows meet in a minibatch is a function of the seed alone."""

    def __init__(
        self,
        experience: Experience,
        *,
        minibatch_size: int | None = None,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        teaches: np.ndarray | None = None,
    ) -> None:
        """None: all rows at once.

        Args:
            minibatch_size: rows of an optimiser step. micro_batch_size: rows of a forward and backward pass.
            micro_batch_tokens: in place of a number of rows, how many tokens a pass should compute, each prompt of
                it counted once. A single row may have more.
            teaches: (B,) bool; rows for which it is False have no gradient. They are not computed, but they count
                in the means all the same.
        """
        self.experience = experience
        self.minibatch_size = min(minibatch_size or experience.size, experience.size)
        self.micro_batch_size = min(micro_batch_size or self.minibatch_size, self.minibatch_size)
        self.micro_batch_tokens = micro_batch_tokens
        mask = np.array(experience.mask).astype(bool)
        self._lengths = mask.sum(axis=1)  # (B,) sampled tokens per row
        self._widths = np.where(mask, np.arange(1, mask.shape[1] + 1), 0).max(axis=1)  # (B,) prompt included
        self._prompts = prompt_numbers(np.array(experience.tokens), mask)  # (B,)
        self._prompt_lengths = np.where(self._lengths > 0, mask.argmax(axis=1) + 1, 0)
        self._teaches = np.ones(experience.size, dtype=bool) if teaches is None else teaches

    @property
    def minibatches_per_epoch(self) -> int:
        """Optimiser steps in one pass over the rows."""
        return -(-self.experience.size // self.minibatch_size)

    def minibatches(self, *seed: int) -> Iterator[Minibatch]:
        """One epoch: every row exactly once, in an order drawn from ``seed``."""
        size = self.experience.size
        if self.minibatch_size >= size:  # all rows in one step: there is no order to draw
            yield self._minibatch(np.arange(size))
            return
        order = np.random.default_rng(seed).permutation(size)
        # Sizes differ by one row at most: a last minibatch of two rows would take as long a step as any other.
        for rows in np.array_split(order, self.minibatches_per_epoch):
            yield self._minibatch(rows)

    def _minibatch(self, rows: np.ndarray) -> Minibatch:
        counts = int((self._lengths[rows] > 0).sum()), int(self._lengths[rows].sum())
        computed = rows[self._teaches[rows]]
        if not len(computed):
            # One row stays: its gradient of exactly 0 is still a step, in which momentum acts. One that has tokens, or
            # entropy and ratio would be those of nothing.
            sampled = rows[self._lengths[rows] > 0]
            computed = (sampled if len(sampled) else rows)[:1]
        parts = list(self._micro_batches(computed))
        if len(parts) == 1 and len(computed) == self.experience.size:
            # The very arrays that the reference saw, in the same order, to the last bit.
            return Minibatch([self.experience], *counts, [list(range(self.experience.size))])
        return Minibatch([self.experience.rows(part) for part in parts], *counts, parts)

    def _micro_batches(self, rows: np.ndarray) -> Iterator[list[int]]:
        """Rows that go through the model together: of one prompt if possible, then of like width."""
        order = rows[np.lexsort((self._widths[rows], self._prompts[rows]))].tolist()
        if self.micro_batch_tokens is None:
            step = self.micro_batch_size
            yield from (order[i : i + step] for i in range(0, len(order), step))
            return
        part: list[int] = []
        tokens = 0
        for i, row in enumerate(order):
            new_prompt = not part or self._prompts[part[-1]] != self._prompts[row]
            cost = self._cost(row, with_prompt=new_prompt)
            group = self._cost_of_group(order, i) if new_prompt else cost
            # A group is not torn apart where the rest of it fits into a pass of its own.
            if part and (
                tokens + cost > self.micro_batch_tokens or tokens + group > self.micro_batch_tokens >= group
            ):
                yield part
                part, tokens = [], 0
                cost = self._cost(row, with_prompt=True)
            part.append(row)
            tokens += cost
        if part:
            yield part

    def _cost(self, row: int, *, with_prompt: bool) -> int:
        own = int(self._widths[row] - self._prompt_lengths[row])
        return own + (int(self._prompt_lengths[row]) if with_prompt else 0)

    def _cost_of_group(self, order: list[int], first: int) -> int:
        """Tokens of the rows from ``first`` on that have its prompt."""
        total = self._cost(order[first], with_prompt=True)
        for row in order[first + 1 :]:
            if self._prompts[row] != self._prompts[order[first]]:
                break
            total += self._cost(row, with_prompt=False)
        return total
