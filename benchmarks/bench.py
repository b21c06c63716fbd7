"""How fast a whole training step is, where its time and memory go, and how both grow: ``./run bench``.

    ./run bench                                    the grid of docs/performance.md
    ./run bench --sizes small --algorithms grpo    a part of it
    ./run bench --scaling                          … in group size, prompt, completion, vocabulary and batch, with plots
    ./run bench --optimisations                    what each optimisation gains, switched off one by one

Each point is a process of its own: some steps of ``PPOTrainer``, the first of them not counted, on random weights and
prompts, with completions of forced length. Numbers are medians over steps; memory is the peak of the process and of
MLX. ``limit`` is the time that the step's matrix products alone take at the rate that this machine reaches on a large
product, measured in the same process: what it is of the step is how near the step is to that limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

ROOT = Path(__file__).resolve().parent.parent


class Work(NamedTuple):
    """One point: what is trained on what."""

    size: str = "small"
    algorithm: str = "grpo"
    fine_tune_type: str = "full"
    prompts: int = 4
    group_size: int = 8
    prompt_length: int = 64
    completion_length: int = 64
    vocabulary: int = 0  # 0: the size's own
    steps: int = 4
    options: Mapping[str, Any] = {}  # of the config, further
    without: str = ""  # an optimisation to switch off, see SWITCHES


# -- In a process of its own --------------------------------------------------------------------------


def measure(work: Work) -> dict[str, Any]:
    """Train for a few steps; seconds per stage, memory, and the limit."""
    import mlx.core as mx

    from base_setup import backend
    from benchmarks.switches import switched_off
    from benchmarks.workload import SIZES, make_model, make_prompts
    from config.ppo_config import PPOConfig
    from ppo_trainer.ppo_trainer import PPOTrainer

    size = SIZES[work.size]
    if work.vocabulary:
        size = size._replace(vocabulary=work.vocabulary)
    base = make_model(size)
    seen: list[Mapping[str, float]] = []

    class Watch:
        def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
            seen.append(dict(metrics))

    with tempfile.TemporaryDirectory() as folder, switched_off(work.without):
        config = PPOConfig(
            algorithm=work.algorithm,
            fine_tune_type=work.fine_tune_type,  # type: ignore[arg-type]
            batch_size=work.prompts,
            group_size=work.group_size,
            max_new_tokens=work.completion_length,
            max_prompt_length=work.prompt_length,
            kl_coef=0.0,
            learning_rate=1e-6,
            output_dir=f"{folder}/run",
            verbose=False,
            log_samples_every=0,
            **work.options,
        )
        trainer = PPOTrainer(
            config,
            model=base,
            reward_model=share_of_even_tokens,
            callbacks=[Watch()],
        )
        trainer.policy.end_ids = frozenset()  # nothing ends a completion: all have the same length
        prompts = make_prompts(work.prompts, work.prompt_length, size.vocabulary)
        mx.reset_peak_memory()
        trainer.train(prompts, num_epochs=1 + work.steps)
    steps = seen[1:]
    found = {
        stage: statistics.median(s[f"time/{stage}"] for s in steps)
        for stage in ("rollout", "score", "update")
    }
    found["step"] = statistics.median(sum(s[f"time/{stage}"] for stage in found) for s in steps)
    tokens = work.prompts * work.group_size * work.completion_length
    assert all(s["num_tokens"] == tokens for s in steps)
    rate = product_rate()
    return {
        **work._asdict(),
        **{f"{stage}_s": seconds for stage, seconds in found.items()},
        "rollout_tokens_per_s": tokens / found["rollout"],
        "update_tokens_per_s": tokens / found["update"],
        "step_tokens_per_s": tokens / found["step"],
        "mlx_peak_gib": mx.get_peak_memory() / 2**30,
        "process_peak_gib": peak_of_process() / 2**30,
        "product_gflops": rate / 1e9,
        "limit_s": products_of_a_step(work, size) / rate,
        "backend": backend.describe(),
    }


def share_of_even_tokens(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within groups."""
    words = [completion.split() for completion in completions]
    return [sum(word[-1] in "02468" for word in row) / max(len(row), 1) for row in words]


