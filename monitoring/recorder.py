"""The callback that writes a run down: ``metrics.jsonl`` and ``samples.jsonl`` in its folder.

    PPOTrainer(config, callbacks=[RunRecorder("runs/digits")])

Training steps are written as they come, under the trainer's own metric names. The other moments carry
a ``kind`` (``evaluate``, ``epoch`` or ``end``) and prefixed names, so that a mean over an epoch is
never mistaken for the value of a step: ``eval/reward``, ``epoch/reward``, ``final/reward``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monitoring.metrics_file import MetricsFile
from monitoring.samples import SamplesFile


class RunRecorder:
    """Write every step's metrics, and a few samples of every ``log_samples_every``-th step (0: none)."""

    def __init__(self, folder: str | Path, log_samples_every: int = 1, max_logged_samples: int = 5) -> None:
        self.folder = Path(folder)
        self.log_samples_every = log_samples_every
        self.max_logged_samples = max_logged_samples
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")
        self.samples = SamplesFile(self.folder / "samples.jsonl")
        self._step = 0

    def sizes(self) -> dict[str, int]:
        """Bytes of each file so far: where a run that is resumed goes on writing."""
        return {file.path.name: file.size for file in (self.metrics, self.samples)}

    def go_on_from(self, step: int, sizes: Mapping[str, int], folder: Path) -> None:
        """Make the files what they were at :meth:`sizes`, so that no line is missing and none is there twice.

        Args:
            folder: where the run was; from another one the lines so far are copied.
        """
        self._step = step
        for file in (self.metrics, self.samples):
            size, before = sizes[file.path.name], folder / file.path.name
            if folder.resolve() == self.folder.resolve():
                file.cut_to(size)
            elif before.is_file():
                with open(before, "rb") as lines:
                    file.path.write_bytes(lines.read(size))

    def on_train_begin(self, trainer: Any) -> None:
        """Nothing to prepare: the files are made, or continued, with their first line."""

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line per training step."""
        self._step = step
        self.metrics.write({"step": step, **metrics})

    def on_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Dicts with the fields of ``monitoring.samples.FIELDS``."""
        if self.log_samples_every > 0 and step % self.log_samples_every == 0:
            self.samples.write(step, samples[: self.max_logged_samples])

    def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Held-out numbers after ``step`` steps."""
        self.metrics.write({"step": step, "kind": "evaluate", **_prefixed("eval/", metrics)})

    def on_epoch_end(self, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Numbers of a whole epoch."""
        self.metrics.write(
            {"step": self._step, "epoch": epoch, "kind": "epoch", **_prefixed("epoch/", metrics)}
        )

    def on_train_end(self, metrics: Mapping[str, Any] | None = None) -> None:
        """The last line of the run: its last numbers, and not what stands in the lines above anyway."""
        numbers = {k: v for k, v in (metrics or {}).items() if k not in ("history", "run_folder")}
        self.metrics.write({"step": self._step, "kind": "end", **_prefixed("final/", numbers)})


def _prefixed(prefix: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key if key.startswith(prefix) else prefix + key: value for key, value in metrics.items()}
