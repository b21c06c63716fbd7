"""GRPO steps of mlx-lm-lora: its ``train_grpo``, as it comes, all weights trained.

It decodes and differentiates as many rows at a time as a batch has prompts, and it has no option for another number.
Its log-probabilities leave out the positions before the completion, and with the KL weight at 0 it has no reference.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.record import Job, Record, Stopwatch, even_words, the_job


class Clock:
    """The trainer's own report after each step, which comes when the step's arrays have been evaluated."""

    def __init__(self, record: Record, rollout: Stopwatch) -> None:
        self.record = record
        self.rollout = rollout
        self.last = time.perf_counter()

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        now = time.perf_counter()
        completions = self.rollout.returned[0]
        self.record.add(now - self.last, self.rollout.take(), [c.size for c in completions])
        self.last = time.perf_counter()

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """There is no validation."""


def main(job: Job) -> None:
    """Train, and write the record."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm_lora.trainer import grpo_trainer

    mx.random.seed(job.seed)
    model, tokenizer = load(job.model)[:2]
    tokenizer.eos_token_ids = set()  # the completion's length is forced: nothing ends it
    record = Record(job, ["mlx", "mlx-lm", "mlx-lm-lora", "transformers"])
    rollout = Stopwatch(grpo_trainer.generate_grpo)
    grpo_trainer.generate_grpo = rollout
    dataset: list[Any] = [(tokenizer.encode(prompt), [], prompt, "") for prompt in job.prompts]
    args = grpo_trainer.GRPOTrainingArgs(
        batch_size=len(job.prompts),
        iters=job.warm_up + job.steps,
        val_batches=0,
        steps_per_report=1,
        steps_per_save=job.warm_up + job.steps + 1,
        adapter_file=str(Path(job.scratch) / "adapters.safetensors"),
        group_size=job.group,
        beta=0.0,
        epsilon=0.2,
        max_completion_length=job.completion,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        grpo_trainer.train_grpo(
            model,
            None,
            tokenizer,
            optim.AdamW(learning_rate=job.learning_rate),
            dataset,
            reward_funcs=[even_words],
            args=args,
            training_callback=Clock(record, rollout),
            end_answer_token="",
        )
    record.write()


if __name__ == "__main__":
    main(the_job())
