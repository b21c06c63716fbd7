"""The picture of a run: made without a display, whatever the metrics lack."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.errors import TrainingRuntimeError
from monitoring.plots import PANELS, _common_key, _curve, _smoothed, plot_training


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def records(n: int, *keys: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"step": step, **{key: float(rng.normal()) for key in keys}} for step in range(n)]


EVERY_KEY = [next(iter(panel.axes)) for panel in PANELS]


@pytest.mark.parametrize(
    "runs",
    [
        {"PPO": records(60, *EVERY_KEY), "GRPO $x_1$": records(40, "reward", "kl", "entropy")},
        {"_hidden?": records(3, "reward")},
        {"none": [], "null": [{"step": 1, "reward": None}, {"reward": math.nan}]},
        {},
    ],
    ids=["two runs", "three points", "no values", "no runs"],
)
def test_a_picture_of_readable_size_comes_out(runs: dict[str, Any], tmp_path: Path) -> None:
    path = plot_training(runs, tmp_path / "plots" / "training.png")
    width, height = size_of(path)
    assert 1200 <= width <= 1600
    assert 400 <= height <= 1200


def test_all_the_curves_of_a_panel_are_the_same_quantity() -> None:
    kl = next(panel for panel in PANELS if "kl" in panel.axes)
    both, token_only = records(5, "kl", "objective/kl"), records(5, "kl")
    assert _common_key(kl, {"PPO": both}) == "objective/kl"
    assert _common_key(kl, {"PPO": both, "GRPO": token_only}) == "kl"  # the one that both have
    assert _common_key(kl, {"SFT": records(5, "loss")}) is None


def test_a_step_that_was_logged_twice_counts_once_and_later() -> None:
    logged = [{"step": 1, "reward": 0.0}, {"step": 2, "reward": 9.0}, {"step": 2, "reward": 1.0}]
    logged += [{"step": 2, "kind": "evaluate", "eval/reward": 5.0}]  # type: ignore[dict-item]
    steps, values = _curve(logged, "reward")
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(values, [0, 1])


def test_smoothing_keeps_a_straight_line_and_averages_the_middle() -> None:
    line = np.linspace(2.0, 5.0, 101)
    np.testing.assert_allclose(_smoothed(line), line)  # half window 5, ends included
    np.testing.assert_array_equal(_smoothed(line[:19]), line[:19])  # too short to smooth
    spike = np.zeros(41)  # half window 2
    spike[20] = 5.0
    expected = np.zeros(41)
    expected[18:23] = 1.0
    np.testing.assert_allclose(_smoothed(spike), expected, atol=1e-12)


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "in_the_way").write_text("a file")
    with pytest.raises(TrainingRuntimeError, match=r"training\.png cannot be written"):
        plot_training({"PPO": records(3, "reward")}, tmp_path / "in_the_way" / "training.png")
