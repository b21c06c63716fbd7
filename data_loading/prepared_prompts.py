"""Prompts as the loop takes them: checked at once, held in memory only where they were already."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.tokenizer_setup import check_length, check_sequence, fingerprint, prepare_prompt
from config.errors import DataLoadError
from data_loading.prefetch import prefetched
from data_loading.rows import Rows
from data_loading.token_rows import TokenRows
from experience_buffer.data_structures import Prompt

Item = TypeVar("Item")
Overflow = Literal["error", "keep_end", "drop"]


class PreparedPrompts(Sequence[Prompt]):
    """Encoded prompts. Those of a file are encoded again whenever they are asked for; a list's are kept.

    Encoding is done by whoever asks: a tokenizer that two threads use at once may refuse ("Already borrowed").
    Reading, which may wait for a disk, is what ``batches`` leaves to another thread.

    Attributes:
        cut: prompts of which only the last ``max_prompt_length`` tokens are left. dropped: prompts left out.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompts: Sequence[Any],
        *,
        max_prompt_length: int,
        overflow: Overflow = "error",
    ) -> None:
        """
        Args:
            prompts: strings, lists of chat messages, or mappings with a ``prompt`` of either kind, whose other
                fields reach the reward as columns; or what ``load_prompts`` gives.
        Raises:
            DataLoadError: with the row, for one that cannot be used or, with overflow "error", is too long.
        """
        check_sequence(prompts)
        self._tokenizer, self._rows = tokenizer, prompts
        self._limit, self._overflow = max_prompt_length, overflow
        self._kept: dict[int, Prompt] | None = None if isinstance(prompts, (Rows, TokenRows)) else {}
        lengths = self._lengths()
        too_long = np.flatnonzero(lengths > max_prompt_length)
        if too_long.size and overflow == "error":
            first = int(too_long[0])
            check_length(int(lengths[first]), self._place(first), max_prompt_length)
        self.cut = len(too_long) if overflow == "keep_end" else 0
        self.dropped = len(too_long) if overflow == "drop" else 0
        fitting = np.arange(len(lengths))
        self._indices = np.delete(fitting, too_long) if overflow == "drop" else fitting
        if not len(self._indices):
            raise DataLoadError(
                f"prompts: all {len(lengths)} are longer than max_prompt_length ({max_prompt_length} tokens); raise it"
            )

    def _lengths(self) -> np.ndarray:
        """(N,) tokens of every prompt; each is encoded, and so checked, unless its tokens are known."""
        if isinstance(self._rows, TokenRows):
            self._rows.check_tokenizer(fingerprint(self._tokenizer), len(self._tokenizer))
            return self._rows.prompt_lengths
        lengths = np.zeros(len(self._rows), dtype=np.int64)
        for index, row in enumerate(self._rows):
            prompt = self._encode(index, row)
            lengths[index] = len(prompt.ids)
            if self._overflow == "error":  # a million rows need not be read to refuse the first
                check_length(len(prompt.ids), self._place(index), self._limit)
            if self._kept is not None:
                self._kept[index] = self._shortened(prompt)
        return lengths

    def _place(self, index: int) -> str:
        return self._rows.place(index) if isinstance(self._rows, (Rows, TokenRows)) else f"prompts[{index}]"

    def _encode(self, index: int, row: Any) -> Prompt:
        return prepare_prompt(self._tokenizer, index, row, self._place(index))

    def _shortened(self, prompt: Prompt) -> Prompt:
        return prompt if len(prompt.ids) <= self._limit else replace(prompt, ids=prompt.ids[-self._limit :])

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, position: int) -> Prompt: ...
    @overload
    def __getitem__(self, position: slice) -> list[Prompt]: ...
    def __getitem__(self, position: int | slice) -> Prompt | list[Prompt]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        index = int(self._indices[position])
        if self._kept is not None:
            return self._kept[index]
        return self._shortened(self._encode(index, self._rows[index]))

    def batches(self, order: Sequence[int], size: int, depth: int) -> Generator[list[Prompt], None, None]:
        """The prompts at these positions, ``size`` at a time, up to ``depth`` batches read ahead."""
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        if self._kept is not None:
            yield from ([self[i] for i in part] for part in parts)
            return

        def read(part: Sequence[int]) -> list[tuple[int, Any]]:
            return [(index, self._rows[index]) for index in self._indices[list(part)].tolist()]

        with closing(prefetched(read, parts, depth)) as batches:
            for rows in batches:
                yield [self._shortened(self._encode(index, row)) for index, row in rows]

    def __str__(self) -> str:
        """What became of prompts that were too long; empty where none was."""
        total = len(self._indices) + self.dropped
        over = f"of {total} prompts have more than {self._limit} tokens (max_prompt_length)"
        if self.cut:
            return f"{self.cut} {over}: their last {self._limit} were kept"
        if self.dropped:
            return f"{self.dropped} {over}: they were left out"
        return ""


class Reordered(Sequence[Item]):
    """A sequence seen in another order, without its items being fetched."""

    def __init__(self, items: Sequence[Item], order: Sequence[int]) -> None:
        self._items, self._order = items, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        return self._items[self._order[position]]
