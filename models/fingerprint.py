"""A fingerprint of a model's weights: whether they are the ones that a run began with."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from base_setup.parameters import named_arrays

NUMBERS = 64  # looked at in each array: other weights differ nearly everywhere


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every array's name, shape, type and ``NUMBERS`` of its numbers, evenly spread."""
    digest = hashlib.sha256()
    for name, array in sorted(named_arrays(model.parameters()).items()):
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        some = array.reshape(-1)[:: max(1, array.size // NUMBERS)]
        if mx.issubdtype(array.dtype, mx.floating):
            some = some.astype(mx.float32)
        digest.update(np.ascontiguousarray(np.array(some)).tobytes())
    return digest.hexdigest()
