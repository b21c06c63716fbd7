"""The memory estimate against MLX's own count: one real step of PPOTrainer, phase by phase.

    python -m benchmarks.memory [size …]          size: tiny, small, medium (default: all three)

Prediction / measurement in MB. Each case runs in a process of its own, the last column is the peaks' quotient.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import mlx.core as mx

from base_setup.memory_estimate import predict
from benchmarks.workload import SIZES, make_model, make_prompts
from config.ppo_config import PPOConfig

LENGTHS = {"max_prompt_length": 64, "max_new_tokens": 64}
#: By name: what differs from 4 prompts × 8 completions of 64 + 64 tokens.
CASES: dict[str, dict[str, Any]] = {
    "grpo, lora": {"algorithm": "grpo", "fine_tune_type": "lora"},
    "grpo, full": {"algorithm": "grpo", "fine_tune_type": "full"},
    "ppo, lora": {"algorithm": "ppo", "fine_tune_type": "lora", "batch_size": 16, "group_size": 1},
    "ppo, full": {"algorithm": "ppo", "fine_tune_type": "full", "batch_size": 16, "group_size": 1},
    "grpo, lora, micro 8": {"algorithm": "grpo", "fine_tune_type": "lora", "micro_batch_size": 8},
    "grpo, full, micro 8": {"algorithm": "grpo", "fine_tune_type": "full", "micro_batch_size": 8},
    "grpo, lora, checkpointing": {
        "algorithm": "grpo",
        "fine_tune_type": "lora",
        "gradient_checkpointing": True,
    },
    "grpo, dora": {"algorithm": "grpo", "fine_tune_type": "dora"},
    "grpo, dora, checkpointing": {
        "algorithm": "grpo",
        "fine_tune_type": "dora",
        "gradient_checkpointing": True,
    },
    "grpo, full, micro 8, 8 bits": {
        "algorithm": "grpo",
        "fine_tune_type": "full",
        "micro_batch_size": 8,
        "optimizer_bits": 8,
    },
}


def case_config(name: str, **more: Any) -> PPOConfig:
    """The options of a case, before the algorithm's own defaults."""
    common: dict[str, Any] = {"batch_size": 4, "group_size": 8, "verbose": False, "log_samples_every": 0}
    return PPOConfig(**{**common, **LENGTHS, **CASES[name], **more})


def measure(size: str, case: str) -> dict[str, Any]:
    """Peak bytes of two steps' phases, MLX's count (all that this process holds in arrays)."""
    from ppo_trainer.ppo_trainer import PPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        shape = SIZES[size]
        trainer = PPOTrainer(
            case_config(case, output_dir=folder),
            model=make_model(shape),
            reward_model=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        )
        prompts = trainer._prepare(
            make_prompts(trainer.config.batch_size, LENGTHS["max_prompt_length"], shape.vocabulary)
        )
        peaks = {"rollouts": 0, "scoring": 0, "update": 0}
        seconds = 0.0

        def phase(name: str, work: Any, *arguments: Any) -> Any:
            nonlocal seconds
            mx.reset_peak_memory()
            start = time.perf_counter()
            result = work(*arguments)
            seconds += time.perf_counter() - start
            peaks[name] = max(peaks[name], mx.get_peak_memory())
            return result

        for _ in range(2):  # in the second, moments and a reference of its own exist
            rollouts = phase("rollouts", trainer.generate, prompts)
            experience, _ = phase("scoring", trainer.make_experience, rollouts)
            phase("update", trainer.update, experience)
        expected = predict(
            trainer.policy.base.config, trainer.config, critic=trainer.value_model is not None, device="cpu"
        )
        predicted = {
            "rollouts": expected.peak_of("rollouts"),
            "scoring": expected.peak_of("scoring"),
            "update": max(expected.peak_of("gradient pass"), expected.peak_of("update")),
        }
        return {
            "measured": peaks,
            "predicted": predicted,
            "seconds": seconds / 2,
            "lasting": [mx.get_active_memory(), sum(expected.lasting.values())],
            "parts": expected.parts,
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", help=", ".join(SIZES))
    parser.add_argument("--parts", action="store_true", help="print the parts of each prediction too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.sizes[0], options.case)))
        return
    for size in options.sizes or SIZES:
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.memory", size, "--case", case]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{size:7s} {case:28s} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            columns = "".join(
                f"{name} {found['predicted'][name] / 1e6:6.0f} /{found['measured'][name] / 1e6:6.0f}  "
                for name in ("rollouts", "scoring", "update")
            )
            measured, predicted = (max(found[kind].values()) for kind in ("measured", "predicted"))
            print(f"{size:7s} {case:28s} {columns} peak {predicted / measured:5.2f}", flush=True)
            if options.parts:
                after, lasting = found["lasting"]
                parts = {name: round(part / 1e6) for name, part in found["parts"].items() if part}
                print(f"{'':36s} lasting {lasting / 1e6:.0f} / {after / 1e6:.0f}, {parts}", flush=True)


if __name__ == "__main__":
    main()
