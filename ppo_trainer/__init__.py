"""The loop: rollouts → experience → update, and what it is made of."""

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)
