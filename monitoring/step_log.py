"""What the command line and the demo listen to while a stage trains: a line in a file, a word on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from monitoring.console import Progress
from monitoring.metrics_file import MetricsFile


class StageProgress:
    """Called after each step of a supervised stage: shows some of its metrics.

    Args:
        shown: metric → the label under which the progress line has it.
    """

    def __init__(self, progress: Progress, shown: Mapping[str, str]) -> None:
        self.progress = progress
        self.shown = shown

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.update(
            step, "  ".join(f"{label} {metrics[key]:.3f}" for key, label in self.shown.items())
        )


class StepLog(StageProgress):
    """The same, and writes all of them down, for a stage that has no run folder of its own.

    Args:
        path: ``metrics.jsonl`` of the stage; its folder is made.
    """

    def __init__(self, path: Path, progress: Progress, shown: Mapping[str, str]) -> None:
        super().__init__(progress, shown)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = MetricsFile(path)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.file.write({"step": step, **metrics})
        super().__call__(step, metrics)


class StepProgress:
    """A callback of ``PPOTrainer``: reward, KL and entropy on the progress line as training goes on."""

    SHOWN: Mapping[str, str] = {"reward": "reward", "objective/kl": "kl", "entropy": "entropy"}

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of progress; a step in which only the critic learns has no entropy."""
        parts = [f"{label} {metrics[key]:.2f}" for key, label in self.SHOWN.items() if key in metrics]
        self.progress.update(step, "  ".join(parts))
