"""The four models of RLHF (policy, reference, value, reward), built over one set of base weights."""

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)
