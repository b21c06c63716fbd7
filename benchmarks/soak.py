"""A run that is killed again and again, and whether anything of it is lost: ``python -m benchmarks.soak --kills 100``.

One run goes through undisturbed. Another of the same config is killed with SIGKILL, at random moments of its start, of
sampling, of learning and of writing a checkpoint by turns of chance, and started again each time with
``resume = latest``. At the end the two are compared: every line of metrics.jsonl but for its times, every line of
samples.jsonl, and every byte of the trained weights. After each kill every checkpoint that was complete is read again,
and so is what the metrics held at the newest of them.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import argparse
import json
import mmap
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpointing.durable import read_strict_json, sha256_of
from checkpointing.store import PARTIAL, CheckpointStore
from config.errors import CheckpointError

BEGUN = "training begins"
#: What a life is doing, as it says in one byte that its killer reads too.
PHASES = ("starting", "sampling", "learning", "checkpoint", "between")
STARTING, SAMPLING, LEARNING, CHECKPOINT, BETWEEN = range(len(PHASES))
#: How often a life is killed in each; of "between" come those that were meant for another.
AIMS = (1, 3, 3, 3, 0)
#: Seconds into the phase that is aimed at, at most; a step of the run is about as long.
DEPTH = 0.02
PROMPTS = [f"prompt {i}" for i in range(7)]


def letters(completions: Sequence[str], **columns: Any) -> list[float]:
    """How many different characters a completion has, in tens."""
    return [len(set(text)) / 10 for text in completions]


@contextmanager
def _phase_of(folder: Path) -> Iterator[mmap.mmap]:
    """The byte, in memory that two processes share: it costs nothing, and stays when one of them is killed."""
    path = folder.with_suffix(".phase")
    if not path.exists():
        path.write_bytes(bytes([STARTING]))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 1) as byte:
        yield byte


def live(folder: Path, steps: int, algorithm: str) -> None:
    """One life of the run: from its newest checkpoint to its end, unless it is killed before."""
    from config.model_config import ModelConfig
    from config.ppo_config import PPOConfig
    from ppo_trainer.ppo_trainer import PPOTrainer

    class Watched:
        """Says what its trainer does."""

        def __init__(self, phase: mmap.mmap) -> None:
            self.phase = phase

        def on_train_begin(self, trainer: PPOTrainer) -> None:
            for number, owner, method in (
                (SAMPLING, trainer, "generate"),
                (LEARNING, trainer, "update"),
                (CHECKPOINT, trainer._session, "save"),
            ):
                setattr(owner, method, self._within(number, getattr(owner, method)))
            print(BEGUN, flush=True)

        def _within(self, number: int, method: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                self.phase[0] = number
                try:
                    return method(*arguments, **options)
                finally:
                    self.phase[0] = BETWEEN

            return call

    config = PPOConfig(
        algorithm=algorithm,
        model_name="embedded",
        embedded_model=ModelConfig.tiny(),
        lora_r=4,
        batch_size=2,
        group_size=1 if algorithm == "ppo" else 2,
        max_new_tokens=8,
        num_steps=steps,
        learning_rate=1e-3,
        score_scaling="norm",
        log_samples_every=1,
        save_every=1,
        min_free_gb=0,
        output_dir=str(folder),
        resume="latest",
        verbose=False,
    )
    with _phase_of(folder) as phase:
        phase[0] = STARTING
        PPOTrainer(config, reward_model=letters).train(PROMPTS, callbacks=[Watched(phase)])


def _start(folder: Path, steps: int, algorithm: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.soak", "--live", str(folder)]
    command += ["--steps", str(steps), "--algorithm", algorithm]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class Soak:
    """Kills, and what they did.

    Attributes:
        killed: kills by what the life was doing, a name of ``PHASES``.
        anew: lives after a kill that found no complete checkpoint yet. resumes: lives that began from one.
        half_written: kills that left a checkpoint without its end.
        lost: bytes of metrics.jsonl and samples.jsonl that a checkpoint stood for and that were gone after a kill.
        damaged: complete checkpoints that could not be read any more.
    """

    def __init__(self, folder: Path, steps: int, algorithm: str, seed: int, longest: float) -> None:
        self.folder, self.steps, self.algorithm, self.longest = folder, steps, algorithm, longest
        self.store = CheckpointStore(folder)
        self.random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.anew = self.resumes = self.half_written = self.lost = self.damaged = 0
        self._start_up = 1.0  # seconds from a life's beginning to its training, as the last one took

    @property
    def kills(self) -> int:
        """All of them."""
        return self.killed.total()

    def run(self, kills: int, seconds: float) -> bool:
        """Kill it so often, or for so long, then let it come to its end; whether it did."""
        until = time.monotonic() + seconds
        with _phase_of(self.folder) as phase:
            while self.kills < kills and time.monotonic() < until:
                if not self._kill_once(phase):
                    break
                if self.kills % 10 == 0:
                    print(f"{self.kills} kills, {len(self.store.complete())} checkpoints", file=sys.stderr)
        child = self._begin()
        child.communicate()
        return child.returncode == 0

    def _begin(self) -> subprocess.Popen[str]:
        found = bool(self.store.complete())
        self.resumes += found
        self.anew += not found and self.kills > 0
        return _start(self.folder, self.steps, self.algorithm)

    def _kill_once(self, phase: mmap.mmap) -> bool:
        """One life, ended at a random moment; False: it came to its end before that."""
        (aim,) = self.random.choices(range(len(PHASES)), AIMS)
        phase[0] = STARTING
        child, begun = self._begin(), time.monotonic()
        if aim == STARTING:
            time.sleep(self.random.uniform(0, self._start_up))
        else:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(BEGUN):
                    break
            self._start_up = time.monotonic() - begun
            time.sleep(self.random.uniform(0, self.longest))
            while phase[0] != aim and child.poll() is None:
                time.sleep(0.0005)
            time.sleep(self.random.uniform(0, DEPTH))
        finished = child.poll() is not None
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if not finished:
            self.killed[PHASES[phase[0]]] += 1
            self._look()
        return not finished

    def _look(self) -> None:
        """What the kill has left."""
        self.half_written += any(path.is_dir() for path in self.folder.glob(f"{PARTIAL}[0-9]*"))
        saved = self.store.complete()
        for one in saved:
            try:
                one.check()
            except CheckpointError as error:
                print(error, file=sys.stderr)
                self.damaged += 1
        if saved:
            for name, size in read_strict_json(saved[-1].path / "state.json")["progress"]["files"].items():
                path = self.folder / name
                self.lost += max(size - (path.stat().st_size if path.is_file() else 0), 0)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics or samples file, without what a clock has said."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {k: v for k, v in r.items() if "time/" not in k and "tokens_per_second" not in k} for r in records
    ]


def mismatches(first: Path, second: Path) -> int:
    """Lines and weight files in which two runs differ."""
    found = 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        mine, theirs = lines_of(first / name), lines_of(second / name)
        found += abs(len(mine) - len(theirs)) + sum(a != b for a, b in zip(mine, theirs, strict=False))
    for path in sorted((first / "final").rglob("*.safetensors")):
        other = second / "final" / path.relative_to(first / "final")
        found += not other.is_file() or sha256_of(path) != sha256_of(other)
    return found


def soak(folder: Path, algorithm: str, options: argparse.Namespace) -> bool:
    """Both runs of one algorithm and what became of them, in a line; whether nothing was lost and nothing differs."""
    steps = options.steps or 10 * options.kills
    whole, killed = folder / "whole", folder / "killed"
    straight = _start(whole, steps, algorithm)
    straight.communicate()
    soaked = Soak(killed, steps, algorithm, options.seed, options.longest)
    ended = soaked.run(options.kills, options.seconds) and straight.returncode == 0
    differing = mismatches(whole, killed) if ended else -1
    by_phase = ", ".join(f"{name} {soaked.killed[name]}" for name in PHASES)
    print(
        f"algorithm {algorithm}  steps {steps}  kills {soaked.kills} ({by_phase})  "
        f"half-written checkpoints {soaked.half_written}  lives begun anew {soaked.anew}  resumes {soaked.resumes}  "
        f"damaged checkpoints {soaked.damaged}  bytes lost {soaked.lost}  "
        f"mismatches {differing if ended else 'unknown, a run failed'}",
        flush=True,
    )
    return ended and not (soaked.lost or soaked.damaged or differing)


def main() -> int:
    """The soak; 1 where anything was lost or differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how often, for each algorithm (default 100)")
    parser.add_argument("--seconds", type=float, default=3600, help="no kill after so long (default an hour)")
    parser.add_argument(
        "--longest",
        type=float,
        default=0.3,
        help="seconds of a life's training before its end is sought, at most (default 0.3)",
    )
    parser.add_argument("--steps", type=int, default=None, help="of the run (default 10 for each kill)")
    parser.add_argument("--algorithm", nargs="+", default=["ppo", "grpo"], help="default: ppo grpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--live", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live is not None:
        live(options.live, options.steps, options.algorithm[0])
        return 0
    sound = True
    for algorithm in options.algorithm:
        with tempfile.TemporaryDirectory(prefix="soak-") as name:
            sound = soak(Path(name), algorithm, options) and sound
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
