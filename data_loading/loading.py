"""Prompts, demonstrations and preferences from whatever holds them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from config.data_config import DataConfig

Kind = Literal["prompts", "pairs", "preferences"]


class HubDataset(NamedTuple):
    """A data set that the library ``datasets`` finds by name: on the Hugging Face Hub, or a folder."""

    name: str
    config: str | None = None
    split: str = "train"


class DataSplits(NamedTuple):
    """Rows to train on and, where there are any, rows to be judged by."""

    train: Any  # Rows
    validation: Any | None  # Rows
    leaks: int  # validation rows whose prompt is trained on, too


def load_prompts(source: Any, config: DataConfig | None = None, *, split: str = "train") -> Any:
    """Rows for ``PPOTrainer.train`` / ``evaluate``: mappings with a ``prompt``, other fields are reward columns."""
    raise NotImplementedError


def load_pairs(source: Any, config: DataConfig | None = None, *, split: str = "train") -> Any:
    """Rows for ``SFTTrainer.train``: mappings with ``prompt`` and ``completion``, or ``text``."""
    raise NotImplementedError


def load_preferences(source: Any, config: DataConfig | None = None, *, split: str = "train") -> Any:
    """Rows for ``RewardTrainer.train``: ``prompt``, ``chosen``, ``rejected``, or ``prompt``, ``completion``, ``reward``."""
    raise NotImplementedError


def load_data(config: DataConfig, kind: Kind) -> DataSplits:
    """What train_path / val_path or dataset_name of a config name, split and filtered as it says."""
    raise NotImplementedError
