"""What is done with a model besides training it: convert, fuse, generate, chat, make preferences, run a pipeline."""

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)
