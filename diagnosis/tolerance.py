"""How far two passes over the same weights may be apart, by the dtype that they compute in."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from base_setup.parameters import named_arrays
from models.policy_model import PolicyModel

#: Relative spacing of the numbers of a dtype (2 to the minus number of fraction bits).
SPACING = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


def compute_dtype_of(model: nn.Module) -> mx.Dtype:
    """The coarsest floating dtype among the weights: the hidden states are no finer."""
    floating = {x.dtype for x in named_arrays(model.parameters()).values() if x.dtype in SPACING}
    return max(floating, key=lambda dtype: SPACING[dtype], default=mx.float32)


def logprob_tolerance(policy: PolicyModel, tokens: mx.array, temperature: float) -> float:
    """Largest difference of one token's logprob, in nats, that rounding explains.

    In 16 bits it grows with the logits. A bfloat16 or float16 pass over random weights, of 3 and of 8 layers, was off
    the float32 pass over the same weights by 0.4 to 3.4 spacings of its largest logit, at logits of 1 to 36; allowed
    are 4, of 8 at least. In float32 passes of different shapes differ by some 1e-6.

    Args:
        tokens: (B, T) int32, of which the first row says how large logits are.
    """
    spacing = SPACING[compute_dtype_of(policy.model)]
    if spacing == SPACING[mx.float32]:
        return 1e-3
    size = float(mx.max(mx.abs(policy.forward(tokens[:1]).logits.astype(mx.float32)))) / temperature
    return 4 * spacing * max(size, 8.0)


def largest(differences: np.ndarray) -> float:
    """The largest absolute value, 0 of none; NaN where one is."""
    return float(np.abs(differences).max()) if differences.size else 0.0


def at_mask(array: mx.array, mask: mx.array) -> np.ndarray:
    """The sampled positions of a ``(B, T)`` array, float64 ``(n,)``."""
    picked: np.ndarray = np.array(array.astype(mx.float32))[np.array(mask)].astype(np.float64)
    return picked
