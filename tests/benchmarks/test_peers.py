"""./run bench-peers without running anybody: its arithmetic, its table and what it says when a system fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import driver
from benchmarks.peers.driver import SYSTEMS, Cell, Entry, Run, aggregate
from benchmarks.peers.record import Job, Record, Stopwatch, even_words, loaded_blas, peak_memory

CELL = Cell("grpo", "tiny", 64)
OURS, TRL = Entry("ours", "fast"), Entry("trl", "own")
ROOT = Path(__file__).resolve().parents[2]


def step(seconds: float, rollout: float | None = 0.5, *, rows: int = 32, length: int = 64) -> dict[str, Any]:
    return {
        "rows": rows,
        "seconds": seconds,
        "rollout": rollout,
        "tokens": rows * length,
        "widest": length,
        "narrowest": length,
        "cpu": 2.0 * seconds,
        "kernel": 0.5 * seconds,
        "others": 0.25,
    }


def ran(entry: Entry, *steps: dict[str, Any], turn: int = 0, cell: Cell = CELL, peak: int = 10**9) -> Run:
    result = {"steps": list(steps), "peak_bytes": peak, "versions": {"mlx": "1"}, "blas": ["libx.so"]}
    return Run(cell, entry, turn, 0.0, result)


def failed(entry: Entry, why: str = "it failed: no", cell: Cell = CELL) -> Run:
    return Run(cell, entry, 0, 0.0, None, why)


def job(folder: Path, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "system": "ours",
        "kind": "grpo",
        "model": "somewhere",
        "prompts": ["t1", "t2"],
        "completion": 3,
        "group": 2,
        "warm_up": 1,
        "steps": 2,
        "learning_rate": 1e-6,
        "seed": 0,
        "scratch": str(folder),
        "result": str(folder / "result.json"),
    }
    return Job(**(fields | changes))


# -- What a worker records ----------------------------------------------------------------------------


def test_a_job_survives_the_file(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(asdict(job(tmp_path, rows=[1, 8]))))
    assert Job.read(path) == job(tmp_path, rows=[1, 8])
    assert Job.read(path).batch == 4


def test_a_record_counts_the_tokens_that_were_made(tmp_path):
    record = Record(job(tmp_path), ["numpy"], ["a note"])
    record.add(1.5, None, [3, 2, 3, 3])
    record.write()
    written = json.loads((tmp_path / "result.json").read_text())
    (found,) = written["steps"]
    assert (found["rows"], found["tokens"], found["narrowest"], found["widest"]) == (4, 11, 2, 3)
    assert found["rollout"] is None
    assert found["others"] >= 0.0
    assert written["peak_bytes"] > 10**7
    assert written["versions"]["numpy"]
    assert written["notes"] == ["a note"]


def test_the_reward_counts_even_words():
    assert even_words(["t2 t3 t10", "", "t1"], anything=[1, 2, 3]) == [2.0, 0.0, 0.0]


def test_a_stopwatch_hands_on_what_it_times():
    watch = Stopwatch(lambda x, y: x + y)
    assert watch(1, y=2) == 3
    assert watch.returned == 3
    assert watch.take() > 0.0
    assert watch.take() == 0.0


def test_memory_and_libraries_are_this_process_s_own():
    assert 10**7 < peak_memory() < 10**12
    assert all("/" not in name and not name.startswith("libscipy_openblas64_") for name in loaded_blas())


def test_workers_need_nothing_of_ours_but_the_record():
    """A peer's environment has the peer alone."""
    for system in SYSTEMS.values():
        if system.environment is not None:
            text = (ROOT / "benchmarks" / "peers" / f"worker_{system.worker}.py").read_text()
            imports = [row for row in text.splitlines() if row.startswith("from benchmarks")]
            assert all(row.startswith("from benchmarks.peers.record import") for row in imports)
            assert "base_setup" not in text


# -- How workers are started --------------------------------------------------------------------------


def test_every_system_has_its_worker_and_its_requirements():
    for system in SYSTEMS.values():
        assert (ROOT / "benchmarks" / "peers" / f"worker_{system.worker}.py").is_file()
        if system.environment is not None:
            lines = (ROOT / f"requirements-peers-{system.environment}.txt").read_text().splitlines()
            assert all("==" in row for row in lines if row and not row.startswith("#")), "pinned"


def test_workers_get_the_same_variables_and_the_blas_asked_for():
    base = {"PATH": "/bin", "OPENBLAS_CORETYPE": "Haswell", "LD_PRELOAD": "x.so", "MLX_PPO_BLAS": "y.so"}
    fast = driver.worker_environment(base, Entry("mlx-lm-lora", "fast"), "/lib/libblas.so")
    slow = driver.worker_environment(base, Entry("mlx-lm-lora", "reference"), "/lib/libblas.so")
    torch = driver.worker_environment(base, TRL, "/lib/libblas.so")
    assert fast["LD_PRELOAD"] == "/lib/libblas.so"
    assert slow["MLX_PPO_BLAS"] == "none"
    assert "LD_PRELOAD" not in slow | torch
    for variables in (fast, slow, torch):
        assert variables["PATH"] == "/bin"
        assert variables.items() >= driver.SPINNING.items()
        assert "OMP_NUM_THREADS" not in variables
        assert "OPENBLAS_CORETYPE" not in variables


