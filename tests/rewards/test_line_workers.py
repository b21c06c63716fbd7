"""Children of a reward: Ctrl-C is for the run, and none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import json, os, sys, time
open(os.path.join(sys.argv[1], f"pid-{os.getpid()}"), "w").close()
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    time.sleep(1.0)
    print(json.dumps(json.loads(line) * 2), flush=True)
"""
RUN = """
import sys
from pathlib import Path
from checkpointing.stopping import StopRequest
from rewards.line_workers import LineWorkers
with StopRequest(Path(sys.argv[1])) as stop:
    workers = LineWorkers([sys.executable, "-c", sys.argv[2], sys.argv[1]], 2)
    print(workers.ask([1, 2], 20.0, 60.0), stop.reason, flush=True)
"""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_whole_group_of_the_run(tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal sends Ctrl-C. The step is finished with its children's answers; then they are gone."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), WORKER],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        until = time.monotonic() + 60
        while len(pids := [int(p.name[4:]) for p in tmp_path.glob("pid-*")]) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert all(_alive(pid) for pid in pids)
        os.killpg(run.pid, number)
        out, _ = run.communicate(timeout=60)
    if number == signal.SIGINT:
        assert out == "[2, 4] sigint\n"
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < until, "a child has outlived the run"
        time.sleep(0.05)
