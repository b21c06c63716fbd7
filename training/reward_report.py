"""How good a reward model is on comparisons that it has not learned: as numbers, JSON and text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

BINS = 10
REPORT = "reward_report"


@dataclass(frozen=True)
class Bin:
    """Comparisons that the model is about equally sure of."""

    confidence: float  # mean σ(|margin|)
    accuracy: float  # share in the right order
    count: int


@dataclass(frozen=True)
class RewardReport:
    """A margin is the score of the better answer minus that of the worse, before normalisation.

    Attributes:
        accuracy: share of comparisons in the right order, ties counted half. loss: mean −log σ(margin).
        histogram_edges, histogram_counts: of the margins, 0 being an edge.
        calibration_error: expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599): how far, on
            average over ten bins of confidence σ(|margin|), the share of right ones is from it. 0 is best.
        length_correlation: Pearson's r of an answer's score with its tokens; None where either is constant.
        longer_is_better: share of comparisons whose better answer is the longer one, by the labels;
            longer_scores_higher: by the model. None where no two lengths differ.
    """

    comparisons: int
    answers: int
    accuracy: float
    loss: float
    margin_mean: float
    margin_std: float
    histogram_edges: tuple[float, ...]
    histogram_counts: tuple[int, ...]
    calibration_error: float
    calibration: tuple[Bin, ...]
    length_correlation: float | None
    longer_is_better: float | None
    longer_scores_higher: float | None

    def as_dict(self) -> dict[str, Any]:
        """All of it, plain."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"comparisons         {self.comparisons} of {self.answers} answers",
            f"accuracy            {self.accuracy:.1%}",
            f"loss                {self.loss:.4f} (0.6931 is a coin toss)",
            f"margin              {self.margin_mean:+.3f} on average, standard deviation {self.margin_std:.3f}",
            f"calibration error   {self.calibration_error:.3f}",
            f"score and length    {_correlation(self.length_correlation)}",
        ]
        if self.longer_is_better is not None and self.longer_scores_higher is not None:
            lines.append(
                f"the longer answer   is the better one in {self.longer_is_better:.1%} of the pairs, and scores higher "
                f"in {self.longer_scores_higher:.1%}"
            )
        return "\n".join([*lines, "", *self._histogram(), "", *self._calibration()])

    def _histogram(self) -> list[str]:
        most = max(self.histogram_counts)
        edges = zip(self.histogram_edges[:-1], self.histogram_edges[1:], strict=True)
        return ["margins"] + [
            f"  {low:+8.3f} … {high:+8.3f}  {count:6d}  {'█' * round(40 * count / most)}"
            for (low, high), count in zip(edges, self.histogram_counts, strict=True)
        ]

    def _calibration(self) -> list[str]:
        rows = [f"  {one.confidence:10.3f}  {one.accuracy:8.3f}  {one.count:6d}" for one in self.calibration]
        return ["confidence  accuracy   pairs", *rows]

    def save(self, folder: Path) -> None:
        """Write ``reward_report.json`` and ``reward_report.txt``."""
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        (folder / f"{REPORT}.json").write_text(text, encoding="utf-8")
        (folder / f"{REPORT}.txt").write_text(f"{self}\n", encoding="utf-8")


def _correlation(r: float | None) -> str:
    return "no correlation to measure: one of them is constant" if r is None else f"correlation {r:+.3f}"


def reward_report(scores: np.ndarray, lengths: np.ndarray, pairs: np.ndarray) -> RewardReport:
    """The report of answers and comparisons.

    Args:
        scores: (A,) of each answer, before normalisation. lengths: (A,) tokens of each, its prompt left out.
        pairs: (N, 2) positions of the better and of the worse answer, N ≥ 1.
    """
    scores, lengths = scores.astype(np.float64), lengths.astype(np.float64)
    better, worse = pairs[:, 0], pairs[:, 1]
    margins = scores[better] - scores[worse]
    right = (margins > 0) + 0.5 * (margins == 0)
    error, bins = calibration(margins)
    widest = float(np.abs(margins).max()) or 1.0
    counts, edges = np.histogram(margins, bins=BINS, range=(-widest, widest))
    longer = lengths[better] - lengths[worse]
    differ = longer != 0
    return RewardReport(
        comparisons=len(margins),
        answers=len(scores),
        accuracy=float(right.mean()),
        loss=float(np.logaddexp(0.0, -margins).mean()),
        margin_mean=float(margins.mean()),
        margin_std=float(margins.std()),
        histogram_edges=tuple(edges.tolist()),
        histogram_counts=tuple(counts.tolist()),
        calibration_error=error,
        calibration=bins,
        length_correlation=_pearson(scores, lengths),
        longer_is_better=float((longer[differ] > 0).mean()) if differ.any() else None,
        longer_scores_higher=(
            float((np.sign(margins[differ]) * longer[differ] > 0).mean()) if differ.any() else None
        ),
    )


def calibration(margins: np.ndarray) -> tuple[float, tuple[Bin, ...]]:
    """Expected calibration error over ``BINS`` equal bins of confidence from ½ to 1; the bins not empty."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = tuple(
        Bin(float(confidence[which == i].mean()), float(right[which == i].mean()), int((which == i).sum()))
        for i in range(BINS)
        if (which == i).any()
    )
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / len(margins), bins


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
