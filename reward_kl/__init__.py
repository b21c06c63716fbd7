"""Scores and KL to the reference, turned into one reward per token."""

# First of all: a fast BLAS must be in the process before MLX is loaded, and importing this arranges it.
import base_setup.backend  # noqa: F401
