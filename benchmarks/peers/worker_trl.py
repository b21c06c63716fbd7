"""GRPO steps of TRL: its ``GRPOTrainer`` on the CPU with Transformers' own ``generate``, all weights trained.

Gradient checkpointing, on by default there, is off: the other systems keep their activations as well.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.peers.record import Job, Record, Stopwatch, even_words, the_job


def main(job: Job) -> None:
    """Train, and write the record."""
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    record = Record(job, ["torch", "transformers", "trl", "accelerate"])
    trainer = GRPOTrainer(
        model=job.model,
        reward_funcs=even_words,
        args=GRPOConfig(
            output_dir=job.scratch,
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=job.batch,
            num_generations=job.group,
            max_completion_length=job.completion,
            # An end token cannot be drawn before the completion has its length.
            generation_kwargs={"min_new_tokens": job.completion},
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            learning_rate=job.learning_rate,
            max_steps=job.warm_up + job.steps,
            shuffle_dataset=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job.seed,
        ),
        train_dataset=Dataset.from_dict({"prompt": job.prompts}),
    )
    rollout = Stopwatch(trainer._generate)
    trainer._generate = rollout

    class Clock(transformers.TrainerCallback):
        """The end of a step, which is after the optimiser's."""

        last = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            record.add(now - self.last, rollout.take(), [len(ids) for ids in rollout.returned[1]])
            self.last = time.perf_counter()

    trainer.add_callback(Clock())
    trainer.train()
    record.write()


if __name__ == "__main__":
    main(the_job())
