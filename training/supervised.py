"""What the supervised stages share: drawing batches, walking over optimiser steps, validating, stopping early.

With a run folder (``output_dir``) the walk can be killed anywhere: it goes on from its newest checkpoint as if nothing
had happened. Without one nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from base_setup import backend
from base_setup.out_of_memory import in_words
from base_setup.parameters import count_parameters
from checkpointing.resuming import LATEST
from checkpointing.run_session import RunSession
from config.supervised_config import SupervisedConfig
from training.early_stopping import EarlyStopping
from training.model_trainer import ModelTrainer, StepReport
from training.training_state import TrainingState, load_arrays, under

Row = TypeVar("Row")
Batch = TypeVar("Batch")
#: Called after each optimiser step with its number (from 1) and its metrics.
OnStep = Callable[[int, dict[str, float]], None]
VALIDATION = "validation/"
KEPT = "kept.safetensors"  # in a checkpoint: arrays that are neither trained nor an optimiser's


def place_of(rows: Sequence[Any], index: int, name: str) -> str:
    """Where a row stands: its file and line where the rows know it, else its number."""
    place: str = rows.place(index) if hasattr(rows, "place") else f"{name}[{index}]"
    return place


class ShuffledBatches(Generic[Row]):
    """Batch after batch of ``size`` rows: epoch after epoch, each in a fresh order, no row twice in one pass.

    ``batches(number)``, from 0, follows from (seed, number) alone, so that a run may begin anywhere. Without
    ``shuffle`` every epoch has the rows' own order.
    """

    def __init__(self, rows: Sequence[Row], size: int, seed: int, *, shuffle: bool = True) -> None:
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self.size = min(size, len(rows))
        self._orders: dict[int, list[int]] = {}  # of the epochs that the last batch was of
        self._generator, self._drawn = np.random.default_rng(seed), 0

    def __call__(self, number: int) -> list[Row]:
        """The batch of this number."""
        places = range(number * self.size, (number + 1) * self.size)
        epochs = sorted({place // len(self.rows) for place in places})
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        return [self.rows[self._orders[place // len(self.rows)][place % len(self.rows)]] for place in places]

    def _order(self, epoch: int) -> list[int]:
        """The epoch's order: the permutation of that number which the seed's generator draws."""
        if not self.shuffle:
            return list(range(len(self.rows)))
        if epoch < self._drawn:
            self._generator, self._drawn = np.random.default_rng(self.seed), 0
        while self._drawn < epoch:
            self._generator.permutation(len(self.rows))
            self._drawn += 1
        self._drawn += 1
        order: list[int] = self._generator.permutation(len(self.rows)).tolist()
        return order


def split(rows: Sequence[Row], size: int | None) -> list[Sequence[Row]]:
    """Consecutive micro-batches of at most ``size`` rows."""
    size = size or max(len(rows), 1)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def step_metrics(report: StepReport, **more: float) -> dict[str, float]:
    """The metrics that every stage reports."""
    return {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate, **more}


# A stage and its walk ------------------------------------------------------------------------------------


class Keeper(Protocol):
    """Who has arrays that the rest of a run depends on, beside what trains."""

    def state_arrays(self) -> dict[str, mx.array]:
        """Them, by path."""

    def load_state_arrays(self, arrays: Mapping[str, mx.array]) -> None:
        """Go on where :meth:`state_arrays` was taken."""


@dataclass(frozen=True)
class Task(Generic[Batch]):
    """A stage as :func:`learn` sees it.

    Args:
        stage: the command that runs it. trainer: of what trains; dropout is on during steps alone.
        batches: the batch of each number from 0, whichever was asked for before.
        step: takes an optimiser step on a batch, and says its metrics.
        save, load: of the weights that train.
        origins: fingerprints of what it is made from (see ``training_state.TrainingState``); asked of runs in a folder.
        validate: metrics on rows held out, ``loss`` among them. None: no validation, and no early stopping.
        keepers: by name.
    """

    stage: str
    trainer: ModelTrainer
    batches: Callable[[int], Batch]
    step: Callable[[Batch], dict[str, float]]
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    origins: Callable[[], Mapping[str, str]]
    validate: Callable[[], dict[str, float]] | None = None
    keepers: Mapping[str, Keeper] = field(default_factory=dict)


class Walk(Generic[Batch]):
    """Where a stage stands, and its next step.

    Attributes:
        step: optimiser steps so far. metrics: of the last one, with its validation where there was one.
    """

    def __init__(self, task: Task[Batch], config: SupervisedConfig) -> None:
        self.task, self.config = task, config
        self.step, self.metrics = 0, dict[str, float]()
        self.stopping = EarlyStopping(task.trainer.module, config.early_stopping_patience)

    def is_over(self) -> bool:
        """Whether all steps are done, or no more are wanted."""
        return self.step >= self.config.num_steps or self.stopping.enough

    @property
    def score(self) -> float:
        """What ``keep_best`` goes by: minus the validation loss of these very weights; NaN where it is not known."""
        return -self.metrics.get(VALIDATION + "loss", float("nan"))

    def advance(self) -> dict[str, float]:
        """One step; returns its metrics."""
        module, config = self.task.trainer.module, self.config
        module.train()  # adapter dropout is for these stages
        metrics = self.task.step(self.task.batches(self.step))
        module.eval()
        self.step += 1
        last = self.step == config.num_steps
        if last or (config.eval_every and self.step % config.eval_every == 0):
            metrics |= self._validated()
        self.metrics = metrics
        return metrics

    def _validated(self) -> dict[str, float]:
        """Metrics on the rows held out, where there are any."""
        found = self.task.validate() if self.task.validate else {}
        if found:
            self.stopping.see(found)
        return {VALIDATION + name: value for name, value in found.items()}

    def result(self) -> dict[str, float]:
        """The last metrics; with early stopping of the best weights, which are put back."""
        if VALIDATION + "loss" not in self.metrics:  # resumed with fewer num_steps: the end came unannounced
            self.metrics = self.metrics | self._validated()
        return self.metrics | {VALIDATION + name: x for name, x in self.stopping.keep_best().items()}

    # -- What a checkpoint keeps ----------------------------------------------------------------------

    @property
    def position(self) -> tuple[dict[str, int], dict[str, Any], float]:
        """Counters, progress and score."""
        progress = {"metrics": self.metrics, "early_stopping": self.stopping.state_dict()}
        return {"step": self.step}, progress, self.score

    def go_on(self, counters: Mapping[str, int], progress: Mapping[str, Any]) -> None:
        """Stand where :attr:`position` was taken."""
        self.step, self.metrics = int(counters["step"]), dict(progress["metrics"])
        self.stopping.load_state_dict(progress["early_stopping"])

    @property
    def keepers(self) -> dict[str, Keeper]:
        """All of whom a checkpoint has arrays."""
        return {"early_stopping": self.stopping, **self.task.keepers}


class WalkState:
    """A walk as files: what every stage has, and what its keepers have, in ``kept.safetensors``."""

    def __init__(self, walk: Walk[Any]) -> None:
        task = walk.task
        self.keepers = walk.keepers
        self._common = TrainingState(
            stage=task.stage,
            config=walk.config,
            trainers={"model": task.trainer},
            save=task.save,
            load=task.load,
            origins=task.origins(),
        )

    def _kept(self) -> dict[str, mx.array]:
        return {
            f"{name}.{path}": array
            for name, keeper in self.keepers.items()
            for path, array in keeper.state_arrays().items()
        }

    @property
    def size(self) -> int:
        """About how many bytes :meth:`write` writes."""
        return self._common.size + sum(x.nbytes for x in self._kept().values())

    def write(self, folder: Path, counters: Mapping[str, int], progress: Mapping[str, Any]) -> None:
        """All but the description of the run."""
        self._common.write(folder, counters, progress)
        if kept := self._kept():
            mx.save_safetensors(str(folder / KEPT), kept)

    def read(self, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
        """Make everything what it was; returns counters and progress."""
        state = self._common.read(folder)
        kept = load_arrays(folder / KEPT) if (folder / KEPT).is_file() else {}
        for name, keeper in self.keepers.items():
            keeper.load_state_arrays(under(kept, name))
        return dict(state["counters"]), dict(state["progress"])


def learn(
    task: Task[Batch],
    config: SupervisedConfig,
    *,
    on_step: OnStep | None = None,
    resume: bool | str | Path | None = None,
) -> dict[str, Any]:
    """Take ``task.step`` on batch after batch, in training mode, and validate on the way.

    Args:
        resume: go on from a checkpoint as if nothing had happened: True, the newest in ``output_dir``; a run folder; or
            one checkpoint. None = as config says.
    Returns:
        The last step's metrics, and where there is validation its metrics (``validation/…``) of the weights that are
        kept: with early stopping those of the lowest validation loss, else the last. In a run folder also
        ``run_folder``; and of a run that was ended by Ctrl-C, SIGTERM or a request ``stopped`` (``sigint``,
        ``sigterm``, ``request``) and ``checkpoint``, where it can go on.
    """
    walk = Walk(task, config)
    mx.random.seed(config.seed)  # dropout draws from MLX's global state
    resume = config.resume if resume is None else resume
    if not config.output_dir and not resume:
        while not walk.is_over():
            metrics = walk.advance()
            if on_step is not None:
                on_step(walk.step, dict(metrics))
        return walk.result()
    which = LATEST if resume is True else str(resume) if resume else None
    return _learn_in_folder(walk, config.replace(resume=which), on_step)


def _learn_in_folder(walk: Walk[Any], config: SupervisedConfig, on_step: OnStep | None) -> dict[str, Any]:
    """The same in a run folder, from a checkpoint to the next ones."""
    task = walk.task
    session = RunSession(config, task.stage, lambda: _described(task, config))
    saved = session.find(None)
    with session.open(saved) as stop:
        position = session.begin(WalkState(walk), saved)
        if position is not None:
            walk.go_on(*position)
        begun, recorder = walk.step, session.recorder
        assert recorder is not None
        with session.keeping_what_was_earned(
            task.save, lambda: walk.step if walk.step > begun else 0, in_words
        ):
            while not walk.is_over():
                metrics = walk.advance()
                recorder.on_step_end(walk.step, metrics)
                if on_step is not None:
                    on_step(walk.step, dict(metrics))
                if walk.is_over():
                    break
                if stop.reason is not None:
                    stopped = session.stop(stop.reason, *walk.position)
                    return {**walk.metrics, "run_folder": str(session.path), **stopped}
                if session.is_due(walk.step):
                    session.save_on_the_way(*walk.position)
            session.save_last(*walk.position)
        return {**walk.result(), "run_folder": str(session.path)}


def _described(task: Task[Any], config: SupervisedConfig) -> dict[str, Any]:
    trainable, total = count_parameters(task.trainer.module)
    return {
        "config": config.as_dict(),
        "stage": task.stage,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "backend": backend.describe(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy", "transformers")},
    }
