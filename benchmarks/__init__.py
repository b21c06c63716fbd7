"""Measurements: each module is a command, ``./run python -m benchmarks.NAME``."""

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)
