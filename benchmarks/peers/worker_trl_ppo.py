"""PPO steps of TRL: the ``PPOTrainer`` of its experimental package, all weights of policy and value network trained.

The value network is the policy's checkpoint with a head. What takes the place of a reward model counts even tokens and
costs nothing. A batch is each prompt as often as a group has completions, since this trainer has no groups. It scores
with a reference model whatever the weight of the KL, here 0, and works out the entropy.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace
from typing import Any

from benchmarks.peers.record import Job, Record, Stopwatch, the_job


def main(job: Job) -> None:
    """Train, and write the record."""
    import torch
    import transformers
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class EvenTokens(torch.nn.Module):
        """Shaped like a reward model: the score at a position is how many tokens up to it are even."""

        base_model_prefix = "count"

        def __init__(self) -> None:
            super().__init__()
            self.score = torch.nn.Identity()

        def count(self, input_ids: Any, **kwargs: Any) -> SimpleNamespace:
            counts = (input_ids % 2 == 0).cumsum(1)
            return SimpleNamespace(hidden_states=[counts.unsqueeze(-1).float()])  # (B, T, 1)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(job.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model, padding_side="left")
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype="float32") for _ in range(2)
    )
    value = transformers.AutoModelForSequenceClassification.from_pretrained(
        job.model, num_labels=1, dtype="float32"
    )
    ids = [tokenizer(prompt)["input_ids"] for prompt in job.prompts for _ in range(job.group)]
    width = len(ids[0])
    record = Record(job, ["torch", "transformers", "trl", "accelerate"])
    rollout = Stopwatch(ppo_trainer.batch_generation)
    ppo_trainer.batch_generation = rollout

    class Clock(transformers.TrainerCallback):
        """The end of a step, which is after the optimiser's."""

        last = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            made = rollout.returned[0][:, width:]
            record.add(now - self.last, rollout.take(), [made.shape[1]] * made.shape[0])
            self.last = time.perf_counter()

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=job.scratch,
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=job.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=job.batch * (job.warm_up + job.steps),
            num_sample_generations=0,
            response_length=job.completion,
            stop_token=None,  # nothing ends a completion
            temperature=1.0,
            kl_coef=0.0,
            learning_rate=job.learning_rate,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job.seed,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=EvenTokens(),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        callbacks=[Clock()],
    )
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        trainer.train()
    record.write()


if __name__ == "__main__":
    main(the_job())
