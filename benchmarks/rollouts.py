"""Tokens sampled per second: ours against mlx-lm's ``BatchGenerator``, the same model, interleaved.

    python -m benchmarks.rollouts                        models tiny and small; 1, 8, 32 and 64 rows
    python -m benchmarks.rollouts --size tiny --rows 32 --repeats 9

Prompts of 64 tokens in groups of 8, temperature 1, 64 new tokens and no end. Then the uneven case: four times as many
rows as there are places. Every 24th token ends a completion, which with random weights makes lengths geometric; mlx-lm
is given these lengths as limits. Ours is measured twice there: with waiting rows that take the places of those that
have ended, and in fixed batches, from which rows leave and into which none come.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator

from benchmarks.workload import SIZES, make_model
from models.decoding import complete
from models.sampling import Sampling, uniforms_for
from token_attribution.trunk import find_trunk

PROMPT, LENGTH, GROUP, MEAN = 64, 64, 8, 24


@dataclass
class Work:
    """Rows to decode, ``places`` of them side by side."""

    model: nn.Module
    prompts: list[list[int]]
    rows: list[int]  # the prompt of each
    places: int
    end_ids: frozenset[int]
    lengths: list[int]  # what comes out

    def ours(self, batch: int | None = None) -> None:
        """All rows in one call, or in calls of ``batch`` rows."""
        size = batch or len(self.rows)
        for start in range(0, len(self.rows), size):
            self.sample(range(start, min(start + size, len(self.rows))))

    def sample(self, rows: range) -> list[int]:
        """Decode these rows; how long each became."""
        here = [self.rows[row] for row in rows]
        distinct = sorted(set(here))
        completions = complete(
            self.model,
            [self.prompts[prompt] for prompt in distinct],
            [distinct.index(prompt) for prompt in here],
            np.stack([uniforms_for(0, 0, 0, row, LENGTH) for row in rows]),
            end_ids=self.end_ids,
            max_new_tokens=LENGTH,
            sampling=Sampling(),
            trunk=find_trunk(self.model),
            max_rows=self.places,
        )
        return [len(completion.ids) for completion in completions]

    def mlx_lm(self) -> None:
        """The same lengths from mlx-lm, whose draws are its own."""
        generator = BatchGenerator(
            self.model,
            sampler=lambda logprobs: mx.random.categorical(logprobs),
            completion_batch_size=self.places,
            prefill_batch_size=min(8, self.places),
        )
        generator.insert([self.prompts[prompt] for prompt in self.rows], max_tokens=self.lengths)
        found = 0
        while responses := generator.next_generated():
            found += len(responses)
        generator.close()
        if found != sum(self.lengths):
            raise RuntimeError(f"mlx-lm made {found} tokens, {sum(self.lengths)} are expected")


def make_work(model: nn.Module, vocabulary: int, rows: int, places: int, uneven: bool) -> Work:
    """Prompts and rows; the lengths are found by decoding once."""
    generator = np.random.default_rng(rows)
    count = max(1, rows // GROUP)
    prompts = generator.integers(0, vocabulary - 2, (count, PROMPT)).tolist()
    ends = frozenset(generator.permutation(vocabulary)[: vocabulary // MEAN].tolist() if uneven else [])
    work = Work(model, prompts, [row * count // rows for row in range(rows)], places, ends, [])
    work.lengths = work.sample(range(rows))
    return work


def measure(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns, so that a busy moment of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def line(label: str, tokens: int, seconds: dict[str, list[float]]) -> str:
    """Tokens per second (median, best), and how many times the others' the first one's is (median over turns)."""
    told = [
        f"{name} {tokens / statistics.median(s):.0f} ({tokens / min(s):.0f})" for name, s in seconds.items()
    ]
    first, *others = seconds.items()
    ratios = [
        f"{statistics.median(b / a for a, b in zip(first[1], s, strict=True)):.2f} x {name}"
        for name, s in others
    ]
    return f"{label}: {', '.join(told)} tokens/s: {', '.join(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.size:
        model = make_model(SIZES[name]).model
        for rows in arguments.rows:
            work = make_work(model, SIZES[name].vocabulary, rows, rows, uneven=False)
            ways: dict[str, Callable[[], None]] = {"ours": work.ours, "mlx-lm": work.mlx_lm}
            found = measure(ways, arguments.repeats)
            print(line(f"{name}, {rows} rows", sum(work.lengths), found), flush=True)
        places = 32 if 32 in arguments.rows else max(arguments.rows)
        work = make_work(model, SIZES[name].vocabulary, 4 * places, places, uneven=True)
        ways = {"ours": work.ours, "fixed batches": lambda w=work: w.ours(w.places), "mlx-lm": work.mlx_lm}  # type: ignore[misc]
        label = f"{name}, {4 * places} rows of {statistics.mean(work.lengths):.0f} in {places} places"
        print(line(label, sum(work.lengths), measure(ways, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
