"""Losses, and the optimiser steps that follow them."""

# First of all: a fast BLAS must be in the process before MLX is loaded, and importing this arranges it.
import base_setup.backend  # noqa: F401
