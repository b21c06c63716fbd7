"""The machine and the process: memory, versions, the BLAS, compiled kernels, other ranks."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from base_setup import backend
from base_setup.memory_estimate import GB, USABLE
from diagnosis.findings import Finding, judged

#: The series that the tests run with; requirements.txt asks for them.
TESTED = {"mlx": "0.32", "mlx-lm": "0.32"}
#: What mlx.launch sets.
RANKS = ("MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE")
#: Below this the arrays of a run are small beside what MLX and Python take anyway, and their ratio tells nothing.
TELLING = 0.2 * GB


# Memory --------------------------------------------------------------------------------------------------


class MemoryUse(NamedTuple):
    """Bytes of a short run, measured and predicted, and what the whole run is predicted to take."""

    measured: int
    predicted: int
    whole_run: int


def machine_memory() -> int:
    """Bytes that arrays can have here: the GPU's own memory, else the machine's, or its container's limit."""
    if backend.device_kind() != "cpu":
        info = mx.device_info()
        for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if info.get(name):
                return int(info[name])
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def check_memory(use: MemoryUse, machine: int) -> Finding:
    """The whole run fits: its estimate, corrected by what the short one really took, against the machine."""
    factor = max(use.measured / use.predicted, 1.0) if use.predicted > TELLING else 1.0
    expected = use.whole_run * factor
    seen = (
        f"this short run {use.measured / GB:.2f} GB (estimate {use.predicted / GB:.2f}); the whole run "
        f"{expected / GB:.2f} GB of {machine / GB:.1f} GB"
    )
    advice = (
        "lower micro_batch_size or let max_memory_gb choose it, set gradient_checkpointing, or shorten "
        "max_new_tokens; main.py --dry-run says what each is worth"
    )
    if expected > machine:
        return Finding("memory", "fault", seen, advice)
    return judged("memory", expected <= USABLE * machine, seen, advice, otherwise="warning")


# The process ---------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """What ``check_environment`` judges, so that a test can ask about another machine."""

    versions: Mapping[str, str]
    backend: str  # as base_setup.backend.describe says it
    variables: Mapping[str, str]
    shared_kernels: Path  # where MLX keeps the kernels that it compiles, if nobody moves the folder
    has_compiler: bool
    on_cpu: bool


def this_process() -> Process:
    """The process as it is."""
    names = ("mlx", "mlx-lm", "numpy", "transformers")
    versions = {name: version(name) for name in names}
    return Process(
        versions,
        backend.describe(),
        dict(os.environ),
        Path(tempfile.gettempdir()) / "mlx",
        shutil.which("g++") is not None,
        backend.device_kind() == "cpu",
    )


def check_environment(process: Process) -> list[Finding]:
    """Versions and BLAS, the kernel cache, and whether somebody thinks that there are several ranks."""
    return [_check_backend(process), _check_kernels(process), _check_ranks(process.variables)]


def _check_backend(process: Process) -> Finding:
    listed = ", ".join(f"{name} {number}" for name, number in process.versions.items())
    seen = f"{process.backend}; {listed}"
    untested = [
        name for name, series in TESTED.items() if not process.versions[name].startswith(series + ".")
    ]
    if untested:
        wanted = " ".join(f'"{name}=={TESTED[name]}.*"' for name in untested)
        return Finding("backend", "warning", seen, f"tested is another version; pip install {wanted}")
    slow = process.on_cpu and ("reference BLAS" in process.backend or "no GPU found" in process.backend)
    return judged(
        "backend",
        not slow,
        seen,
        "matrix products are 20 to 100 times slower than they need be; ./run setup installs a fast BLAS",
        otherwise="warning",
    )


def _check_kernels(process: Process) -> Finding:
    name, compiling = "compiled kernels", process.variables.get("MLX_DISABLE_COMPILE") in (None, "0")
    if not process.on_cpu:
        return Finding(name, "ok", "compiled by the GPU's own driver")
    private = "mlx-ppo-kernels-" in process.variables.get("TMPDIR", "")
    damaged = damaged_libraries(process.shared_kernels.rglob("*.so"))
    seen = "compiled in a folder of this process's own" if private else "compiled where all processes do"
    seen = f"{seen if compiling else 'not used'}; {len(damaged)} damaged in {process.shared_kernels}"
    if damaged:
        return Finding(
            name,
            "fault" if compiling and not private else "warning",
            seen,
            f"MLX loads a truncated kernel as it is and dies of SIGBUS in every program that compiles: "
            f"remove {damaged[0]}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""),
        )
    return judged(
        name,
        not compiling or process.has_compiler,
        seen,
        "there is no g++, without which MLX computes uncompiled; leave MLX_DISABLE_COMPILE unset",
        otherwise="warning",
    )


def damaged_libraries(files: Iterable[Path]) -> list[Path]:
    """Those of some shared libraries that are shorter than their ELF header says, or have none."""
    return [path for path in sorted(files) if not _is_whole(path)]


def _is_whole(path: Path) -> bool:
    """Whether a 64-bit little-endian ELF file reaches to the end of its table of sections, which stands last."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(64)
    except OSError:
        return True  # gone, or not ours to read
    if header[:4] == b"\xcf\xfa\xed\xfe":  # Mach-O says its size in another way; macOS computes on the GPU
        return True
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (sections_at,) = struct.unpack_from("<Q", header, 40)  # e_shoff
    entry_size, entries = struct.unpack_from("<HH", header, 58)  # e_shentsize, e_shnum
    return bool(size >= sections_at + entry_size * entries)


def _check_ranks(variables: Mapping[str, str]) -> Finding:
    """A run is one process. Started as several, each would train alone and write over the others."""
    found = {name: variables[name] for name in RANKS if name in variables}
    return judged(
        "one process",
        not found or found.get("MLX_WORLD_SIZE") == "1",
        ", ".join(f"{name}={value}" for name, value in found.items()) or f"none of {', '.join(RANKS)} is set",
        "a run is one process: each rank would train alone and write the same files; start python main.py without "
        "mlx.launch, or unset these variables",
    )
