"""The checkpoints of a run: ``checkpoint_{YYYYmmdd_HHMMSS}_{reason}_update_{n}`` in its folder, whole or not there.

A checkpoint is written to a folder beside, ``.partial-…``. Its files are flushed to disk; ``manifest.json``, with the
size and SHA-256 of each, comes last; then the folder gets its name. What has no manifest that fits is not a checkpoint.
Which one is newer is the manifest's ``sequence``, not the clock, which may be set back. ``latest`` is a link for
people and for ``--adapter-path``; nothing here trusts it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing.durable import flush_to_disk, read_strict_json, sha256_of, write_strict_json
from config.errors import CheckpointError

MANIFEST, LATEST, PARTIAL = "manifest.json", "latest", ".partial-"
FORMAT = 1
_NAME = re.compile(r"checkpoint_\d{8}_\d{6}_[A-Za-z0-9-]+_update_\d+(-\d+)?")


@dataclass(frozen=True)
class Saved:
    """A checkpoint by its manifest; :meth:`check` reads the files themselves."""

    path: Path
    sequence: int  # counts up over the checkpoints of a run
    reason: str
    update: int  # batches that had been learned from
    score: float | None  # what keep_best goes by: higher is better
    files: dict[str, dict[str, Any]]  # name → bytes, sha256

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def check(self) -> None:
        """Read every file and compare it with the manifest.

        Raises:
            CheckpointError: naming the first file that is missing, too short, too long, or not what was written, or
                a link: what is read must be what lies in this folder.
        """
        for path in sorted(self.path.rglob("*")):
            if path.is_symlink():
                raise CheckpointError(
                    f"{path}: a link (to {os.readlink(path)}); a checkpoint has its files themselves in its folder"
                )
        for name, entry in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise CheckpointError(f"{path}: the file is missing")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise CheckpointError(f"{path}: {size} bytes are there, {entry['bytes']} were written")
            if sha256_of(path) != entry["sha256"]:
                raise CheckpointError(
                    f"{path}: the contents are not what was written (their SHA-256 differs)"
                )


class CheckpointStore:
    """Writes, lists, checks and clears away the checkpoints in one run folder."""

    def __init__(
        self, folder: Path, *, keep_last_n: int = 3, keep_best: bool = True, min_free_gb: float = 0.0
    ) -> None:
        self.folder = folder
        self.keep_last_n = keep_last_n
        self.keep_best = keep_best
        self.min_free_gb = min_free_gb

    # -- Writing --------------------------------------------------------------------------------------

    def save(
        self,
        reason: str,
        update: int,
        fill: Callable[[Path], None],
        *,
        size: int = 0,
        score: float | None = None,
    ) -> Saved:
        """Write a checkpoint, point ``latest`` to it, and clear away what is no longer kept.

        Args:
            fill: writes the files into the folder that it is given.
            size: bytes that it is about to write, for the check of the free space.
        Raises:
            CheckpointError: naming the path and the bytes needed. What was there before is untouched.
        """
        self._check_space(size)
        partial = self.folder / f"{PARTIAL}{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            fill(partial)
            manifest = self._describe(partial, reason, update, score)
            write_strict_json(partial / MANIFEST, manifest)
            for path in sorted(partial.rglob("*"), reverse=True):  # files before the folders they are in
                flush_to_disk(path)
            flush_to_disk(partial)
            path = self._new_name(reason, update)
            os.rename(partial, path)
            flush_to_disk(self.folder)
        except (OSError, RuntimeError, CheckpointError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise CheckpointError(
                f"{self.folder}: the checkpoint of update {update} ({_amount(size)}) could not be written ({why}); "
                "free some space or choose another output_dir. The checkpoints before it are untouched"
            ) from error
        self._point_latest_to(path)
        self.prune()
        return Saved(path, manifest["sequence"], reason, update, score, manifest["files"])

    def _check_space(self, size: int) -> None:
        above = next(one for one in (self.folder, *self.folder.parents) if one.exists())
        free = shutil.disk_usage(above).free
        if free < size + self.min_free_gb * 1e9:
            raise CheckpointError(
                f"{self.folder}: a checkpoint needs {_amount(size)} and min_free_gb = {self.min_free_gb:g} is to stay "
                f"free, but only {_amount(free)} are; free some space, or lower keep_last_n or min_free_gb. The "
                "checkpoints before it are untouched"
            )

    def _describe(self, partial: Path, reason: str, update: int, score: float | None) -> dict[str, Any]:
        names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256_of(partial / name)}
            for name in names
        }
        sequence = max((saved.sequence for saved in self.complete()), default=0) + 1
        return {
            "format": FORMAT,
            "sequence": sequence,
            "reason": reason,
            "update": update,
            "score": score,
            "files": files,
        }

    def _new_name(self, reason: str, update: int) -> Path:
        name = f"checkpoint_{time.strftime('%Y%m%d_%H%M%S')}_{reason}_update_{update}"
        path, number = self.folder / name, 1
        while path.exists():
            number += 1
            path = self.folder / f"{name}-{number}"
        return path

    def _point_latest_to(self, path: Path) -> None:
        link = self.folder / f"{PARTIAL}link-{os.getpid()}"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.folder / LATEST)
        except OSError:  # a file system without links: the names and manifests say the same
            link.unlink(missing_ok=True)

    # -- Looking --------------------------------------------------------------------------------------

    def complete(self) -> list[Saved]:
        """Every checkpoint with a manifest that can be read, the newest last; the files are not looked at."""
        found = [saved for path in self._folders() if (saved := _read(path)) is not None]
        return sorted(found, key=lambda saved: (saved.sequence, saved.path.name))

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [
            p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()
        ]

    def newest(self, *, fallback: bool = False, say: Callable[[str], None] = print) -> Saved | None:
        """The newest checkpoint, its files checked; None where there is none.

        Args:
            fallback: go back to the one before where files are damaged, saying so.
        Raises:
            CheckpointError: the newest is damaged, and ``fallback`` is not set or no other is whole.
        """
        broken = [p for p in self._folders() if _read(p) is None]
        candidates = self.complete()
        problems = [f"{path / MANIFEST}: missing, or not a manifest" for path in broken]
        if broken and not fallback and (not candidates or _update_in(broken) > candidates[-1].update):
            raise CheckpointError(_choose_another(problems[0], candidates))
        while candidates:
            saved = candidates.pop()
            try:
                saved.check()
            except CheckpointError as error:
                problems.append(str(error))
                if not fallback:
                    raise CheckpointError(_choose_another(str(error), candidates)) from error
                continue
            for problem in problems:
                say(f"WARNING: {problem}; going on from {saved.path.name} instead")
            return saved
        if problems:
            raise CheckpointError(f"{problems[-1]}; no whole checkpoint is left in {self.folder}")
        return None

    def prune(self) -> None:
        """Delete all but the newest ``keep_last_n``, the best of those with a score, and the last whole one."""
        saved = self.complete()
        kept = {one.path for one in saved[-max(self.keep_last_n, 1) :]}
        scored = [one for one in saved if one.score is not None]
        if self.keep_best and scored:
            kept.add(max(scored, key=lambda one: (one.score or 0.0, one.sequence)).path)
        for one in saved:
            if one.path not in kept:
                self._delete(one.path)

    def _delete(self, path: Path) -> None:
        """Without its name first, so that a crash half-way leaves no half of a checkpoint."""
        doomed = self.folder / f"{PARTIAL}old-{os.getpid()}"
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
        except OSError:  # somebody has it open, or has taken it away: no reason to end a run
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def clear_leftovers(self) -> None:
        """Remove what a crash left half-written. Only for who holds the run's lock."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            if path.is_symlink() or path.is_file():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)


