"""What has been sampled so far, all rows in one table, so that a step is recorded in a few operations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Completion(NamedTuple):
    """One sampled completion."""

    ids: list[int]  # the end token included
    logprobs: list[float]  # under the distribution sampled from
    terminated: bool


class Completions:
    """Tokens and logprobs of B rows, C columns; a row is closed by an end token or in its last column."""

    def __init__(self, rows: int, columns: int, end_ids: frozenset[int]) -> None:
        self.ids = np.zeros((rows, columns), dtype=np.int32)
        self.logprobs = np.zeros((rows, columns), dtype=np.float32)
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.terminated = np.zeros(rows, dtype=bool)
        self.closed = np.zeros(rows, dtype=bool)
        self._end_ids = np.array(sorted(end_ids), dtype=np.int64)

    def record(
        self, rows: np.ndarray, columns: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray
    ) -> np.ndarray:
        """One step, ``(n,)`` each; the rows that it closes come back. What follows a row's end is passed over."""
        if self.closed[rows].any():
            is_open = ~self.closed[rows]
            rows, columns, tokens, logprobs = (x[is_open] for x in (rows, columns, tokens, logprobs))
        self.ids[rows, columns], self.logprobs[rows, columns] = tokens, logprobs
        ended = np.isin(tokens, self._end_ids)
        self.lengths[rows] = columns + 1
        self.terminated[rows] = ended
        done: np.ndarray = rows[ended | (columns + 1 == self.ids.shape[1])]
        self.closed[done] = True
        return done

    def __getitem__(self, row: int) -> Completion:
        length = self.lengths[row]
        return Completion(
            self.ids[row, :length].tolist(), self.logprobs[row, :length].tolist(), bool(self.terminated[row])
        )
