"""Prompts, demonstrations and preferences from whatever holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config.data_config import DataConfig
from config.errors import DataLoadError, InvalidConfigurationError
from config.training_config import TrainingConfig
from data_loading.csv_files import CsvFile
from data_loading.json_files import open_json
from data_loading.normalising import shared
from data_loading.records import BadRowError, Source, path_of
from data_loading.rows import Rows, read_rows
from data_loading.schemas import Kind, find_schema
from data_loading.tables import HubDataset, RowList, Table, open_hub, open_parquet
from data_loading.token_files import prefix_of
from data_loading.token_rows import TokenRows, read_token_rows

#: File names of a split in a folder, mlx-lm's first.
SPLIT_FILES = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
READERS = {
    ".jsonl": open_json,
    ".ndjson": open_json,
    ".json": open_json,
    ".csv": CsvFile,
    ".tsv": CsvFile,
    ".parquet": open_parquet,
}


class DataSplits(NamedTuple):
    """Rows to train on and, where there are any, rows to be judged by."""

    train: Rows | TokenRows
    validation: Rows | TokenRows | None
    leaks: int  # validation rows whose prompt is trained on, too


def load_prompts(source: Any, config: DataConfig | None = None, *, split: str = "train") -> Rows | TokenRows:
    """Rows for ``PPOTrainer.train`` and ``evaluate``: mappings with a ``prompt``; their other fields reach the reward.

    Every row is read and checked once, here; afterwards a row is read when it is asked for.

    Args:
        source: a path (.jsonl, .json, .csv, .tsv, .parquet, a folder with train.jsonl, a prefix of .npy files), a
            :class:`HubDataset`, a ``datasets.Dataset``, or a list of texts, chats or mappings.
        split: which file of a folder: "train", "valid" or "test".
    Returns:
        A sequence; ``.report`` says what it holds and what was left out, ``.place(i)`` where a row stands.
    Raises:
        DataLoadError: with file and line, what was found, and what to do.
    """
    return _load(source, config, "prompts", split)


def load_pairs(source: Any, config: DataConfig | None = None, *, split: str = "train") -> Rows | TokenRows:
    """Rows for ``SFTTrainer.train``: mappings with ``prompt`` and ``completion``, or with one ``text``.

    See :func:`load_prompts`.
    """
    return _load(source, config, "pairs", split)


def load_preferences(
    source: Any, config: DataConfig | None = None, *, split: str = "train"
) -> Rows | TokenRows:
    """Rows for ``RewardTrainer.train``: ``prompt, chosen, rejected``, or ``prompt, completions, rewards`` (the best
    first), or ``prompt, completion, reward``.

    See :func:`load_prompts`.
    """
    return _load(source, config, "preferences", split)


def load_steps(source: Any, config: DataConfig | None = None, *, split: str = "train") -> Rows | TokenRows:
    """Rows for ``ProcessRewardTrainer.train``: ``prompt, steps, labels``, a label from 0 to 1 for each step.

    See :func:`load_prompts`.
    """
    return _load(source, config, "steps", split)


def has_steps(config: DataConfig) -> bool:
    """Whether the training rows are answers with their steps labelled, by the first of them that fits any schema."""
    source = _sources(config)[0]
    if _is_path(source) and prefix_of(path_of(source)) is not None:
        return False
    for record in open_source(source).scan():
        try:
            if record.fields is not None:
                return "steps" in find_schema(record.fields, config, None).uses
        except BadRowError:  # whoever reads the file says so, or leaves it out
            continue
    return False


def load_data(config: DataConfig, kind: Kind) -> DataSplits:
    """What train_path and val_path, or dataset_name and its splits, name; or a share set aside of the first.

    Raises:
        InvalidConfigurationError: for no source. DataLoadError: see :func:`load_prompts`.
    """
    source, validation_source = _sources(config)
    train = _read(source, config, kind, "train")
    validation = None
    if validation_source is not None:
        validation = _read(validation_source, config, kind, "valid")
    elif config.validation_fraction:
        train, validation = split_off(train, config.validation_fraction, _seed(config))
    train = draw(train, config)
    leaks = 0 if validation is None else int(shared(validation.keys, train.keys).sum())
    return DataSplits(train, validation, leaks)


def split_off(rows: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Rows to train on and about ``fraction`` of all to be judged by, in which no prompt of the first occurs.

    Which prompts are set aside depends on the seed and the set of prompts, not on the order of the rows.
    """
    prompts, which, counts = np.unique(rows.keys, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(prompts))
    wanted = max(round(fraction * len(rows)), 1)
    taken = order[: int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1]
    if len(taken) == len(prompts):
        raise DataLoadError(
            f"validation_fraction: {len(prompts)} different prompts cannot be split into two parts with "
            f"{fraction:g} of the rows in the second; lower it, or give val_path"
        )
    aside = np.isin(which, taken)
    train, validation = rows.select(np.flatnonzero(~aside)), rows.select(np.flatnonzero(aside))
    train.report = replace(rows.report, used=len(train), set_aside=len(validation))
    return train, validation


