"""A run that is killed again and again, and whether anything of it is lost: ``python -m benchmarks.soak --kills 100``.

One run goes through undisturbed. Another of the same config is killed with SIGKILL at random moments, while it samples,
learns or writes a checkpoint, and started again each time with ``resume = latest``. At the end the two are compared:
every line of metrics.jsonl but for its times, every line of samples.jsonl, and every byte of the trained weights. After
each kill every checkpoint that was complete is read again, and so is what the metrics held at the newest of them.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpointing.durable import read_strict_json, sha256_of
from checkpointing.store import PARTIAL, CheckpointStore
from config.errors import CheckpointError

BEGUN = "training begins"
PROMPTS = [f"prompt {i}" for i in range(7)]


def letters(completions: Sequence[str], **columns: Any) -> list[float]:
    """How many different characters a completion has, in tens."""
    return [len(set(text)) / 10 for text in completions]


def live(folder: Path, steps: int, algorithm: str) -> None:
    """One life of the run: from its newest checkpoint to its end, unless it is killed before."""
    from config.model_config import ModelConfig
    from config.ppo_config import PPOConfig
    from ppo_trainer.ppo_trainer import PPOTrainer

    class Begun:
        def on_train_begin(self, trainer: Any) -> None:
            print(BEGUN, flush=True)

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
    PPOTrainer(config, reward_model=letters).train(PROMPTS, callbacks=[Begun()])


def _start(folder: Path, steps: int, algorithm: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.soak", "--live", str(folder)]
    command += ["--steps", str(steps), "--algorithm", algorithm]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class Soak:
    """Kills, and what they did.

    Attributes:
        resumes: lives that began from a checkpoint. in_checkpoint: kills that left a half-written one.
        lost: bytes of metrics.jsonl that a checkpoint stood for and that were gone after a kill.
        damaged: complete checkpoints that could not be read any more.
    """

    def __init__(self, folder: Path, steps: int, algorithm: str, seed: int, longest: float) -> None:
        self.folder, self.steps, self.algorithm, self.longest = folder, steps, algorithm, longest
        self.store = CheckpointStore(folder)
        self.random = random.Random(seed)
        self.kills = self.resumes = self.in_checkpoint = self.lost = self.damaged = 0

    def run(self, kills: int, seconds: float) -> bool:
        """Kill it so often, or for so long, then let it come to its end; whether it did."""
        until = time.monotonic() + seconds
        while self.kills < kills and time.monotonic() < until:
            if not self._kill_once():
                break
        child = _start(self.folder, self.steps, self.algorithm)
        self.resumes += bool(self.store.complete())
        child.communicate()
        return child.returncode == 0

    def _kill_once(self) -> bool:
        """One life, ended at a random moment; False: it came to its end before that."""
        self.resumes += bool(self.store.complete())
        child = _start(self.folder, self.steps, self.algorithm)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(BEGUN):
                break
        time.sleep(self.random.uniform(0, self.longest))
        finished = child.poll() is not None
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if not finished:
            self.kills += 1
            self._look()
        return not finished

    def _look(self) -> None:
        """What the kill has left."""
        self.in_checkpoint += any(path.is_dir() for path in self.folder.glob(f"{PARTIAL}[0-9]*"))
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


def main() -> int:
    """The soak; 1 where anything was lost or differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how often (default 100)")
    parser.add_argument("--seconds", type=float, default=3600, help="no kill after so long (default an hour)")
    parser.add_argument(
        "--longest", type=float, default=0.5, help="seconds of a life's training, at most (default 0.5)"
    )
    parser.add_argument("--steps", type=int, default=None, help="of the run (default 5 for each kill)")
    parser.add_argument("--algorithm", default="ppo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--live", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = options.steps or 5 * options.kills
    if options.live is not None:
        live(options.live, steps, options.algorithm)
        return 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        straight = _start(whole, steps, options.algorithm)
        straight.communicate()
        soak = Soak(killed, steps, options.algorithm, options.seed, options.longest)
        ended = soak.run(options.kills, options.seconds) and straight.returncode == 0
        differing = mismatches(whole, killed) if ended else -1
    print(
        f"algorithm {options.algorithm}  steps {steps}  kills {soak.kills}  resumes {soak.resumes}  "
        f"killed while writing a checkpoint {soak.in_checkpoint}  damaged checkpoints {soak.damaged}  "
        f"bytes lost {soak.lost}  mismatches {differing if ended else 'unknown, a run failed'}"
    )
    return 0 if ended and not (soak.lost or soak.damaged or differing) else 1


if __name__ == "__main__":
    sys.exit(main())
