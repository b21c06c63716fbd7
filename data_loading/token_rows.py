"""Pre-tokenised files as rows: nothing is read before it is asked for, and their lengths are known at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from config.data_config import DataConfig
from config.errors import DataLoadError, InvalidConfigurationError
from data_loading.normalising import text_key
from data_loading.rows import Report
from data_loading.schemas import Kind, Row
from data_loading.token_files import TokenFiles, part_path


class TokenRows(Sequence[Row]):
    """Rows with ``prompt_ids`` and, where there are any, ``completion_ids`` (int32); other fields as they were."""

    def __init__(self, files: TokenFiles, records: np.ndarray | None = None) -> None:
        self.files = files
        self.records = np.arange(len(files)) if records is None else records  # (N,)
        count = len(self.records)
        self.report = Report(f"{files.prefix}_*.npy", "pre-tokenised", rows=count, used=count)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...
    def __getitem__(self, index: int | slice) -> Row | TokenRows:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        record = int(self.records[index])
        row: Row = {"prompt_ids": self.files.prompts[record]}
        if self.files.completions is not None:
            row["completion_ids"] = self.files.completions[record]
        return row | dict(self.files.columns(record))

    def place(self, index: int) -> str:
        """File and row."""
        return self.files.place(int(self.records[index]))

    def select(self, indices: np.ndarray) -> TokenRows:
        """Some of the rows, in this order."""
        return TokenRows(self.files, self.records[indices])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """(N,) tokens of each prompt."""
        lengths: np.ndarray = self.files.prompts.lengths[self.records]
        return lengths

    @property
    def keys(self) -> np.ndarray:
        """(N,) uint64, equal where prompts are."""
        prompts = self.files.prompts
        return np.fromiter(
            (text_key(prompts[int(record)].tobytes()) for record in self.records), np.uint64, len(self)
        )

    def check_tokenizer(self, fingerprint: str, vocabulary: int) -> None:
        """Refuse ids that another tokenizer made.

        Args:
            fingerprint: the tokenizer's. vocabulary: how many ids it has; all that can be checked of older files.
        """
        made_by = self.files.description.get("fingerprint")
        if made_by not in (None, fingerprint):
            raise DataLoadError(
                f"{self.files.prefix}_tokenizer.json: these ids were made by the tokenizer of "
                f"{self.files.description.get('model_name', 'another model')}, not by this model's; run preprocess "
                "with this model"
            )
        if made_by is None:  # of others every row is checked when it is read: a look at all would read all
            self._check_ids(vocabulary)
        empty = np.flatnonzero(self.prompt_lengths == 0)
        if empty.size:
            raise DataLoadError(f"{self.place(int(empty[0]))}: the prompt is empty")

    def _check_ids(self, vocabulary: int) -> None:
        for part, rows in (("prompts", self.files.prompts), ("completions", self.files.completions)):
            if rows is not None and rows.values.size:
                smallest, largest = int(rows.values.min()), int(rows.values.max())
                if smallest < 0 or largest >= vocabulary:
                    raise DataLoadError(
                        f"{part_path(self.files.prefix, part)}: ids from 0 to {vocabulary - 1} are expected, found "
                        f"{smallest} to {largest}; run preprocess with this model"
                    )


def read_token_rows(prefix: str, config: DataConfig, kind: Kind) -> TokenRows:
    """The files of a prefix, for prompts or pairs.

    Raises:
        DataLoadError: for damaged files, or a use that needs texts. InvalidConfigurationError: for options that
            can only be applied to texts.
    """
    for name in ("filter_keywords", "system_prompt"):
        if getattr(config, name):
            raise InvalidConfigurationError(
                f"{name}: {prefix}_prompts.npy holds tokens, not texts; give {name} to preprocess instead"
            )
    rows = TokenRows(TokenFiles(prefix))
    if not len(rows):
        raise DataLoadError(f"{rows.files.prefix}_prompts.npy: there are no rows; at least one is needed")
    if kind in ("preferences", "steps"):
        raise DataLoadError(f"{prefix}_prompts.npy: {kind} are read from texts; give the .jsonl file")
    if kind == "pairs" and rows.files.completions is None:
        raise DataLoadError(f"{part_path(prefix, 'completions')}: not there, and pairs need completions")
    return rows
