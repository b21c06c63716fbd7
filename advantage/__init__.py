"""How much better than expected each token was: TD errors, GAE, reward-to-go, group comparisons."""

# First of all: a fast BLAS must be in the process before MLX is loaded, and importing this arranges it.
import base_setup.backend  # noqa: F401
