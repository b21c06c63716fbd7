"""A short training run looked at from every side: what ``main.py doctor`` checks."""

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)
