"""The experience buffer: one batch of rollouts, dealt out in shuffled minibatches, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from experience_buffer.data_structures import Experience


class Minibatch(NamedTuple):
    """The rows of one optimiser step, split for memory, with the counts that its means divide by."""

    micro_batches: list[Experience]
    n_rows: int  # rows with a True position: a row that could not be scored is not there
    n_tokens: int  # True positions of the mask over all micro-batches


class ExperienceBuffer:
    """Deals out an :class:`Experience`; which rows meet is a function of the seed alone."""

    def __init__(
        self,
        experience: Experience,
        *,
        minibatch_size: int | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        """None: all rows at once."""
        self.experience = experience
        self.minibatch_size = min(minibatch_size or experience.size, experience.size)
        self.micro_batch_size = min(micro_batch_size or self.minibatch_size, self.minibatch_size)
        self._lengths = np.array(mx.sum(experience.mask, axis=1))  # (B,) tokens per row
        self._widths = np.array(mx.max(experience.mask * mx.arange(1, experience.mask.shape[1] + 1), axis=1))

    @property
    def minibatches_per_epoch(self) -> int:
        """Optimiser steps in one pass over the rows."""
        return -(-self.experience.size // self.minibatch_size)

    def minibatches(self, *seed: int) -> Iterator[Minibatch]:
        """One epoch: every row exactly once, in an order drawn from ``seed``."""
        size = self.experience.size
        if self.micro_batch_size >= size:
            # All rows at once: no order to draw, and the very arrays that the reference saw, to the last bit.
            yield Minibatch([self.experience], int((self._lengths > 0).sum()), int(self._lengths.sum()))
            return
        order = np.random.default_rng(seed).permutation(size)
        # Sizes differ by one row at most: a last minibatch of two rows would take as long a step as any other.
        for rows in np.array_split(order, self.minibatches_per_epoch):
            yield self._minibatch(rows)

    def _minibatch(self, rows: np.ndarray) -> Minibatch:
        # Rows of like width share a micro-batch, so that little of it is padding.
        by_width = rows[np.argsort(self._widths[rows], kind="stable")].tolist()
        step = self.micro_batch_size
        parts = [self.experience.rows(by_width[i : i + step]) for i in range(0, len(by_width), step)]
        return Minibatch(parts, int((self._lengths[rows] > 0).sum()), int(self._lengths[rows].sum()))
