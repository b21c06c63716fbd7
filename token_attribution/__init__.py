"""From model outputs to one number per token: masks, logprobs, entropies."""

# First of all: a fast BLAS must be in the process before MLX is loaded, and importing this arranges it.
import base_setup.backend  # noqa: F401
