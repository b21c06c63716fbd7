"""Counts as bars of text."""

from __future__ import annotations

import math

import numpy as np

BARS = 10
WIDTH = 40


def histogram(values: np.ndarray) -> list[str]:
    """About ten lines: a range of whole numbers, how many values lie in it, and a bar as long.

    >>> print("\\n".join(histogram(np.array([1, 2, 2, 3]))))
        1  1 ████████████████████
        2  2 ████████████████████████████████████████
        3  1 ████████████████████
    """
    low, high = int(values.min()), int(values.max())
    step = _round_step((high - low + 1) / BARS)
    start = low // step * step
    counts = np.bincount((values - start) // step)
    labels = [
        str(start + i * step) if step == 1 else f"{start + i * step}–{start + (i + 1) * step - 1}"
        for i in range(len(counts))
    ]
    label_width, count_width = max(map(len, labels)), len(str(counts.max()))
    return [
        f"    {label:>{label_width}}  {count:>{count_width}} {'█' * math.ceil(WIDTH * count / counts.max())}".rstrip()
        for label, count in zip(labels, counts.tolist(), strict=True)
    ]


def _round_step(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, … that is not smaller."""
    power = 10 ** max(math.floor(math.log10(width)), 0) if width > 1 else 1
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
