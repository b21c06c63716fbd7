"""What travels through the pipeline: prompts, rollouts, experience, and the buffer that deals it out."""

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)
