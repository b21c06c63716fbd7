"""Parquet files and data sets by name, through the library ``datasets``, which keeps them on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import DataLoadError
from data_loading.json_text import kind_of
from data_loading.records import Record, open_for_reading


class HubDataset(NamedTuple):
    """A data set that the library ``datasets`` finds by name: on the Hugging Face Hub, or a folder."""

    name: str
    config: str | None = None
    split: str = "train"


class Table:
    """A ``datasets.Dataset``: its Arrow file is memory-mapped, a row is made when asked for."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self._dataset = dataset

    def scan(self) -> Iterator[Record]:
        """Every row in order."""
        for number, fields in enumerate(self._dataset):
            yield Record(number, fields)

    def read(self, number: int) -> Mapping[str, Any]:
        """One row."""
        fields: Mapping[str, Any] = self._dataset[int(number)]
        return fields

    def place(self, number: int) -> str:
        """The row's number, from 1 like the lines of a file."""
        return f"{self.name}, row {number + 1}"


class RowList:
    """Rows that are in memory already: texts, chats, or mappings."""

    def __init__(self, rows: Sequence[Any], name: str = "rows") -> None:
        self.name = name
        self._rows = rows

    def scan(self) -> Iterator[Record]:
        """Every row; a text or a chat counts as a row with a prompt."""
        for number, row in enumerate(self._rows):
            if isinstance(row, Mapping):
                yield Record(number, row)
            elif isinstance(row, (str, list, tuple)):
                yield Record(number, {"prompt": row})
            else:
                yield Record(number, None, f"a text, a chat or a mapping is expected, found {kind_of(row)}")

    def read(self, number: int) -> Mapping[str, Any]:
        """One row."""
        row = self._rows[number]
        return row if isinstance(row, Mapping) else {"prompt": row}

    def place(self, number: int) -> str:
        """As Python counts."""
        return f"{self.name}[{number}]"


def open_parquet(path: Path) -> Table:
    """A Parquet file. ``datasets`` writes an uncompressed copy to its cache and maps it."""
    with open_for_reading(path) as file:
        start = file.read(4)
    if start != b"PAR1":
        raise DataLoadError(f"{path}: a Parquet file is expected, found one that begins with {start!r}")
    from datasets import Dataset

    try:
        return Table(Dataset.from_parquet(str(path)), str(path))
    except Exception as error:  # pyarrow and datasets raise a dozen kinds for a damaged file
        raise DataLoadError(
            f"{path}: the Parquet file is damaged ({_reason(error)}); write it anew"
        ) from None


def open_hub(which: HubDataset) -> Table:
    """A data set by name. Downloads it unless it is in the cache or a folder; code of its own is never run."""
    from datasets import Dataset, get_dataset_config_names, get_dataset_split_names, load_dataset

    name = f"{which.name}{f' ({which.config})' if which.config else ''}, split {which.split}"
    try:
        dataset = load_dataset(which.name, which.config, split=which.split)
    except Exception as error:  # of datasets, huggingface_hub, fsspec and the network: one sentence for all
        reason = _reason(error)
        if "config" in reason.lower() and which.config is None:
            reason += _names(get_dataset_config_names, which.name, "; dataset_config is one of")
        elif "split" in reason.lower():
            reason += _names(
                lambda known: get_dataset_split_names(known, which.config), which.name, "; the splits are"
            )
        raise DataLoadError(
            f'dataset_name: "{which.name}" could not be loaded ({reason}); {_advice(error)}'
        ) from None
    if not isinstance(dataset, Dataset):
        raise DataLoadError(f'dataset_name: "{name}" is not one table; give dataset_config and the split')
    return Table(dataset, name)


def _names(ask: Any, name: str, words: str) -> str:
    try:
        return f"{words}: {', '.join(ask(name))}"
    except Exception:  # the reason alone is still true
        return ""


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


def _advice(error: Exception) -> str:
    kind = type(error).__name__
    if "Gated" in kind or "gated" in str(error):
        return "ask for access on its page, then log in with `hf auth login`"
    if kind in ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout"):
        return "without a network give a local file as train_path"
    return "check the name, dataset_config and the split, or give a local file as train_path"
