"""The demo over several seeds: the table in the README.

    python -m benchmarks.digits_seeds --seeds 0 1 2 3 4 --output runs/digits-seeds

One row per seed and a last one with the worst of each column; the same as JSON in the output folder. Each seed
runs in a process of its own, as ``python main.py --seed N`` would.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("seed", "SFT", "RM pairs", "PPO", "PPO KL", "GRPO", "GRPO KL", "seconds")
ROOT = Path(__file__).resolve().parent.parent


def run(seed: int, output: Path) -> dict[str, Any]:
    """One demo; its results."""
    folder = output / f"seed-{seed}"
    command = [sys.executable, str(ROOT / "main.py"), "--seed", str(seed), "--output", str(folder)]
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if finished.returncode not in (0, 1) or not (folder / "results.json").exists():
        raise SystemExit(f"seed {seed}: the demo ended with code {finished.returncode}")
    return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def row(results: dict[str, Any]) -> tuple[float, ...]:
    """The columns of one seed."""
    sft, ppo, grpo = (results[name] for name in ("sft", "ppo", "grpo"))
    accuracy, seconds = results["reward_model_accuracy"], results["seconds"]
    return (
        results["seed"],
        sft["score"],
        accuracy,
        ppo["score"],
        ppo["kl"],
        grpo["score"],
        grpo["kl"],
        seconds,
    )


def table(rows: Sequence[tuple[float, ...]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for values in rows:
        seed, *numbers, seconds = values
        cells = [f"{seed:.0f}", *(f"{n:.2f}" if n < 3 else f"{n:.1f}" for n in numbers), f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    columns = list(zip(*rows, strict=True))
    lines.append(
        f"| worst | {max(columns[1]):.2f} | {min(columns[2]):.2f} | **{min(columns[3]):.2f}** | "
        f"{max(columns[4]):.1f} | **{min(columns[5]):.2f}** | {max(columns[6]):.1f} | {max(columns[7]):.0f} |"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="The demo over several seeds.", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/digits-seeds"))
    options = parser.parse_args(arguments)
    results = [run(seed, options.output) for seed in options.seeds]
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table([row(r) for r in results]))


if __name__ == "__main__":
    main()