def peak_of_process() -> int:
    """Bytes of memory that the process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def product_rate(rows: int = 2048, seconds: float = 0.5) -> float:
    """Operations per second in a large float32 product, the best of several."""
    import mlx.core as mx

    x = mx.random.normal((rows, rows))
    mx.eval(x @ x)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        mx.eval(x @ x)
        best = min(best, time.perf_counter() - before)
    return 2 * rows**3 / best


def products_of_a_step(work: Work, size: Any) -> float:
    """Operations in the matrix products that no implementation can leave out, prompts computed once per pass.

    A product of n rows with a weight of k numbers is 2nk operations; its backward is twice that where the weight
    trains and once where it does not. Two passes: rollouts, and the gradient with its forward. A critic of its own
    adds a forward and a gradient pass through its trunk.
    """
    head_width = size.hidden // size.heads
    attention = size.hidden * head_width * (2 * size.heads + 2 * size.kv_heads)
    block = size.layers * (attention + 3 * size.hidden * size.intermediate)
    head = size.hidden * size.vocabulary
    rows = work.prompts * work.group_size
    sampled = rows * work.completion_length
    tokens = sampled + work.prompts * work.prompt_length
    seen = (
        work.prompt_length + work.completion_length / 2
    )  # columns that a sampled token attends to, on average
    scores = (
        4
        * size.layers
        * size.heads
        * head_width
        * (sampled * seen + work.prompts * work.prompt_length**2 / 2)
    )
    forward = 2 * tokens * block + scores
    backward = (4 if work.fine_tune_type == "full" else 2) * tokens * block + 2 * scores
    vocabulary = 2 * sampled * head
    total = forward + vocabulary  # rollouts
    total += forward + backward + vocabulary * (3 if work.fine_tune_type == "full" else 2)
    if work.algorithm == "ppo":
        total += 2 * forward + backward
    return total


# -- Many points --------------------------------------------------------------------------------------

GRID = [
    *(Work(size, algorithm) for size in ("tiny", "small") for algorithm in ("grpo", "ppo")),
    Work("small", fine_tune_type="lora"),
    *(Work(size, prompt_length=512, steps=2) for size in ("tiny", "small")),
    Work("small", group_size=32, prompts=1),
    Work("small", prompt_length=16, completion_length=256, steps=2),
    Work("small", vocabulary=4096),
    Work("medium", steps=2),
]
#: What is varied in --scaling, from one base point.
SCALED = {
    "group_size": (2, 4, 8, 16, 32),
    "prompts": (1, 2, 4, 8, 16),
    "prompt_length": (16, 64, 256, 1024),
    "completion_length": (16, 32, 64, 128, 256),
    "vocabulary": (1024, 4096, 16384, 65536),
}
COLUMNS = (
    "model",
    "algorithm",
    "N × G",
    "P",
    "C",
    "V",
    "rollout tok/s",
    "score s",
    "update tok/s",
    "step s",
    "limit",
    "peak GiB",
)


def run(work: Work) -> dict[str, Any]:
    """One point in a fresh process; its numbers, or a row that says why there are none."""
    command = [sys.executable, "-m", "benchmarks.bench", "--child", json.dumps(work._asdict())]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no output"])[-1]
        return {**work._asdict(), "failed": f"ended with {finished.returncode}: {reason}"}
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line a point."""
    from benchmarks.workload import SIZES

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for r in rows:
        vocabulary = r["vocabulary"] or SIZES[r["size"]].vocabulary
        method = f"{r['algorithm']} {r['fine_tune_type']}"
        cells = [r["size"], method, f"{r['prompts']} × {r['group_size']}", r["prompt_length"]]
        cells += [r["completion_length"], vocabulary]
        if "failed" in r:
            cells += [r["failed"], *[""] * 5]
        else:
            cells += [
                f"{r['rollout_tokens_per_s']:.0f}",
                f"{r['score_s']:.2f}",
                f"{r['update_tokens_per_s']:.0f}",
            ]
            cells += [
                f"{r['step_s']:.2f}",
                f"{r['limit_s'] / r['step_s']:.0%}",
                f"{r['process_peak_gib']:.2f}",
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x, by least squares: 1 is proportional, 0 does not grow."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def scaling(size: str, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Every series of SCALED; a table of exponents, and the plot ``scaling.png`` in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, found, lines = Work(size, steps=2), [], []
    figure, panels = plt.subplots(2, len(SCALED), figsize=(4 * len(SCALED), 6.5))
    for column, (name, values) in enumerate(SCALED.items()):
        rows = [run(base._replace(**cast(Any, {name: value}))) for value in values]
        found += rows
        rows = [r for r in rows if "failed" not in r]
        x = [float(r[name]) for r in rows]
        cells = []
        for label, key in (("rollout", "rollout_s"), ("update", "update_s"), ("step", "step_s")):
            y = [r[key] for r in rows]
            panels[0, column].loglog(x, y, "o-", label=label)
            cells.append(f"{exponent(x, y):.2f}")
        memory = [r["mlx_peak_gib"] for r in rows]
        cells.append(f"{exponent(x, memory):.2f}")
        panels[1, column].loglog(x, memory, "o-", color="black")
        panels[0, column].set_title(name)
        panels[1, column].set_xlabel(name)
        span = f"{values[0]} … {values[-1]}"
        lines.append(f"| {name} | {span} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("MLX's peak memory, GiB")
    panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(folder / "scaling.png", dpi=110)
    head = [
        "| varied | range | rollout time | update time | step time | memory |",
        "|---|---|---|---|---|---|",
    ]
    return found, "\n".join([*head, *lines])


def optimisations(size: str, rounds: int) -> tuple[list[dict[str, Any]], str]:
    """The same step with each optimisation switched off, interleaved with the whole of them."""
    from benchmarks.switches import SWITCHES

    points = [Work(size, steps=2), *(Work(size, steps=2, without=name) for name in SWITCHES)]
    found = [run(point) for _ in range(rounds) for point in points]
    lines = ["| without | step s | times the time | peak GiB |", "|---|---|---|---|"]
    whole = _median(found, "", "step_s")
    for point in points:
        step, memory = _median(found, point.without, "step_s"), _median(
            found, point.without, "process_peak_gib"
        )
        name = SWITCHES[point.without].meaning if point.without else "nothing: as it is"
        lines.append(f"| {name} | {step:.2f} | {step / whole:.2f} | {memory:.2f} |")
    return found, "\n".join(lines)


def _median(rows: Sequence[Mapping[str, Any]], without: str, key: str) -> float:
    return statistics.median(r[key] for r in rows if r["without"] == without and "failed" not in r)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all points were measured. 1: at least one has no numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="tiny, small, medium (default: all)")
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", help="grpo, ppo (default: both)")
    parser.add_argument("--scaling", metavar="SIZE", nargs="?", const="tiny", help="vary one thing at a time")
    parser.add_argument("--optimisations", metavar="SIZE", nargs="?", const="small", help="switch each off")
    parser.add_argument("--rounds", type=int, default=2, help="of --optimisations")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(Work(**json.loads(options.child)))))
        return 0
    # A library may be held to older kernels by this variable; what MLX can do here is measured without.
    os.environ.pop("OPENBLAS_CORETYPE", None)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.scaling:
        rows, text = scaling(options.scaling, options.output)
    elif options.optimisations:
        rows, text = optimisations(options.optimisations, options.rounds)
    else:
        points = [
            w
            for w in GRID
            if w.size in (options.sizes or [w.size]) and w.algorithm in (options.algorithms or [w.algorithm])
        ]
        rows = []
        for point in points:
            rows.append(run(point))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        text = table(rows)
    kind = "scaling" if options.scaling else "optimisations" if options.optimisations else "grid"
    (options.output / f"{kind}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    machine = next((r["backend"] for r in rows if "backend" in r), "")
    print(f"\n{text}\n\n{machine}, {os.cpu_count()} cores, {platform.machine()}, {platform.system()}")
    return 1 if any("failed" in r for r in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
