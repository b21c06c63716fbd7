"""When memory runs out and the process lives: what it says, and room for what was earned to be saved."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import traceback

import mlx.core as mx

from config.errors import TrainingRuntimeError

#: How MLX's allocators say it where they raise no MemoryError: CPU, Metal (a buffer, a command), CUDA.
WORDS = ("unable to allocate", "attempting to allocate", "insufficient memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python, in NumPy or in MLX."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(one in words for one in WORDS)
    )


def in_words(error: BaseException) -> BaseException:
    """``error`` itself, or a sentence in its place where memory ran out; what the failed step held is let go."""
    if not is_out_of_memory(error):
        return error
    traceback.clear_frames(error.__traceback__)
    mx.clear_cache()
    return TrainingRuntimeError(
        f"memory ran out ({str(error) or type(error).__name__}): lower micro_batch_size or rollout_batch_size, which "
        "change nothing that is trained, or max_new_tokens, or set gradient_checkpointing = true "
        '(docs/troubleshooting.md, "Out of memory").'
    )
