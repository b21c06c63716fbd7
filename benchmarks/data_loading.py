"""What it costs to have a million rows ready for training: as text, as text kept in memory, and pre-tokenised.

    python -m benchmarks.data_loading [--rows 1000000] [--folder /tmp/rows]

Each way in a process of its own: seconds until the first batch of 32 encoded prompts is there, every row having been
checked; the memory that took (peak, above that of the imports); seconds for 1000 batches in shuffled order.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from base_setup.tokenizer_setup import TokenizerWrapper
from config.ppo_config import PPOConfig
from data_loading.loading import load_prompts
from data_loading.prepared_prompts import PreparedPrompts
from data_loading.preprocessing import preprocess
from models.sft_model import load_language_model

WAYS = {
    "list": "rows in a list (json.loads)",
    "text": "load_prompts(rows.jsonl)",
    "tokens": "load_prompts(prefix of .npy)",
}
BATCH, BATCHES = 32, 1000


def write_rows(path: Path, count: int) -> None:
    """Word problems of some sixty characters with answers of about as many."""
    rng = random.Random(0)
    things = ["apples", "pears", "stamps", "coins", "books", "nails", "tiles", "cups", "pens", "rings"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            a, b, what = rng.randrange(1000), rng.randrange(1000), rng.choice(things)
            row = {
                "prompt": f"{number}: Anna has {a} {what} and buys {b} more. How many {what}?",
                "completion": f"She had {a} and bought {b}, so she has {a + b} {what}.",
            }
            file.write(json.dumps(row) + "\n")


def peak_mb() -> float:
    """Most memory that this process has had, in MB; Linux counts kilobytes, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def tokenizer() -> TokenizerWrapper:
    """The built-in byte tokenizer: one token per byte."""
    return load_language_model(PPOConfig(model_name="embedded")).tokenizer


def measure(way: str, folder: Path) -> dict[str, float]:
    """One way of having the rows, in this process."""
    encoder, before, start = tokenizer(), peak_mb(), time.perf_counter()
    rows: Sequence[Any]
    if way == "list":
        with (folder / "rows.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    else:
        rows = load_prompts(folder / ("rows.jsonl" if way == "text" else "rows"))
    prompts = PreparedPrompts(encoder, rows, max_prompt_length=512)
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    batches = prompts.batches(order, BATCH, depth=2)
    next(batches)
    ready, memory = time.perf_counter() - start, peak_mb() - before
    start = time.perf_counter()
    for _ in zip(range(BATCHES), batches, strict=False):
        pass
    batches.close()
    return {"ready": ready, "memory": memory, "batch": (time.perf_counter() - start) / BATCHES}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the rows, tokenise them, and measure each way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_loading", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, help="where rows are written, kept and used again (default: a temporary one)"
    )
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(measure(options.only, options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rows_tokenizer.json").exists():
            write_rows(folder / "rows.jsonl", options.rows)
            start = time.perf_counter()
            config = PPOConfig(model_name="embedded", train_path=str(folder / "rows.jsonl"))
            print(preprocess(config, folder / "rows", tokenizer=tokenizer()))
            print(f"preprocess: {time.perf_counter() - start:.1f} s\n")
        print(f"{'':30} {'ready, s':>9} {'memory, MB':>11} {'batch, ms':>10}")
        for way, name in WAYS.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.data_loading",
                "--only",
                way,
                "--folder",
                str(folder),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name:30} {found['ready']:9.2f} {found['memory']:11.0f} {1000 * found['batch']:10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
