"""The part of a checkpoint that every stage has: arrays in safetensors, the rest in JSON, and where it all comes from.

| file | what |
|---|---|
| ``adapters.safetensors``, ``adapter_config.json`` | what trains, as mlx-lm reads it |
| ``optimizer.safetensors`` | of every optimiser: moments, steps, learning rate |
| ``state.json`` | counters, progress, skipped steps in a row, random generators, config, origins |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from base_setup.parameters import named_arrays
from base_setup.tokenizer_setup import fingerprint
from checkpointing.durable import write_strict_json
from checkpointing.resuming import STATE, read_state
from config.errors import CheckpointError
from config.training_config import TrainingConfig
from models.fingerprint import weights_fingerprint
from models.sft_model import LanguageModel
from training.model_trainer import ModelTrainer
from training.randomness import random_state, set_random_state

OPTIMIZER = "optimizer.safetensors"
#: What a checkpoint can be of that the run going on from it is not of, and the sentence for it.
_ORIGINS = {
    "model": "model_name: the base model's weights are not those that this run trained on",
    "tokenizer": "tokenizer: it is not the one that this run trained with (its vocabulary, chat template or ids "
    "differ), so the tokens that were learned would mean something else",
    "reference": "reference: its weights are not those that this run was measured from",
    "prompts": "prompts: they are not those that this run trained on (their number, tokens or columns differ), and its "
    "place among them would mean nothing",
    "rows": "train_path: the rows are not those that this run trained on (their number, order, tokens or labels "
    "differ), and its place among them would mean nothing",
    "validation": "val_path: the rows are not those that this run was validated on (their number, order, tokens or "
    "labels differ), and what is better would mean nothing",
}


class TrainingState:
    """Writes what every stage has to a folder and reads it back."""

    def __init__(
        self,
        *,
        stage: str,
        config: TrainingConfig,
        trainers: Mapping[str, ModelTrainer],
        save: Callable[[Path], None],
        load: Callable[[Path], None],
        origins: Mapping[str, str],
    ) -> None:
        """
        Args:
            save, load: of the weights that train. origins: a fingerprint each of what the run was made from (``model``,
                ``rows``, …); a checkpoint with others is refused.
        """
        self.stage, self.config, self.trainers, self.origins = stage, config, trainers, dict(origins)
        self._save, self._load = save, load

    @property
    def size(self) -> int:
        """About how many bytes :meth:`write` writes."""
        modules = [trainer.module.trainable_parameters() for trainer in self.trainers.values()]
        weights = [x for module in modules for x in named_arrays(module).values()]
        return sum(x.nbytes for x in [*weights, *self._optimizers().values()]) + 1_000_000

    def write(
        self,
        folder: Path,
        counters: Mapping[str, int],
        progress: Mapping[str, Any],
        further: Mapping[str, Any] | None = None,
    ) -> None:
        """``further``: what else goes into ``state.json``.

        Raises:
            CheckpointError: something in it is not JSON.
        """
        self._save(folder)
        mx.save_safetensors(str(folder / OPTIMIZER), self._optimizers())
        state = {
            "stage": self.stage,
            "counters": dict(counters),
            "progress": dict(progress),
            **(further or {}),
            "skipped_in_a_row": {name: t.skipped_in_a_row for name, t in self.trainers.items()},
            "random": random_state(),
            "origins": self.origins,
            "config": self.config.as_dict(),
        }
        try:
            write_strict_json(folder / STATE, state)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / STATE}: something in the run's state is not JSON ({error}); what state_dict() of a reward "
                "gives must be numbers, texts, lists and mappings"
            ) from error

    def read(self, folder: Path) -> dict[str, Any]:
        """Make it what it was; returns the whole of ``state.json``.

        Raises:
            CheckpointError: the checkpoint is of another model or other rows, or cannot be read; naming what differs.
        """
        state = read_state(folder)
        self._check_origins(folder, state["origins"])
        self._load(folder)
        arrays = load_arrays(folder / OPTIMIZER)
        for name, trainer in self.trainers.items():
            trainer.load_state_arrays(under(arrays, name))
            trainer.skipped_in_a_row = int(state["skipped_in_a_row"][name])
        set_random_state(state["random"])
        return state

    def _optimizers(self) -> dict[str, mx.array]:
        return {
            f"{name}.{path}": array
            for name, trainer in self.trainers.items()
            for path, array in trainer.state_arrays().items()
        }

    def _check_origins(self, folder: Path, saved: Mapping[str, str]) -> None:
        for name, sentence in _ORIGINS.items():
            if name in self.origins and name in saved and saved[name] != self.origins[name]:
                raise CheckpointError(
                    f"{sentence}; give what {folder.name} was made with, or start a new run from its weights "
                    f"(--adapter-path {folder})"
                )


def load_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays in a file of a checkpoint, in memory.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        arrays = named_arrays(mx.load(str(path)))
        mx.eval(arrays)  # the file may be deleted later, and loading is lazy
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: it cannot be read ({error})") from error
    return arrays


def under(arrays: Mapping[str, mx.array], name: str) -> dict[str, mx.array]:
    """Those whose path begins with ``name.``, without it."""
    return {path.removeprefix(name + "."): x for path, x in arrays.items() if path.startswith(name + ".")}


def origins_of(base: LanguageModel, rows: Iterable[Any], validation: Iterable[Any] | None) -> dict[str, str]:
    """What a supervised run is made from: base, tokenizer, and encoded rows (tuples and lists of numbers)."""
    origins = {
        "model": weights_fingerprint(base.model),
        "tokenizer": fingerprint(base.tokenizer),
        "rows": _rows_fingerprint(rows),
    }
    return origins if validation is None else origins | {"validation": _rows_fingerprint(validation)}


def _rows_fingerprint(rows: Iterable[Any]) -> str:
    """SHA-256 over them, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
