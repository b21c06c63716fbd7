"""The report by hand, and that a model which knows how sure it may be has no calibration error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from training.reward_report import calibration, reward_report

SCORES = np.array([2.0, 0.5, 1.0, 1.0, -1.0])
LENGTHS = np.array([4, 2, 9, 1, 3])
PAIRS = np.array([[0, 1], [2, 3], [4, 0]])  # margins 1.5, 0, -3


def test_the_numbers_by_hand() -> None:
    report = reward_report(SCORES, LENGTHS, PAIRS)
    assert (report.comparisons, report.answers) == (3, 5)
    assert report.accuracy == 0.5  # right, a tie, wrong
    assert report.loss == pytest.approx((np.log1p(np.exp(-1.5)) + np.log(2) + np.log1p(np.exp(3))) / 3)
    assert report.margin_mean == pytest.approx(-0.5)
    assert report.margin_std == pytest.approx(np.sqrt((4 + 0.25 + 6.25) / 3))
    assert report.histogram_edges == pytest.approx([-3 + 0.6 * i for i in range(11)])
    assert report.histogram_counts == (1, 0, 0, 0, 0, 1, 0, 1, 0, 0)  # −3, 0 (an edge: to the right), 1.5
    sure = [1 / (1 + np.exp(-x)) for x in (0.0, 1.5, 3.0)]
    assert [(b.confidence, b.accuracy, b.count) for b in report.calibration] == [
        (pytest.approx(sure[0]), 0.5, 1),
        (pytest.approx(sure[1]), 1.0, 1),
        (pytest.approx(sure[2]), 0.0, 1),
    ]
    assert report.calibration_error == pytest.approx((0 + (1 - sure[1]) + sure[2]) / 3)
    x, y = SCORES - SCORES.mean(), LENGTHS - LENGTHS.mean()
    assert report.length_correlation == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
    assert report.longer_is_better == pytest.approx(2 / 3)  # 4 > 2, 9 > 1, 3 < 4
    assert report.longer_scores_higher == pytest.approx(2 / 3)  # 4 at 2.0; a tie is none; 4 over 3


def test_who_is_right_as_often_as_he_says_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0, 4, size=200_000)
    signs = np.where(rng.random(size=sizes.size) < 1 / (1 + np.exp(-sizes)), 1, -1)
    assert calibration(signs * sizes)[0] < 0.005
    assert calibration(3 * signs * sizes)[0] > 0.05  # three times as sure as it may be


def test_constant_scores_have_no_correlation(tmp_path: Path) -> None:
    report = reward_report(np.zeros(4), np.array([1, 2, 3, 3]), np.array([[0, 1], [2, 3]]))
    assert report.length_correlation is None
    assert report.accuracy == 0.5
    assert report.longer_is_better == 0
    assert report.longer_scores_higher == 0
    report.save(tmp_path)
    assert json.loads((tmp_path / "reward_report.json").read_text())["comparisons"] == 2
    text = (tmp_path / "reward_report.txt").read_text()
    assert "accuracy            50.0%" in text
    assert "no correlation to measure" in text
