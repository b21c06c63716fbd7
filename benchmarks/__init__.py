"""Measurements that the documentation quotes, and the work that they measure."""

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)
