"""What every worker shares: the job it is given, the record it hands back, and the reward.

The standard library alone, since a worker runs in the environment of the system that it measures. One process, one
job: ``python -m benchmarks.peers.worker_trl job.json`` reads the job and writes ``job["result"]``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One system's work: ``warm_up + steps`` steps of ``len(prompts) * group`` completions."""

    system: str
    kind: str  # grpo, ppo or rollout
    model: str  # a folder
    prompts: list[str]
    completion: int  # tokens, exactly
    group: int
    warm_up: int
    steps: int
    learning_rate: float
    seed: int
    scratch: str  # a folder for whatever the system insists on writing
    result: str  # a file
    rows: list[int] = field(default_factory=list)  # kind rollout: how many completions at once, each measured

    @property
    def batch(self) -> int:
        return len(self.prompts) * self.group

    @classmethod
    def read(cls, path: str | Path) -> Job:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Step:
    """One timed step. ``rollout`` is None where the system does not show it."""

    rows: int
    seconds: float
    rollout: float | None
    tokens: int  # that were generated
    widest: int  # the longest completion, in tokens
    narrowest: int
    cpu: float  # seconds of processor time, all threads together
    kernel: (
        float  # of which in the kernel: where it is most of it, memory is being mapped and little is computed
    )
    others: (
        float  # cores that everything else on the machine kept busy meanwhile; 0 where that cannot be seen
    )


class Record:
    """The steps of one job and what they ran on."""

    def __init__(self, job: Job, packages: Iterable[str], notes: Sequence[str] = ()) -> None:
        self.job = job
        self.packages = list(packages)
        self.notes = list(notes)
        self.steps: list[Step] = []
        self._used = processor_time()
        self._busy = busy_time()
        self._read = time.perf_counter()

    def add(self, seconds: float, rollout: float | None, lengths: Sequence[int]) -> None:
        """One step, by the lengths in tokens of the completions that it made."""
        used, busy, read = processor_time(), busy_time(), time.perf_counter()
        cpu, kernel = (now - then for now, then in zip(used, self._used, strict=True))
        others = max(busy - self._busy - cpu, 0.0) / (read - self._read)
        self._used, self._busy, self._read = used, busy, read
        self.steps.append(
            Step(
                len(lengths), seconds, rollout, sum(lengths), max(lengths), min(lengths), cpu, kernel, others
            )
        )

    def write(self) -> None:
        """The result, as the driver reads it."""
        content = {
            "steps": [asdict(step) for step in self.steps],
            "peak_bytes": peak_memory(),
            "versions": {name: importlib.metadata.version(name) for name in self.packages},
            "blas": loaded_blas(),
            "notes": self.notes,
        }
        Path(self.job.result).write_text(json.dumps(content, indent=1), encoding="utf-8")


class Stopwatch:
    """Seconds spent in calls of one function, and what the last call returned."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0
        self.returned: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self.returned = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return self.returned

    def take(self) -> float:
        """The seconds since the last call of this."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def even_words(completions: Sequence[str], **columns: Any) -> list[float]:
    """The reward: how many words name an even token. Trivial to work out, and it differs within a group."""
    return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]


def processor_time() -> tuple[float, float]:
    """Seconds of processor time so far, and those of them in the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_stime


def busy_time() -> float:
    """Seconds of processor time that the whole machine has used since it started; 0 where Linux's count is not."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, interrupts, soft = (int(field) for field in fields[:7])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
    """The most memory this process has held, in bytes.

    On Linux the kernel's own count for this program: the rusage of a child begins with what its parent held.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def loaded_blas() -> list[str]:
    """File names of the BLAS libraries in this process, by what is mapped; empty where that cannot be seen."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    files = {os.path.basename(line.split()[-1]) for line in mapped.splitlines() if "/" in line}
    return sorted(
        name
        for name in files
        if any(word in name for word in ("blas", "mkl", "libtorch_cpu"))
        and not name.startswith("libscipy_openblas64_")  # NumPy's own, out of MLX's sight
    )


def the_job() -> Job:
    """The one named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python -m {__spec__.name if __spec__ else 'worker'} JOB.json")
    return Job.read(sys.argv[1])
