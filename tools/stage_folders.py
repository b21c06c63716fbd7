"""What makes a stage of a pipeline done: a stamp that names its inputs and its outputs by their contents.

A stage is skipped where its folder's stamp has the same inputs and every output is there unchanged. A stamp with the
same inputs and no outputs yet is of a stage that was interrupted, and goes on. Else what is in the folder is set aside
under another name, and the stage begins anew.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from config.errors import CheckpointError
from data_loading.token_files import prefix_of

STAMP = "stage.json"
_BLOCK = 1 << 22


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def contents(path: str | Path) -> Any:
    """What a file, a folder or the token files of a prefix hold, as hashes by name; else the name itself."""
    above = Path(path).expanduser()
    prefix = prefix_of(above)
    if prefix is not None:
        beside = Path(prefix).parent.glob(glob.escape(Path(prefix).name) + "_*")
        return {file.name: file_hash(file) for file in sorted(beside) if file.is_file()}
    if above.is_file():
        return file_hash(above)
    if above.is_dir():
        return {str(file.relative_to(above)): file_hash(file) for file in _files(above)}
    return str(path)


def _files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != STAMP)


def inputs_hash(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of settings and of the contents of the files that they name."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def is_complete(folder: Path, inputs: str) -> bool:
    """Whether a stage with these inputs has ended in ``folder`` and what it wrote is there, bit for bit."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        outputs = stamp["outputs"]
        return stamp["inputs"] == inputs and all(
            (folder / name).is_file() and file_hash(folder / name) == known for name, known in outputs.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def is_begun(folder: Path, inputs: str) -> bool:
    """Whether a stage with these inputs has begun in ``folder`` and not ended."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return bool(stamp["inputs"] == inputs) and "outputs" not in stamp
    except (OSError, ValueError, KeyError, TypeError):
        return False


def inputs_of(folder: Path) -> Any:
    """What the stage in ``folder`` was made from, as its stamp has it; None where it has none."""
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin(folder: Path, inputs: str) -> None:
    """Write down that a stage has begun; the first thing that happens to its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {"inputs": inputs})


def stamp(folder: Path, inputs: str) -> None:
    """Write down that the stage is done; the last thing that happens to its folder."""
    outputs = {str(file.relative_to(folder)): file_hash(file) for file in _files(folder)}
    _write(folder, {"inputs": inputs, "outputs": outputs})


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    unfinished = folder / f"{STAMP}.writing"
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(folder / STAMP)


def set_aside(folder: Path) -> Path | None:
    """Rename what is in the way of a stage, so that nothing is lost; where it is now, or None for nothing."""
    if not folder.exists():
        return None
    number = 1
    while (old := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    folder.rename(old)
    return old
