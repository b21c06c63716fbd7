"""The folder of a run: made, proved writable and not taken, before anything is computed for it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.errors import CheckpointError


def prepare_folder(name: str | Path, *, goes_on: bool = False) -> Path:
    """Make the run folder ``output_dir``, or say why it cannot be used.

    Args:
        goes_on: a run in it is to be continued, or may be.
    Raises:
        CheckpointError: it cannot be written to, or another run is in it.
    """
    folder = writable_folder(name, "output_dir")
    if not goes_on:
        refuse_used(folder)
    return folder


def refuse_used(folder: Path) -> None:
    """Refuse a folder with a run in it.

    Raises:
        CheckpointError: naming it.
    """
    if (folder / "metrics.jsonl").exists():
        raise CheckpointError(
            f'output_dir: "{folder}" already holds a run (metrics.jsonl), and a second one would mix with it; go on '
            "with that one (--resume, resume = latest), choose another folder, or remove it"
        )


def set_aside(folder: Path) -> list[Path]:
    """Rename the lines of a run that never got to a checkpoint, so that another may begin; where they are now."""
    moved = []
    for name in ("metrics", "samples"):
        path, number = folder / f"{name}.jsonl", 1
        while (target := folder / f"{name}.abandoned-{number}.jsonl").exists():
            number += 1
        if path.exists():
            path.rename(target)
            moved.append(target)
    return moved


def writable_folder(name: str | Path, option: str) -> Path:
    """Make a folder and prove that files can be written to it.

    Raises:
        CheckpointError: they cannot; the sentence begins with ``option``.
    """
    try:
        folder = Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it; ~ of nobody
        raise CheckpointError(
            f'{option}: "{name}" cannot be written to ({getattr(error, "strerror", None) or error}); choose another '
            "folder"
        ) from error
    return folder


def default_folder(stage: str) -> Path:
    """``runs/STAGE-DATE-TIME``, with a number where two runs start within a second."""
    folder = Path("runs") / f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON; a kill leaves the file as it was, or as it is to be.

    Raises:
        CheckpointError: naming the path.
    """
    beside = path.with_name(f".partial-{path.name}")
    try:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: could not be written ({error.strerror or error})") from error
