"""float32 matrix products per BLAS, in GFLOP/s: the table of docs/install.md, in half a minute.

    ./run python -m benchmarks.blas                              what MLX has by itself, and what we give it
    ./run python -m benchmarks.blas /usr/lib/libopenblas.so.0    … and libraries of your own

Each library has a process of its own, since MLX binds to one BLAS for good. The best of many repetitions is
reported: on a shared machine the mean measures the neighbours.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

SHAPES = [  # (label, rows, inner, columns): a big square, a small one, and a decoding step's tall weight
    ("2048³", 2048, 2048, 2048),
    ("256³", 256, 256, 256),
    ("x[32,1024]·Wᵀ[4096,1024]", 32, 1024, 4096),
]


def measure(rows: int, inner: int, columns: int, seconds: float = 1.0) -> float:
    """The best rate of x @ w.T seen in about this many seconds, at least three products, in GFLOP/s."""
    import mlx.core as mx

    x, w = mx.random.normal((rows, inner)), mx.random.normal((columns, inner))
    mx.eval(x @ w.T)  # warm
    best, repetitions, start = float("inf"), 0, time.perf_counter()
    while repetitions < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        mx.eval(x @ w.T)
        best = min(best, time.perf_counter() - before)
        repetitions += 1
    return 2 * rows * inner * columns / best / 1e9


def measure_here() -> None:
    """One row of the table, for the BLAS of this process."""
    from base_setup import backend

    rates = " ".join(f"{measure(*shape):{len(label) + 4}.0f}" for label, *shape in SHAPES)
    print(f"{rates}   {backend.describe().removeprefix('cpu: ').removesuffix(', float32')}", flush=True)


def main(libraries: list[str]) -> None:
    """The whole table, one child process a row."""
    print(" ".join(f"{label:>{len(label) + 4}}" for label, *_ in SHAPES), "  GFLOP/s", flush=True)
    for choice in ["none", "", *libraries]:  # "" is what a user gets who sets nothing
        environment = os.environ | {"MLX_PPO_BLAS": choice}
        command = [sys.executable, "-m", "benchmarks.blas", "--here"]
        subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True)


if __name__ == "__main__":
    measure_here() if sys.argv[1:] == ["--here"] else main(sys.argv[1:])
