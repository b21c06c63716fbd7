"""Metrics and samples on disk: every line stands, and the disk cannot stop a run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from config.errors import DataLoadError
from monitoring.metrics_file import MetricsFile, plain, read_metrics
from monitoring.recorder import RunRecorder
from monitoring.samples import FIELDS, SamplesFile


def test_what_is_written_is_read_back_and_each_line_is_there_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "new folder" / "metrics.jsonl")
    for step in range(3):
        file.write({"step": step, "reward": step / 2})
        assert read_metrics(file.path)[-1] == {"step": step, "reward": step / 2}
    assert file.path.read_bytes().count(b"\n") == 3


def test_nan_and_infinity_are_null_and_every_line_is_strict_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"a": math.nan, "b": math.inf, "c": np.float32("nan"), "d": np.array(-np.inf)})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(file.path.read_text(), parse_constant=refuse) == dict.fromkeys("abcd")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(2.0), 2.0),
        (mx.array(1.5), 1.5),
        (True, True),
        (None, None),
        ("line\nbreak \u2028 \ud800", "line\nbreak \u2028 \ud800"),
        ("x" * 1000, "x" * 199 + "…"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_values_are_numbers_or_short_strings(value: object, written: object, tmp_path: Path) -> None:
    assert plain(value) == written
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"value": value})
    assert read_metrics(file.path) == [{"value": written}]


def test_a_torn_last_line_is_left_out_and_the_next_run_starts_a_line_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}]
    assert not caplog.records  # a run may be writing that line right now
    MetricsFile(path).write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert "m.jsonl:2 is not a JSON object" in caplog.text


def test_a_metrics_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataLoadError, match=r"no_such\.jsonl cannot be read"):
        read_metrics(tmp_path / "no_such.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_warns_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        file = MetricsFile("/dev/full")
        for step in range(3):
            file.write({"step": step})
    assert len(caplog.records) == 1
    assert "/dev/full cannot be written (" in caplog.text


def test_a_folder_that_cannot_be_made_warns_once_and_later_lines_arrive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in_the_way").write_text("a file")
    file = MetricsFile(tmp_path / "in_the_way" / "m.jsonl")
    file.write({"step": 1})
    file.write({"step": 2})
    assert len(caplog.records) == 1
    (tmp_path / "in_the_way").unlink()
    file.write({"step": 3})
    assert read_metrics(file.path) == [{"step": 3}]


def test_samples_have_their_fields_and_nothing_else(tmp_path: Path) -> None:
    file = SamplesFile(tmp_path / "samples.jsonl")
    file.write(
        7,
        [
            {
                "prompt": "8",
                "completion": " 10\n" + "long " * 100,
                "score": np.float32("nan"),
                "components": {"digits": np.float32(0.5), "style": math.nan},
                "terminated": np.bool_(False),
                "n_tokens": np.int32(5),
                "logprobs": [0.0],
            },
            {"prompt": "9", "completion": "é 好 \ud800"},
        ],
    )
    full, sparse = [json.loads(line) for line in file.path.read_text(encoding="utf-8").splitlines()]
    assert tuple(full) == tuple(sparse) == FIELDS
    assert full["completion"] == " 10\n" + "long " * 100  # never cut
    assert (full["step"], full["score"], full["terminated"], full["n_tokens"]) == (7, None, False, 5)
    assert full["components"] == {"digits": 0.5, "style": None}
    assert sparse["completion"] == "é 好 \ud800"
    assert sparse["score"] is None


def test_the_recorder_keeps_the_moments_of_a_run_apart(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path / "run", log_samples_every=2, max_logged_samples=2)
    recorder.on_train_begin(trainer=None)
    samples = [{"prompt": str(index), "completion": "x", "score": 1.0} for index in range(5)]
    for step in (1, 2, 3, 4):
        recorder.on_samples(step, samples)
        recorder.on_step_end(step, {"reward": 0.1 * step, "epoch": step / 2})
    recorder.on_evaluate(4, {"reward": 0.9, "eval/kl": 2.0})
    recorder.on_epoch_end(2, {"reward": 0.25})
    recorder.on_train_end({"reward": 0.4})

    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[0] == {"step": 1, "reward": 0.1, "epoch": 0.5}
    assert records[4:] == [
        {"step": 4, "kind": "evaluate", "eval/reward": 0.9, "eval/kl": 2.0},
        {"step": 4, "epoch": 2, "kind": "epoch", "epoch/reward": 0.25},
        {"step": 4, "kind": "end", "final/reward": 0.4},
    ]
    written = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in written] == [(2, "0"), (2, "1"), (4, "0"), (4, "1")]


def test_a_recorder_can_leave_samples_out(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, log_samples_every=0)
    recorder.on_samples(0, [{"prompt": "8", "completion": "x"}])
    assert not (tmp_path / "samples.jsonl").exists()
