"""What a reward returned, as numbers: one finite number or NaN ("does not apply") per row, or a sentence why not."""

from __future__ import annotations

import decimal
import math
import numbers
from typing import Any

import numpy as np

from config.errors import RewardError

FLOAT32_MAX = float(np.finfo(np.float32).max)


def checked_values(name: str, returned: Any, rows: int) -> tuple[np.ndarray, dict[int, RewardError]]:
    """The values ``(rows,)`` float32, NaN where the reward does not apply or said something that is no number.

    Returns:
        The values, and for each row with an unusable one the error that says so.
    Raises:
        RewardError: where the answer as a whole is not one value per row.
    """
    if returned is None:
        raise RewardError(
            f"Reward {name!r} returned None for the whole batch; expected a list of {rows} numbers: "
            f"is a `return` missing at its end?"
        )
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"Reward {name!r} returned {_shown(returned)}; expected a list of {rows} numbers, "
            f"one per completion: collect them in a list and return that."
        )
    if len(values) != rows:
        raise RewardError(
            f"Reward {name!r} returned {len(values)} values for {rows} completions; expected exactly one "
            f"per completion, in their order: return None where it does not apply, and leave no row out."
        )
    found, unusable = np.full(rows, np.nan, dtype=np.float32), {}
    for row, value in enumerate(values):
        try:
            found[row] = _checked_number(name, row, value)
        except RewardError as error:
            unusable[row] = error
    return found, unusable


def _checked_number(name: str, row: int, value: Any) -> float:
    if value is None:
        return math.nan
    shape = getattr(value, "shape", None)
    if shape == () and hasattr(value, "item"):  # a NumPy, MLX or torch scalar
        value = value.item()
    if not isinstance(value, (numbers.Real, decimal.Decimal)):
        advice = "return a number, for example float(...) of it"
        if isinstance(value, (list, tuple)) or shape:
            advice = "add its parts up to one number, or make several rewards of them"
        raise RewardError(
            f"Reward {name!r} returned {_shown(value)} for row {row}; "
            f"expected a finite number or None: {advice}.",
            row=row,
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if math.isnan(number):
        raise RewardError(
            f"Reward {name!r} returned nan for row {row}; expected a finite number: "
            f"look for 0/0 or the mean of nothing, and return None where the reward does not apply.",
            row=row,
        )
    if abs(number) > FLOAT32_MAX:
        raise RewardError(
            f"Reward {name!r} returned {number:g} for row {row}; expected a number that float32 can hold: "
            f"look for a division by zero or log(0), and clip the reward to a range such as [-10, 10].",
            row=row,
        )
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"