def draw(rows: Any, config: DataConfig) -> Any:
    """At most max_samples rows: drawn with the seed, or the first."""
    count = config.max_samples
    if count is None or count >= len(rows):
        return rows
    order = (
        np.random.default_rng(_seed(config)).permutation(len(rows))
        if config.shuffle_data
        else np.arange(len(rows))
    )
    drawn = rows.select(np.sort(order[:count]))
    drawn.report = replace(rows.report, used=count, not_drawn=len(rows) - count)
    return drawn


def _seed(config: DataConfig) -> int:
    return config.seed if isinstance(config, TrainingConfig) else 0


def _sources(config: DataConfig) -> tuple[Any, Any | None]:
    """Where to train from and, if that is said, where to validate from."""
    if config.train_path is None and config.dataset_name is not None:
        name, which = config.dataset_name, config.dataset_config
        validation: Any = config.val_path
        if validation is None and config.dataset_val_split is not None:
            validation = HubDataset(name, which, config.dataset_val_split)
        return HubDataset(name, which, config.dataset_train_split), validation
    if config.train_path is None:
        raise InvalidConfigurationError(
            "train_path: nothing to train on; give a file, or a data set by dataset_name"
        )
    validation = config.val_path
    folder = path_of(config.train_path)
    if validation is None and not config.validation_fraction and folder.is_dir():
        validation = config.train_path if split_file(folder, "valid") else None
    return config.train_path, validation


def _load(source: Any, config: DataConfig | None, kind: Kind, split: str) -> Rows | TokenRows:
    config = config or DataConfig()
    rows: Rows | TokenRows = draw(_read(source, config, kind, split), config)
    return rows


def _read(source: Any, config: DataConfig, kind: Kind, split: str) -> Rows | TokenRows:
    prefix = prefix_of(path_of(source)) if _is_path(source) else None
    if prefix is not None:
        return read_token_rows(prefix, config, kind)
    return read_rows(open_source(source, split), config, kind)


def open_source(source: Any, split: str = "train") -> Source:
    """The reader for a source, by what it is and how its name ends."""
    if isinstance(source, HubDataset):
        return open_hub(source)
    if _is_path(source):
        return _open_path(path_of(source), split)
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):  # a datasets.Dataset
        return Table(source, "dataset")
    if isinstance(source, Sequence):
        return RowList(source)
    raise DataLoadError(f"a path, a HubDataset or a list of rows is expected, found {type(source).__name__}")


def _is_path(source: Any) -> bool:
    return isinstance(source, (str, Path))


def _open_path(path: Path, split: str) -> Source:
    if path.is_dir():
        found = split_file(path, split)
        if found is None:
            names = sorted(inside.name for inside in path.iterdir())[:10]
            raise DataLoadError(
                f"{path}: the folder has no {SPLIT_FILES.get(split, (split,))[0]}.jsonl (it holds "
                f"{', '.join(names) or 'nothing'}); name the file itself"
            )
        path = found
    elif not path.exists():
        raise DataLoadError(
            f"{path}: there is no such file; check the path (a data set on the Hugging Face Hub is given by "
            "dataset_name, or HubDataset)"
        )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataLoadError(
            f"{path}: files ending in {', '.join(READERS)} are read, or a prefix of .npy files; rename or convert it"
        )
    return reader(path)


def split_file(folder: Path, split: str) -> Path | None:
    """The file of a split: train.jsonl and so on, with any of the endings, one alone."""
    for stem in SPLIT_FILES.get(split, (split,)):
        for suffix in READERS:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    return None
