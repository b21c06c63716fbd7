"""How far two passes over the same weights may be apart, by the dtype that they compute in."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from base_setup.parameters import named_arrays

#: Relative spacing of the numbers of a dtype (2 to the minus number of fraction bits).
SPACING = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


def compute_dtype_of(model: nn.Module) -> mx.Dtype:
    """The coarsest floating dtype among the weights: the hidden states are no finer."""
    floating = {x.dtype for x in named_arrays(model.parameters()).values() if x.dtype in SPACING}
    return max(floating, key=lambda dtype: SPACING[dtype], default=mx.float32)


def logprob_tolerance(model: nn.Module) -> float:
    """Largest difference of one token's logprob, in nats, that rounding explains.

    A logit of size 20 to 30 is rounded by up to 16 spacings, and two passes of another shape differ by two such
    roundings; in float32 the sums of the layers before it weigh more, hence the 1e-3.
    """
    return max(32 * SPACING[compute_dtype_of(model)], 1e-3)


def largest(differences: np.ndarray) -> float:
    """The largest absolute value, 0 of none; NaN where one is."""
    return float(np.abs(differences).max()) if differences.size else 0.0


def at_mask(array: mx.array, mask: mx.array) -> np.ndarray:
    """The sampled positions of a ``(B, T)`` array, float64 ``(n,)``."""
    picked: np.ndarray = np.array(array.astype(mx.float32))[np.array(mask)].astype(np.float64)
    return picked