def test_threads_are_set_for_every_library_or_for_none():
    one = driver.worker_environment({}, TRL, None, threads=1)
    assert {one[name] for name in driver.THREADS} == {"1"}


def test_waiting_for_a_quiet_machine_ends_at_once_on_one_and_gives_up_on_a_busy_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(driver.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(driver, "busy_time", lambda: 0.1 * clock[0])
    driver.wait_for_quiet(60.0)
    assert clock[0] == 2.0
    monkeypatch.setattr(driver, "busy_time", lambda: clock[0])
    driver.wait_for_quiet(60.0)
    assert clock[0] == 62.0
    driver.wait_for_quiet(0.0)
    assert clock[0] == 62.0


def test_rounds_begin_with_another_system_each():
    entries = driver.entries_of("grpo", list(SYSTEMS), reference_too=True)
    assert Entry("trl", "reference") not in entries  # torch has a BLAS of its own
    assert Entry("ours", "reference") in entries
    assert {driver.rotated(entries, turn)[0] for turn in range(len(entries))} == set(entries)
    assert driver.rotated([], 3) == []


def test_a_failed_worker_is_told_in_a_sentence(tmp_path):
    def why(program: str, timeout: float = 60.0) -> str:
        stub, script = tmp_path / "python", tmp_path / "script.py"
        script.write_text(program + "\n")
        stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')  # no #! line takes a space
        stub.chmod(0o755)
        result, failure = driver.run_worker(str(stub), "trl", job(tmp_path), os.environ, timeout)
        assert result is None or failure == ""
        return failure

    assert why("raise ValueError('no such thing')") == "it failed: ValueError: no such thing"
    assert why("import time; time.sleep(30)", timeout=0.2) == "it was not done within 0 seconds"
    assert why(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})").startswith("signal 9 ended it")
    assert why("pass").startswith("it left no result that can be read")
    assert why(f"open({str(tmp_path / 'result.json')!r}, 'w').write('{{}}')") == ""


