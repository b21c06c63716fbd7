"""One run in its folder: whose it is, what it goes on from, when it saves, how it ends before its end."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from checkpointing.resuming import LATEST, check_changes, find_resume, plain_config, read_state, run_folder_of
from checkpointing.stopping import StopRequest, say
from checkpointing.store import CheckpointStore, Saved
from config.errors import CheckpointError, RewardError, ToolkitError, TrainingRuntimeError
from config.training_config import TrainingConfig
from monitoring.recorder import RunRecorder
from monitoring.run_folder import default_folder, prepare_folder, refuse_used, set_aside, write_json
from monitoring.run_lock import RunLock

Counters = Mapping[str, int]
Progress = Mapping[str, Any]


class Resumable(Protocol):
    """Everything that the rest of a run depends on."""

    @property
    def size(self) -> int:
        """About how many bytes :meth:`write` writes."""

    def write(self, folder: Path, counters: Counters, progress: Progress) -> None:
        """Write it to ``folder``, with a ``state.json`` that has counters, progress and config."""

    def read(self, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
        """Make everything what it was when ``folder`` was written; returns counters and progress."""


class RunSession:
    """A trainer's hold on its run folder, over all calls of ``train``.

        saved = session.find(resume)
        with session.open(saved) as stop:
            position = session.begin(state, saved)      # None: from the beginning
            ...                                         # after each step: stop.reason, session.is_due(step)
            session.save("final", {"step": step}, progress)

    Args:
        stage: the command that runs it; a checkpoint of another one is refused.
        describe: what is written down of the run, as ``config.json`` and into each checkpoint.
        described_in: the name of that file in a checkpoint. name: for a folder that nobody named; None = ``stage``.
    Attributes:
        folder: None until there is one. recorder: of ``metrics.jsonl`` and ``samples.jsonl``; None until it is open.
        saved_at: the step of the newest checkpoint; 0: there is none.
    Raises:
        CheckpointError: ``output_dir`` cannot be written to, or holds a run that is not to be continued.
    """

    def __init__(
        self,
        config: TrainingConfig,
        stage: str,
        describe: Callable[[], Mapping[str, Any]],
        described_in: str = "run_config.json",
        name: str | None = None,
    ) -> None:
        self.config, self.stage, self.name = config, stage, name or stage
        self.describe, self.described_in = describe, described_in
        self.folder: Path | None = None
        self.recorder: RunRecorder | None = None
        self.saved_at = 0
        self._state: Resumable | None = None
        self._older_weights: list[Path] = []  # what the run left before it went on
        if config.output_dir:
            # With checkpoints in it, train(resume=True) may be meant; if it is not, open() refuses.
            stored = CheckpointStore(Path(config.output_dir).expanduser()).complete()
            self.folder = prepare_folder(config.output_dir, goes_on=bool(config.resume or stored))

    @property
    def path(self) -> Path:
        """The folder of a run that has been opened."""
        assert self.folder is not None
        return self.folder

    @property
    def store(self) -> CheckpointStore:
        """Its checkpoints."""
        config = self.config
        return CheckpointStore(
            self.path,
            keep_last_n=config.keep_last_n,
            keep_best=config.keep_best,
            min_free_gb=config.min_free_gb,
        )

    # -- Beginning ------------------------------------------------------------------------------------

    def find(self, resume: bool | str | Path | None) -> Saved | None:
        """The checkpoint to go on from, checked; None: from the beginning.

        Args:
            resume: True, the newest in the folder; a run folder; a checkpoint. None = as the config says, the first
                time.
        """
        if resume is None and self.recorder is None:
            resume = self.config.resume
        if resume is None or resume is False:
            return None
        which = LATEST if resume is True else resume
        return find_resume(which, self.folder, fallback=self.config.resume_fallback)

    @contextmanager
    def open(self, saved: Saved | None) -> Iterator[StopRequest]:
        """Within the block the folder is this run's alone, and the first signal is a wish to stop.

        Raises:
            CheckpointError: another run is in the folder, now or from before. InvalidConfigurationError: the config
                has changed, and what ``saved`` holds does not fit.
        """
        if self.folder is None:
            folder = run_folder_of(saved.path) if saved is not None else default_folder(self.name)
            self.folder = prepare_folder(folder, goes_on=saved is not None)
        lock = RunLock(self.folder)
        lock.acquire()
        try:
            with StopRequest(self.folder) as stop:
                self._check(saved)
                if self.recorder is None:
                    config = self.config
                    self.recorder = RunRecorder(
                        self.folder, config.log_samples_every, config.max_logged_samples
                    )
                yield stop
        finally:
            lock.release()

    def _check(self, saved: Saved | None) -> None:
        """Refuse a folder with another run, and a checkpoint that the config does not fit; say what has changed."""
        if saved is None:
            if self.recorder is None and self.config.resume == LATEST:
                for path in set_aside(self.path):
                    say(
                        f"resume: no checkpoint was complete yet, so the run begins anew; its lines are in {path}"
                    )
            if self.recorder is None:
                refuse_used(self.path)
            return
        state = read_state(saved.path)
        if (other := state.get("stage", self.stage)) != self.stage:
            raise CheckpointError(
                f"resume: {saved.path} is of a run of {other}, and this one is of {self.stage}; give a checkpoint of "
                f"{self.stage}, or start from the other's weights with adapter_path"
            )
        for change in check_changes(state["config"], plain_config(self.config)):
            say(f"WARNING: resume: {change}; from here on the run is not the one that was interrupted")
        if run_folder_of(saved.path) != self.path.resolve():
            refuse_used(self.path)

    def begin(self, state: Resumable, saved: Saved | None) -> tuple[dict[str, int], dict[str, Any]] | None:
        """Make ``state`` and the run's files what they were at ``saved``; returns counters and progress.

        Raises:
            CheckpointError: it is of another model or other rows. The files are then as they were.
        """
        self._state, position = state, None
        if saved is not None:
            position = state.read(saved.path)
            assert self.recorder is not None
            self.recorder.go_on_from(saved.update, position[1]["files"], run_folder_of(saved.path))
            self.saved_at = saved.update
            self._older_weights = [self.path / name for name in ("final", "interrupted")]
            if self.config.verbose:
                say(f"going on after step {saved.update}, from {saved.path}")
        self.store.clear_leftovers()
        write_json(self.path / "config.json", self.describe())
        return position

    # -- Saving ---------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is made after this step, which is not the last."""
        return self.config.save_every > 0 and step % self.config.save_every == 0

    def save(self, reason: str, counters: Counters, progress: Progress, score: float = math.nan) -> Saved:
        """Write a checkpoint.

        Args:
            counters: ``step`` among them. score: what ``keep_best`` goes by, higher is better; NaN: not known.
        Raises:
            CheckpointError: it could not be written. The ones before it are untouched.
        """
        state, recorder = self._state, self.recorder
        assert state is not None
        assert recorder is not None
        position = {**progress, "files": recorder.sizes()}

        def fill(folder: Path) -> None:
            state.write(folder, counters, position)
            write_json(folder / self.described_in, self.describe())

        step = counters["step"]
        saved = self.store.save(
            reason, step, fill, size=state.size, score=None if math.isnan(score) else score
        )
        self.saved_at = step
        return saved

    def save_on_the_way(self, counters: Counters, progress: Progress, score: float = math.nan) -> None:
        """A checkpoint that cannot be written is no reason to lose the run: it goes on, and says so."""
        try:
            self.save("periodic", counters, progress, score)
            self._set_aside_older_weights()
        except CheckpointError as error:
            say(f"WARNING: {error}; the run goes on without it")

    def save_last(self, counters: Counters, progress: Progress, score: float = math.nan) -> None:
        """The checkpoint of a run that is done, unless it has one already or wants none."""
        if self.config.save_every and counters["step"] > self.saved_at:
            self.save("final", counters, progress, score)

    def _set_aside_older_weights(self) -> None:
        """What the run left when it ended before must not be taken for its newest weights, now that there are newer."""
        for path in self._older_weights:
            target, number = path.with_name(f"{path.name}.older-1"), 1
            while target.exists():
                number += 1
                target = path.with_name(f"{path.name}.older-{number}")
            with contextlib.suppress(OSError):
                path.rename(target)
        self._older_weights = []

    def stop(
        self, reason: str, counters: Counters, progress: Progress, score: float = math.nan
    ) -> dict[str, str]:
        """Save where the run stands and say where; returns what its result says of it."""
        path = self.save(reason, counters, progress, score).path
        self._set_aside_older_weights()
        say(
            f"stopped after step {counters['step']} ({reason}); saved in {path}\n"
            f"go on from there: --resume {shlex.quote(str(self.path))}"
        )
        return {"stopped": reason, "checkpoint": str(path)}

    # -- Failing --------------------------------------------------------------------------------------

    @contextmanager
    def keeping_what_was_earned(
        self,
        save_model: Callable[[Path], None],
        learned: Callable[[], int],
        in_words: Callable[[BaseException], BaseException],
    ) -> Iterator[None]:
        """Whatever ends the block early, the weights are saved first and the message says where.

        Args:
            learned: steps that have been learned from; 0: there is nothing to save.
            in_words: gives the error to raise in place of one that nobody could read, or the same.
        """
        try:
            yield
        except BaseException as caught:
            error = in_words(caught)
            if learned() == 0:
                if error is caught:
                    raise
                raise error from caught
            saved = self._save_interrupted(save_model, learned())
            told = f"{str(error).rstrip('.')}. {saved}"
            if isinstance(error, RewardError):
                raise RewardError(told) from error
            if isinstance(error, ToolkitError):
                raise TrainingRuntimeError(told) from error
            say(saved)
            raise

    def _save_interrupted(self, save_model: Callable[[Path], None], step: int) -> str:
        """Save, and say so; a second failure must not hide the first."""
        folder = self.path / "interrupted"
        try:
            save_model(folder)
        except (ToolkitError, OSError, MemoryError, RuntimeError) as error:
            said = f"What was learned could not be saved either: {str(error) or type(error).__name__}."
        else:
            said = f"What was learned so far is in {folder} (after step {step})."
        if self.saved_at:
            said += f" With --resume {shlex.quote(str(folder.parent))} the run goes on after step {self.saved_at}."
        return said
