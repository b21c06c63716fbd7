"""Prompts as the loop takes them: checked at once, held in memory only where they were already."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
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
OnBadRow = Literal["error", "skip"]
TOKEN_ROWS_COMPARED = 256  # of pre-tokenised files, whose point is that they are not read whole


class Fitting:
    """What becomes of prompts that are too long or cannot be used, and a count of them.

    Attributes:
        seen: prompts so far. cut: those of which only the last ``limit`` tokens are left. dropped: left out as too
            long. bad: left out because they cannot be used. problem: the first sentence about one of those.
    """

    def __init__(self, limit: int, overflow: Overflow, on_bad_row: OnBadRow) -> None:
        self.limit, self.overflow, self.on_bad_row = limit, overflow, on_bad_row
        self.seen = self.cut = self.dropped = self.bad = 0
        self.problem = ""

    def encode(self, tokenizer: TokenizerWrapper, index: int, row: Any, place: str) -> Prompt | None:
        """The prompt of a row, at most ``limit`` tokens of it; None: it is left out."""
        self.seen += 1
        try:
            prompt = prepare_prompt(tokenizer, index, row, place)
        except DataLoadError as error:
            if self.on_bad_row == "error":
                raise
            self.bad += 1
            self.problem = self.problem or str(error)
            return None
        if len(prompt.ids) <= self.limit:
            return prompt
        if self.overflow == "error":
            check_length(len(prompt.ids), place, self.limit)
        if self.overflow == "drop":
            self.dropped += 1
            return None
        self.cut += 1
        return self.shortened(prompt)

    def known(self, lengths: np.ndarray, place: Callable[[int], str]) -> np.ndarray:
        """(N,) bool: which prompts of these lengths stay, where the tokens are there already."""
        too_long = lengths > self.limit
        self.seen += len(lengths)
        if self.overflow == "error" and too_long.any():
            first = int(too_long.argmax())
            check_length(int(lengths[first]), place(first), self.limit)
        if self.overflow == "drop":
            self.dropped += int(too_long.sum())
            return ~too_long
        self.cut += int(too_long.sum())
        return np.ones(len(lengths), dtype=bool)

    def shortened(self, prompt: Prompt) -> Prompt:
        """The end of a prompt: a question stands at its end, and so does a template's call for an answer."""
        return prompt if len(prompt.ids) <= self.limit else replace(prompt, ids=prompt.ids[-self.limit :])

    def __str__(self) -> str:
        """A line for each kind of prompt that did not fit; empty where all did."""
        over = f"of {self.seen} prompts have more than {self.limit} tokens (max_prompt_length)"
        sentences = []
        if self.cut:
            sentences.append(f"{self.cut} {over}: their last {self.limit} were kept")
        if self.dropped:
            sentences.append(f"{self.dropped} {over}: they were left out")
        if self.bad:
            sentences.append(
                f"{self.bad} of {self.seen} prompts cannot be used and were left out; first: {self.problem}"
            )
        return "\n".join(sentences)


class PreparedPrompts(Sequence[Prompt]):
    """Encoded prompts. Those of a file are encoded again whenever they are asked for; a list's are kept.

    Encoding is done by whoever asks: a tokenizer that two threads use at once may refuse ("Already borrowed").
    Reading, which may wait for a disk, is what ``batches`` leaves to another thread.

    Attributes:
        fitting: how many were cut or left out.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompts: Sequence[Any],
        *,
        max_prompt_length: int,
        overflow: Overflow = "error",
        on_bad_row: OnBadRow = "error",
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
        self.fitting = Fitting(max_prompt_length, overflow, on_bad_row)
        self._kept: dict[int, Prompt] | None = None if isinstance(prompts, (Rows, TokenRows)) else {}
        self._digest = hashlib.sha256()
        self._hashes: np.ndarray | None = None  # (N,) uint64 of the rows of a file, as they were when checked
        self._indices = np.flatnonzero(self._usable())
        if not len(self._indices):
            raise DataLoadError(f"prompts: none of {len(prompts)} can be used: {self.fitting}")

    def _usable(self) -> np.ndarray:
        """(N,) bool; every prompt is encoded, and so checked, unless its tokens are known."""
        if isinstance(self._rows, TokenRows):
            self._rows.check_tokenizer(fingerprint(self._tokenizer), len(self._tokenizer))
            self._digest.update(np.ascontiguousarray(self._rows.prompt_lengths).tobytes())
            for index in np.unique(np.linspace(0, len(self._rows) - 1, TOKEN_ROWS_COMPARED).astype(int)):
                self._digest.update(
                    np.asarray(self._rows[int(index)]["prompt_ids"], dtype=np.int64).tobytes()
                )
            return self.fitting.known(self._rows.prompt_lengths, self._rows.place)
        usable = np.zeros(len(self._rows), dtype=bool)
        if self._kept is None:
            self._hashes = np.zeros(len(self._rows), dtype=np.uint64)
        for index, row in enumerate(self._rows):
            prompt = self.fitting.encode(self._tokenizer, index, row, self._place(index))
            usable[index] = prompt is not None
            if prompt is None:
                continue
            self._digest.update(_identity(prompt))
            if self._hashes is not None:
                self._hashes[index] = _hash(prompt)
            if self._kept is not None:
                self._kept[index] = prompt
        return usable

    def _place(self, index: int) -> str:
        return self._rows.place(index) if isinstance(self._rows, (Rows, TokenRows)) else f"prompts[{index}]"

    def _encode(self, index: int, row: Any) -> Prompt:
        prompt = self.fitting.shortened(prepare_prompt(self._tokenizer, index, row, self._place(index)))
        if self._hashes is not None and self._hashes[index] != _hash(prompt):
            raise DataLoadError(
                f"{self._place(index)}: the row is not what it was when the run began, so the file has changed under "
                "it; put it back and go on (--resume), or begin a new run with the new file"
            )
        return prompt

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the prompts, in order, with their columns; of tokens, their lengths and some rows."""
        return self._digest.hexdigest()

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
        return self._encode(index, self._rows[index])

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
                yield [self._encode(index, row) for index, row in rows]


def _identity(prompt: Prompt) -> bytes:
    try:
        columns = json.dumps(dict(prompt.columns), sort_keys=True, default=lambda value: type(value).__name__)
    except (TypeError, ValueError):  # keys of several kinds, or a column that holds itself
        columns = json.dumps(sorted(map(str, prompt.columns)))
    return f"{prompt.index} {prompt.ids} {columns}\n".encode("utf-8", errors="backslashreplace")


def _hash(prompt: Prompt) -> int:
    return int.from_bytes(hashlib.blake2b(_identity(prompt), digest_size=8).digest(), "little")


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
