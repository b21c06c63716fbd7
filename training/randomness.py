"""The global random generators of Python, NumPy and MLX: what a checkpoint keeps of them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np


def random_state() -> dict[str, Any]:
    """The three states, ready for JSON."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: Any = mx.random.state
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "mlx": [int(word) for word in np.array(state[0])],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on where :func:`random_state` was taken."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    high, low = state["mlx"]
    mx.random.seed((high << 32) | low)  # MLX's state cannot be written; a seed is those two words
