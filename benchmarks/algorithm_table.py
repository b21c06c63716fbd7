"""Every row of the table on two tasks over several seeds: the table in docs/algorithms.md.

    python -m benchmarks.algorithm_table --output runs/algorithm-table            (all of it, two at a time)
    python -m benchmarks.algorithm_table --algorithms grpo rloo --seeds 0 1 --tasks vowels --output runs/some

Tasks. ``digits``: the demo's SFT model counts in even numbers against the true score (``examples/
sequential_digits.py``); judged on held-out prompts. ``vowels``: a model with random weights is to write vowels, the
README's reward; judged on a prompt set of its own. Both are sampled at the training temperature.

Every row gets the same prompts, completions, optimiser steps and learning rate, and otherwise its own settings. Rows
that bound how far a batch may move the policy make four updates per batch; the others, which assume one update per
batch or bound a weight only (cispo), get batches of a quarter of the size, so that all make as many. Each run is a
process of its own, so seconds are those of one core while ``--jobs`` of them run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS_PER_STEP = {"digits": (16, 8), "vowels": (8, 8)}  # prompts, completions of each
EPOCHS = {"digits": 5, "vowels": 30}
LEARNING_RATE = {"digits": 1e-3, "vowels": 2e-3}


def vowels(completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of vowels in sixteen characters."""
    return [sum(letter in "aeiou" for letter in text) / 16 for text in completions]


def settings(task: str, algorithm: str, seed: int, folder: str) -> Any:
    """The config of one run: what all rows share, and what this row cannot do without."""
    from config.ppo_config import PPOConfig
    from examples.sequential_digits import LONGEST_ANSWER, TEMPERATURE
    from ppo_trainer.algorithms import find_algorithm

    prompts, group = ROWS_PER_STEP[task]
    row = find_algorithm(algorithm)
    config = PPOConfig(
        algorithm=algorithm,
        model_name="embedded",
        fine_tune_type="full",
        learning_rate=LEARNING_RATE[task],
        lr_schedule="linear",
        warmup_steps=20,
        max_new_tokens=LONGEST_ANSWER if task == "digits" else 16,
        temperature=TEMPERATURE if task == "digits" else 1.0,
        batch_size=prompts,
        group_size=group,
        num_epochs_per_rollout=1,
        seed=seed,
        output_dir=folder,
        verbose=False,
        log_samples_every=0,
    )
    if row.surrogate in ("unclipped", "cispo") or row.kl_estimator == "k2":
        config = config.replace(batch_size=prompts // 4)
    else:
        config = config.replace(minibatch_size=prompts * group // 4)
    if row.needs_critic:
        config = config.replace(gamma=1.0, value_learning_rate=3 * LEARNING_RATE[task], value_warmup_steps=3)
    if row.kl_placement != "none":
        # What the paper's large models need would hold these small ones back: both tasks are far from the start.
        config = config.replace(kl_coef=0.005)
    if task == "vowels":
        # The best answer is as long as it may be, so a penalty for that would be another task.
        config = config.replace(overlong_buffer=0.0)
    return config


def run(task: str, algorithm: str, seed: int, output: Path) -> dict[str, Any]:
    """One run: the score before and after, and what it took."""
    import examples.sequential_digits as digits
    from examples.digits_data import digit_prompt_splits
    from models.sft_model import load_language_model
    from ppo_trainer.ppo_trainer import PPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = settings(task, algorithm, seed, f"{folder}/run")
        if task == "digits":
            base = load_language_model(config.replace(model_name=str(output / f"sft-{seed}")))
            prompts, held_out = digit_prompt_splits(100, 51, seed)
            reward: Any = "sequential_digits"
        else:
            base = load_language_model(config.replace(embedded_model=digits.MODEL))
            prompts = [
                f"Say {word}" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]
            ]
            held_out, reward = [f"Say {word}" for word in ["nine", "ten", "eleven", "twelve"]], vowels
        trainer = PPOTrainer(config, model=base, reward_model=reward)
        before = trainer.evaluate(list(held_out) * 4)["avg_reward"]
        start = time.perf_counter()
        result = trainer.train(prompts, num_epochs=EPOCHS[task])
        seconds = time.perf_counter() - start
        after = trainer.evaluate(list(held_out) * 4)
    return {
        "task": task,
        "algorithm": algorithm,
        "seed": seed,
        "before": before,
        "after": after["avg_reward"],
        "kl": after["objective/kl"],
        "curve": [epoch["avg_reward"] for epoch in result["history"]],
        "completions": [sample["completion"] for sample in after["samples"][:5]],
        "seconds": seconds,
    }


def fine_tune(seed: int, output: Path) -> None:
    """The digit task's SFT model of this seed, made once for all rows."""
    import examples.sequential_digits as digits
    from examples.digits_stages import imitation_rows
    from models.sft_model import load_language_model, save_language_model
    from training.sft_trainer import SFTTrainer

    config = digits.sft_config(digits.FULL, seed)
    trainer = SFTTrainer(load_language_model(config), config)
    trainer.train(imitation_rows(4000, seed))
    save_language_model(trainer.language_model, output / f"sft-{seed}")


def _job(job: tuple[str, str, int, Path]) -> None:
    task, algorithm, seed, output = job
    result = output / f"{task}-{algorithm}-{seed}.json"
    if algorithm == "sft":
        fine_tune(seed, output)
    elif not result.exists():
        found = run(task, algorithm, seed, output)
        result.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(f"{task} {algorithm} seed {seed}: {found['before']:.2f} -> {found['after']:.2f}", flush=True)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean, spread and worst seed of each row on each task."""
    tasks = list(dict.fromkeys(r["task"] for r in results))
    head = [f"{task}: mean ± std | worst | KL | seconds" for task in tasks]
    lines = ["| row | " + " | ".join(head) + " |", "|---|" + "---|" * 4 * len(tasks)]
    for name in dict.fromkeys(r["algorithm"] for r in results):
        cells = []
        for task in tasks:
            own = [r for r in results if (r["task"], r["algorithm"]) == (task, name)]
            after = [r["after"] for r in own]
            spread = statistics.stdev(after) if len(after) > 1 else 0.0
            cells.append(f"{statistics.mean(after):.2f} ± {spread:.2f} | {min(after):.2f}")
            cells.append(f"{statistics.mean(r['kl'] for r in own):.1f}")
            cells.append(f"{statistics.median(r['seconds'] for r in own):.0f}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and print."""
    from ppo_trainer.algorithms import ALGORITHMS

    parser = argparse.ArgumentParser(description="Every row on two tasks over seeds.", allow_abbrev=False)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--tasks", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithm-table"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # read by the processes that are spawned
    missing = [seed for seed in options.seeds if not (options.output / f"sft-{seed}").exists()]
    jobs = [
        (task, algorithm, seed, options.output)
        for task in options.tasks
        for seed in options.seeds
        for algorithm in options.algorithms
    ]
    # Spawned, because a forked child of a process that has used a BLAS hangs; one run per process.
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        if "digits" in options.tasks:
            pool.map(_job, [("digits", "sft", seed, options.output) for seed in missing], chunksize=1)
        pool.map(_job, jobs, chunksize=1)
    results = [
        json.loads((options.output / f"{task}-{algorithm}-{seed}.json").read_text(encoding="utf-8"))
        for task, algorithm, seed, _ in jobs
    ]
    start = {
        task: statistics.mean(r["before"] for r in results if r["task"] == task) for task in options.tasks
    }
    print("before: " + ", ".join(f"{task} {score:.2f}" for task, score in start.items()))
    print(table(results))


if __name__ == "__main__":
    main()
