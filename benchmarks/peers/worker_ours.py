"""Steps of this toolkit through its public API: GRPO, PPO with a value network, and rollouts alone."""

from __future__ import annotations

import os
import time
from typing import Any

from base_setup import backend  # before MLX
from benchmarks.peers.record import Job, Record, Stopwatch, even_words, the_job
from config.ppo_config import PPOConfig
from ppo_trainer.ppo_trainer import PPOTrainer


def make_trainer(job: Job) -> PPOTrainer:
    """A trainer of all weights, with everything that the comparison does not fix left at its default."""
    return PPOTrainer(
        PPOConfig(
            algorithm="ppo" if job.kind == "ppo" else "grpo",
            model_name=job.model,
            fine_tune_type="full",
            learning_rate=job.learning_rate,
            kl_coef=0.0,
            num_epochs_per_rollout=1,  # one update per batch; PPO makes four by default
            max_new_tokens=job.completion,
            batch_size=len(job.prompts),
            group_size=job.group,
            max_prompt_length=4096,
            output_dir=os.path.join(job.scratch, "run"),
            seed=job.seed,
            verbose=False,
        ),
        reward_model=even_words,
    )


def main(job: Job) -> None:
    """Do the job, and write the record."""
    trainer = make_trainer(job)
    trainer.policy.end_ids = frozenset()  # the completion's length is forced: nothing ends it
    record = Record(job, ["mlx", "mlx-lm", "numpy", "transformers"], [backend.describe()])
    if job.kind == "rollout":
        measure_rollouts(trainer, job, record)
    else:
        measure_steps(trainer, job, record)
    record.write()


def measure_steps(trainer: PPOTrainer, job: Job, record: Record) -> None:
    """``train``, of which each pass over the prompts is one step."""
    generate = Stopwatch(trainer.generate)
    trainer.generate = generate  # type: ignore[method-assign]
    last = time.perf_counter()

    def clock(epoch: int, metrics: dict[str, Any]) -> None:
        nonlocal last
        now = time.perf_counter()
        record.add(now - last, generate.take(), [len(r.completion_ids) for r in generate.returned])
        last = time.perf_counter()

    trainer.train(job.prompts, num_epochs=job.warm_up + job.steps, callbacks=[clock])


def measure_rollouts(trainer: PPOTrainer, job: Job, record: Record) -> None:
    """``generate``, on as many prompts as a number of rows needs."""
    prompts = trainer._prepare(job.prompts)
    for rows in job.rows:
        group = min(rows, job.group)
        for step in range(job.warm_up + job.steps):
            start = time.perf_counter()
            rollouts = trainer.generator.generate(prompts[: rows // group], step, group_size=group)
            seconds = time.perf_counter() - start
            record.add(seconds, seconds, [len(r.completion_ids) for r in rollouts])


if __name__ == "__main__":
    main(the_job())