def test_an_environment_that_cannot_be_made_is_told_in_a_sentence(tmp_path, monkeypatch):
    script = tmp_path / "run"
    script.write_text(
        "#!/bin/sh\necho 'ERROR: no such package' >&2\necho 'run: the installation failed' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(driver, "ROOT", tmp_path)
    assert driver.interpreter(None) == (sys.executable, "")
    assert driver.interpreter("trl") == (
        "",
        "its environment could not be made: ERROR: no such package – the installation failed",
    )
    script.write_text("#!/bin/sh\nexit 0\n")
    assert driver.interpreter("trl") == (str(tmp_path / ".venv-peers/trl/bin/python"), "")


def test_the_script_refuses_an_environment_that_nobody_described():
    done = subprocess.run([str(ROOT / "run"), "peer", "nobody"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "run: there is no requirements-peers-nobody.txt.\n"


def test_last_words_are_short_and_never_empty():
    assert driver.last_words(" \n") == "it said nothing"
    assert driver.last_words("a\n\nb\n") == "b"
    assert len(driver.last_words("x" * 1000, longest=50)) == 51


# -- What it comes to ---------------------------------------------------------------------------------


def test_medians_leave_out_the_warm_up_of_every_round():
    runs = [
        ran(OURS, step(99.0), step(1.0), step(2.0), peak=1),
        ran(OURS, step(99.0), step(3.0), step(7.0), turn=1, peak=2),
    ]
    (row,) = aggregate(runs, warm_up=1)
    assert (row.seconds, row.fastest, row.slowest, row.steps) == (2.5, 1.0, 7.0, 4)
    assert (row.rollout, row.rest) == (0.5, 2.0)
    assert (row.peak_bytes, row.kernel_share, row.others) == (2, 0.25, 0.25)
    assert row.complaint == ""


def test_each_number_of_rows_has_a_warm_up_of_its_own():
    cell = Cell("rollout", "tiny", 64)
    run = ran(
        Entry("ours-rollout", "fast"), *(step(s, rows=r) for r in (1, 8) for s in (9.0, 2.0)), cell=cell
    )
    assert [(row.rows, row.seconds) for row in aggregate([run], warm_up=1)] == [(1, 2.0), (8, 2.0)]


def test_a_system_that_does_not_show_its_rollout_has_no_split():
    (row,) = aggregate([ran(OURS, step(1.0, None))], warm_up=0)
    assert row.rollout is None
    assert row.rest is None
    assert driver.step_text(row) == "1.00 s, 1.00–1.00"


def test_completions_of_another_length_are_complained_about():
    (row,) = aggregate([ran(OURS, step(1.0), step(1.0, length=63))], warm_up=0)
    assert row.complaint == "completions of 63 to 64 tokens, where 64 were asked for"


def test_a_failure_keeps_its_row_and_what_was_measured_before_it():
    table = aggregate([ran(OURS, step(1.0)), failed(TRL), failed(OURS, "signal 9 ended it")], warm_up=0)
    ours, trl = table
    assert (ours.measured, ours.complaint) == (True, "signal 9 ended it")
    assert (trl.measured, trl.complaint) == (False, "it failed: no")
    assert driver.ratio_to_ours(trl, table) is None


def test_ratios_are_to_ours_in_the_same_cell():
    other = Cell("grpo", "small", 64)
    runs = [ran(OURS, step(2.0)), ran(TRL, step(3.0)), ran(OURS, step(1.0), cell=other)]
    table = aggregate([*runs, ran(TRL, step(3.0), cell=other)], warm_up=0)
    assert [driver.ratio_to_ours(row, table) for row in table] == [1.0, 1.5, 1.0, 3.0]
    assert driver.ratio_to_ours(table[1], table[1:2]) is None  # ours was not measured


# -- The table ----------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_system_and_a_remark_for_each_peculiarity():
    table = aggregate(
        [ran(OURS, step(2.0)), ran(TRL, step(15.25, 3.0)), failed(Entry("mlx-lm-lora", "fast"))], 0
    )
    text = driver.markdown(table)
    lines = text.splitlines()
    assert lines[0] == "### GRPO step, P = 64, C = 64"
    assert "| mlx-ppo | 2.00 s (0.50 + 1.50), 2.00–2.00 | 1.00 / 1.00 | 1.0 GB | 0.2 |" in lines
    assert any("15.2 s (3.00 + 12.2), 15.2–15.2 | 7.62 / 7.62" in row for row in lines)
    assert "| mlx-lm-lora | – | – | – | – |" in lines
    assert "- mlx-lm-lora (tiny): it failed: no." in lines
    assert any(row.startswith("- TRL `GRPOTrainer`") for row in lines)
    assert len({row.count("|") for row in lines if row.startswith("|")}) == 1


def test_rollouts_are_told_in_tokens_per_second():
    cell, wide = Cell("rollout", "tiny", 64), Entry("batch-generator-wide", "fast")
    ours = ran(Entry("ours-rollout", "fast"), step(1.0, rows=1), step(2.0, rows=32), cell=cell)
    text = driver.markdown(aggregate([ours, ran(wide, step(4.0, rows=32), cell=cell)], 0))
    assert "|  | 1 row | 32 rows |" in text
    assert "| mlx-ppo | 64 | 1,024 |" in text
    assert "| mlx-lm `BatchGenerator`, all rows at once | – | 512 (2.00×) |" in text


def test_results_are_written_as_they_come(tmp_path):
    options = driver.parse(["--sizes", "tiny", "--kinds", "grpo", "--output", str(tmp_path)])
    driver.save([ran(OURS, step(1.0), step(2.0)), failed(TRL)], options, None, tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["system"] for row in content["rows"]] == ["ours", "trl"]
    assert content["rows"][0]["times_ours"] == 1.0
    assert content["runs"][0]["result"]["steps"][1]["seconds"] == 2.0
    assert content["versions"] == {"ours": {"mlx": "1", "blas": "libx.so"}}
    assert (tmp_path / "table.md").read_text().startswith("### GRPO step")


# -- The command line ---------------------------------------------------------------------------------


def test_the_command_line_picks_systems_by_name_and_kind():
    assert driver.parse([]).systems == list(SYSTEMS)
    assert driver.parse(["--kinds", "ppo"]).systems == ["ours-ppo", "trl-ppo"]
    assert driver.parse(["--systems", "trl", "ours"]).systems == ["ours", "trl"]


@pytest.mark.parametrize(
    "arguments",
    [["--kinds", "ppo", "--systems", "trl"], ["--rounds", "0"], ["--warm-up", "-1"], ["--sizes", "huge"]],
)
def test_the_command_line_refuses_what_it_cannot_do(arguments):
    with pytest.raises(SystemExit):
        driver.parse(arguments)


def test_a_job_is_the_work_that_the_tables_name(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "save_model", lambda size, folder: folder)
    options = driver.parse([])
    grpo = driver.make_job(CELL, "trl", tmp_path, tmp_path, options)
    assert grpo.batch == 32
    assert {len(prompt.split()) for prompt in grpo.prompts} == {64}
    rollout = driver.make_job(Cell("rollout", "tiny", 512), "ours-rollout", tmp_path, tmp_path, options)
    assert rollout.batch == max(rollout.rows) == 64
    assert {len(prompt.split()) for prompt in rollout.prompts} == {512}
