"""The curves of one or several runs in one picture.

    plot_training({"PPO": read_metrics("runs/ppo/metrics.jsonl"), "GRPO": …}, "plots/training.png")

One panel per quantity, one colour per run. The faint points are the values as they were logged, the
line is their average over a twentieth of the run to either side, so a reader sees the trend and how
much to trust it. A run without a quantity has no curve for it (GRPO has no value function), and a
quantity that no run has gets no panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config.errors import TrainingRuntimeError

Records = Sequence[Mapping[str, Any]]


class Panel(NamedTuple):
    """One quantity. ``axes`` maps the metrics that can stand for it to the words on the axis."""

    title: str
    axes: Mapping[str, str]


PANELS = (
    Panel("Reward", {"reward": "score per completion", "objective/scores": "score per completion"}),
    Panel("KL to the reference", {"objective/kl": "nats per completion", "kl": "nats per token"}),
    Panel("Entropy", {"entropy": "nats per token"}),
    Panel("Completion length", {"completions/mean_length": "tokens"}),
    Panel("Value function", {"explained_variance": "explained variance"}),
    Panel("Gradient norm", {"grad_norm": "L2 norm before clipping"}),
    Panel(
        "Clipped ratios",
        {"clip_ratio/region_mean": "share of tokens", "val/clipfrac_avg": "share of value estimates"},
    ),
)
# Okabe and Ito's colours, told apart with any kind of colour vision; the dashes help in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
DPI = 150


def plot_training(runs: Mapping[str, Records], path: str | Path, title: str = "Training curves") -> Path:
    """Draw ``{label: records of a metrics file}`` into the PNG ``path``, 1200 to 1560 pixels wide."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise TrainingRuntimeError(
            f"Plots need matplotlib, which is not there ({error}); pip install matplotlib."
        ) from error

    panels = [(panel, key) for panel in PANELS if (key := _common_key(panel, runs)) is not None]
    n_columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}.get(len(panels), 4) if panels else 1
    n_rows = max(1, math.ceil(len(panels) / n_columns))
    width = 10.4 if n_columns == 4 else 9.4 if n_columns == 3 else 8.0
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.05)
    # Figure and canvas without pyplot: no global state, and no display is ever asked for.
    figure = Figure(figsize=(width, 0.75 + (2.35 if n_columns > 2 else 3.0) * n_rows), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(_literal(title), fontsize=12, fontweight="bold", x=0.01, ha="left")

    for index, (panel, key) in enumerate(panels):
        axes = figure.add_subplot(n_rows, n_columns, index + 1)
        for run, records in enumerate(runs.values()):
            steps, values = _curve(records, key)
            if not steps.size:
                continue
            colour = COLOURS[run % len(COLOURS)]
            axes.plot(steps, values, ".", color=colour, markersize=3, alpha=0.25, markeredgewidth=0)
            axes.plot(
                steps, _smoothed(values), color=colour, linestyle=DASHES[run % len(DASHES)], linewidth=1.6
            )
        axes.set_title(panel.title, fontsize=9.5, loc="left")
        axes.set_ylabel(panel.axes[key], fontsize=8)
        axes.set_xlabel("training step", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if not panels:
        figure.text(0.5, 0.45, "No metrics were recorded.", ha="center", color="#555555")

    handles = [
        Line2D([], [], color=COLOURS[run % len(COLOURS)], linestyle=DASHES[run % len(DASHES)], linewidth=1.6)
        for run in range(len(runs))
    ]
    if handles and panels:
        labels = [_literal(label) for label in runs]
        if len(panels) < n_columns * n_rows:  # the cell that is free
            free = figure.add_subplot(n_rows, n_columns, n_columns * n_rows)
            free.axis("off")
            free.legend(
                handles, labels, loc="center", fontsize=9.5, frameon=False, title="Run", title_fontsize=9.5
            )
        else:
            figure.legend(
                handles, labels, loc="upper right", ncols=min(len(runs), 4), fontsize=9, frameon=False
            )

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=DPI)
    except OSError as error:
        raise TrainingRuntimeError(
            f"The plot {path} cannot be written: {error.strerror or error}."
        ) from error
    return path


def _common_key(panel: Panel, runs: Mapping[str, Records]) -> str | None:
    """The metric that most runs have, so that all the curves of a panel are in the same unit."""
    counts = {key: sum(_curve(records, key)[0].size > 0 for records in runs.values()) for key in panel.axes}
    best = max(counts, key=lambda key: counts[key])
    return best if counts[best] else None


def _curve(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric. After a resume a step is logged twice: the later one counts."""
    points: dict[float, float] = {}
    for index, record in enumerate(records):
        value, step = record.get(key), record.get("step", index)
        if _is_finite(value) and _is_finite(step):
            points[float(step)] = float(value)  # type: ignore[arg-type]
    steps = np.array(sorted(points))
    return steps, np.array([points[step] for step in steps])


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the curve to either side.

    At the two ends, where one side is missing, it is a straight line fitted to the outermost window: a
    mean of what is left would bend a rising curve flat, and a shorter window would show the noise.
    """
    half = len(values) // 20
    if half == 0:
        return values
    window = 2 * half + 1
    middle = np.convolve(values, np.full(window, 1 / window), mode="valid")
    places = np.arange(window)
    first = np.polyval(np.polyfit(places, values[:window], 1), places[:half])
    last = np.polyval(np.polyfit(places, values[-window:], 1), places[-half:])
    return np.concatenate([first, middle, last])


def _literal(text: str) -> str:
    """Without what matplotlib reads into a text: ``$`` for mathematics, ``_`` for "not in the legend"."""
    text = str(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
