"""Writing that a crash, a full disk or a power cut leaves either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.platform == "darwin":
    import fcntl


def flush_to_disk(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":  # fsync there stops at the drive's own cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_strict_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that every reader reads: numbers that are not finite are marked, and read back as they were."""
    path.write_text(json.dumps(_encoded(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_strict_json(path: Path) -> Any:
    """What :func:`write_strict_json` wrote."""
    return _decoded(json.loads(path.read_text(encoding="utf-8")))


_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def _encoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encoded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(one) for one in value]
    if isinstance(value, float) and value != value:
        return {"not_finite": "NaN"}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"not_finite": "Infinity" if value > 0 else "-Infinity"}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"not_finite"}:
            return _NOT_FINITE[value["not_finite"]]
        return {key: _decoded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    return value
