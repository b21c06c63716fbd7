"""GRPO steps of inductive-mlxrl, put together as its README has it, all weights trained.

The rollout is the library's fast one, all groups in one batch: its command line decodes one completion at a time. The
fast one starts again, one completion at a time, once any row meets an end token, so forced lengths are its best case.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.peers.record import Job, Record, even_words, the_job


class Endless:
    """A tokenizer without an end token: completions stop at their longest."""

    eos_token_id = None
    chat_template = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


def main(job: Job) -> None:
    """Train, and write the record."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlxrl.algo import GRPOAlgorithm
    from mlxrl.rollout.naive import SamplingConfig
    from mlxrl.rollout.optimized import generate_prefix_cached_group_rollouts
    from mlxrl.train import batch_from_rollouts, optimizer_step

    mx.random.seed(job.seed)
    model, tokenizer = load(job.model)[:2]
    model.eval()
    record = Record(job, ["mlx", "mlx-lm", "inductive-mlxrl", "transformers"])
    optimizer = optim.AdamW(learning_rate=job.learning_rate)
    algorithm = GRPOAlgorithm()
    sampling = SamplingConfig(max_tokens=job.completion, temperature=1.0, top_p=1.0)
    for _ in range(job.warm_up + job.steps):
        start = time.perf_counter()
        completions = generate_prefix_cached_group_rollouts(
            model, Endless(tokenizer), job.prompts, job.group, sampling, batch_groups=True
        )
        rolled_out = time.perf_counter()
        batch = batch_from_rollouts(
            model,
            completions,
            even_words([completion.text for completion in completions]),
            group_size=job.group,
            pad_token_id=tokenizer.pad_token_id,
            algorithm=algorithm,
            compute_reference=False,
        )
        optimizer_step(
            model, optimizer, batch, beta=0.0, pad_token_id=tokenizer.pad_token_id, algorithm=algorithm
        )
        end = time.perf_counter()
        record.add(end - start, rolled_out - start, [len(c.completion_tokens) for c in completions])
    record.write()


if __name__ == "__main__":
    main(the_job())