def open_checkpoint(path: Path) -> Saved:
    """The checkpoint in one folder, its files checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(
            f'resume: there is no folder "{path}"; give a run folder or one of its checkpoints'
        )
    saved = _read(path.resolve())
    if saved is None:
        raise CheckpointError(
            f'resume: "{path}" holds no checkpoint ({MANIFEST} is missing or cannot be read); give a run folder or one '
            "of its checkpoints"
        )
    saved.check()
    return saved


def _read(path: Path) -> Saved | None:
    try:
        manifest = read_strict_json(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return None
        files = {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            return None  # a manifest may name nothing outside its folder
        score = manifest["score"]
        return Saved(
            path,
            int(manifest["sequence"]),
            str(manifest["reason"]),
            int(manifest["update"]),
            None if score is None else float(score),
            files,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _update_in(folders: list[Path]) -> int:
    return max(int(re.sub(r"-\d+$", "", path.name).rpartition("_")[2]) for path in folders)


def _choose_another(problem: str, others: list[Saved]) -> str:
    if not others:
        return f"{problem}, so this checkpoint cannot be gone on from, and there is no other"
    before = others[-1]
    return (
        f"{problem}, so this checkpoint cannot be gone on from; the one before it is {before.path.name} (update "
        f"{before.update}): --resume-fallback (resume_fallback = true) takes it"
    )


def _amount(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
