"""Rollouts of mlx-lm's ``BatchGenerator``: as it comes, and told to take all rows at once.

As it comes it prefills 8 prompts at a time and decodes 32 rows; it knows nothing of groups, so that a prompt is read as
often as it has completions.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.peers.record import Job, Record, the_job


def main(job: Job) -> None:
    """Generate, and write the record."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(job.seed)
    model, tokenizer = load(job.model)[:2]
    record = Record(job, ["mlx", "mlx-lm", "transformers"])
    for rows in job.rows:
        prompts = [tokenizer.encode(prompt) for prompt in job.prompts for _ in range(job.group)][:rows]
        widths: dict[str, Any] = {"completion_batch_size": rows, "prefill_batch_size": rows}
        for _ in range(job.warm_up + job.steps):
            start = time.perf_counter()
            generator = BatchGenerator(
                model,
                max_tokens=job.completion,
                stop_tokens=[],
                sampler=make_sampler(1.0),
                **(widths if job.system.endswith("-wide") else {}),
            )
            lengths = dict.fromkeys(generator.insert(prompts), 0)
            while responses := generator.next_generated():
                for response in responses:
                    lengths[response.uid] += 1
            generator.close()
            seconds = time.perf_counter() - start
            record.add(seconds, seconds, list(lengths.values()))
    record.write()


if __name__ == "__main__":
    main(the_job())
