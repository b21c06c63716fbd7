"""Ctrl-C, SIGTERM and the request file, sent to real processes that train."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing.stopping import REQUEST, StopRequest
from checkpointing.store import CheckpointStore
from config.errors import CheckpointError
from monitoring.run_lock import RunLock, is_running

ROOT = Path(__file__).parents[2]


def test_the_first_signal_is_a_wish_and_the_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(tmp_path) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "sigterm"
        assert (tmp_path / REQUEST).exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / REQUEST).exists()


def test_a_file_of_before_is_no_wish_and_one_of_now_is(tmp_path: Path) -> None:
    (tmp_path / REQUEST).touch()
    with StopRequest(tmp_path) as stop:
        assert stop.reason is None
        (tmp_path / REQUEST).touch()
        assert stop.reason == "request"


TWICE = """
import os, signal, sys
from pathlib import Path
from checkpointing.stopping import StopRequest
with StopRequest(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
print("still here")
"""


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "still here" not in done.stdout
    assert "ending at once" in done.stderr


def test_two_runs_do_not_share_a_folder_and_a_dead_one_is_in_nobody_s_way(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from monitoring.run_lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by a run .*process {other.pid} on"):
            RunLock(tmp_path).acquire()
        assert is_running(tmp_path)
        other.kill()
    assert not is_running(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on"):
        RunLock(tmp_path).acquire()  # another trainer of one process, too
    lock.release()


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """``main.py train`` in a folder of its own, of more steps than anybody waits for; it has begun."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    words = "train --model-name embedded --train-path p.jsonl --reward well_formed --num-steps 100000 "
    words += "--max-new-tokens 4 --batch-size 1 --output-dir run --min-free-gb 0 --save-every 1 --lora-r 2"
    with subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *words.split()],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
        process.kill()


@pytest.mark.parametrize("wish", [signal.SIGINT, signal.SIGTERM, REQUEST], ids=["SIGINT", "SIGTERM", "file"])
@pytest.mark.slow
def test_a_run_saves_says_where_and_ends_with_0(
    training: subprocess.Popen[str], tmp_path: Path, wish
) -> None:
    if isinstance(wish, str):
        (tmp_path / "run" / wish).touch()
    else:
        training.send_signal(wish)
    out, err = training.communicate(timeout=60)
    assert training.returncode == 0, err
    assert "go on from there: --resume run" in out
    newest = CheckpointStore(tmp_path / "run").newest()
    assert newest is not None
    assert newest.reason == ("request" if isinstance(wish, str) else signal.Signals(wish).name.lower())
    assert newest.path.name in out
    again = subprocess.run(
        [
            sys.executable,
            str(ROOT / "main.py"),
            "train",
            "--resume",
            "run",
            "--num-steps",
            str(newest.update + 1),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    steps = [
        line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "kind" not in line
    ]
    assert len(steps) == newest.update + 1


def test_a_signal_during_a_save_waits_for_it(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("first")
        os.kill(os.getpid(), signal.SIGTERM)
        (folder / "b").write_text("second")

    with StopRequest(tmp_path) as stop:
        CheckpointStore(tmp_path).save("periodic", 1, fill)
        assert stop.reason == "sigterm"
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    assert set(newest.files) == {"a", "b"}


ALONE = """
import os, signal, sys
from pathlib import Path
from checkpointing.stopping import StopRequest, say
sys.stdin.readline()
with StopRequest(Path(sys.argv[1])) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "sigint"
    say("saved")
    say("where")
Path(sys.argv[1], "through").touch()
"""


def test_a_reader_that_the_same_ctrl_c_has_ended_takes_nothing_with_it(tmp_path: Path) -> None:
    """``main.py train 2>&1 | tee log``: Ctrl-C goes to ``tee``, too, and there is nobody to tell any more."""
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=writing, stderr=writing, text=True,
    ) as child:  # fmt: skip
        os.close(writing)
        os.close(reading)
        child.communicate("go\n")
    assert child.returncode == 0
    assert (tmp_path / "through").exists()


@pytest.mark.slow
def test_a_run_whose_reader_is_gone_saves_when_it_is_asked_to_stop(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    words = (
        "train --model-name embedded --train-path p.jsonl --reward well_formed --num-steps 100000 --lora-r 2 "
    )
    words += "--max-new-tokens 4 --batch-size 1 --output-dir run --min-free-gb 0 --save-every 100000"
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *words.split()], cwd=tmp_path, stdout=writing, stderr=writing
    ) as process:
        os.close(writing)
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.close(reading)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    newest = CheckpointStore(tmp_path / "run").newest()
    assert newest is not None
    assert newest.reason == "sigint"


def test_a_file_system_without_locks_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("monitoring.run_lock.fcntl.flock", no_locks)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "cannot be locked (No locks available)" in caplog.text
    assert not is_running(tmp_path)
    lock.release()
