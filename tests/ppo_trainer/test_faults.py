"""Faults played on runs: what is said can be acted on, and the run that goes on is the run that nothing happened to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from base_setup.out_of_memory import in_words, is_out_of_memory
from checkpointing.store import CheckpointStore
from config.errors import CheckpointError, DataLoadError, RewardError, TrainingRuntimeError
from data_loading.loading import load_prompts
from experience_buffer.data_structures import Rollout
from monitoring.guards import RunGuards
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.interrupted import PROMPTS, differences, letters, lines, short_run, weights
from token_attribution import host_math

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Nothing here pulls a plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpointing.store.flush_to_disk", lambda path: None)
        yield


def goes_on_exactly(tmp_path: Path, straight: Path, prompts: Any = PROMPTS, **options: Any) -> None:
    """Resume the run in ``broken`` and compare it with the one that went through."""
    short_run(tmp_path / "broken", **options).train(prompts, resume=True)
    assert differences(straight, tmp_path / "broken") == []


def break_off(straight: Path, broken: Path, *, after: int = 2) -> None:
    """What a kill leaves of a run: its checkpoint of update ``after`` and none later, and lines that are too many."""
    shutil.copytree(straight, broken, symlinks=True)
    shutil.rmtree(broken / "final")
    for saved in CheckpointStore(broken).complete():
        if saved.update > after:
            shutil.rmtree(saved.path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to; nobody writes to it."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_math, "FEW", 0)  # as in every test (tests/conftest.py)
        short_run(folder).train(PROMPTS)
    return folder


# The machine ---------------------------------------------------------------------------------------------

CHILD = """
import logging, subprocess, sys
from pathlib import Path
import base_setup.backend
import mlx.core as mx
from config.errors import ToolkitError
from tests.interrupted import PROMPTS, differences, short_run
logging.basicConfig()
folder = Path(sys.argv[1])
short_run(folder / "straight").train(PROMPTS)
class Fault:
    def on_step_end(self, step, metrics):
        if step == 3:
            self.strike()
fault = Fault()
"""
LATER = """
try:
    short_run(folder / "broken").train(PROMPTS, callbacks=[fault])
except ToolkitError as error:
    print("said:", error)
print("steps:", [saved.update for saved in short_run(folder / "broken").store_of(folder / "broken").complete()])
undo()
short_run(folder / "broken").train(PROMPTS, resume=True)
print("differences:", differences(folder / "straight", folder / "broken"))
""".replace('short_run(folder / "broken").store_of(folder / "broken")', 'CheckpointStore(folder / "broken")')
CHILD += "from checkpointing.store import CheckpointStore\n"


def in_a_child(code: str, folder: Path, *wrapped: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*wrapped, sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


ALONE = ("unshare", "--user", "--map-root-user", "--mount")  # a file system that nobody else sees


def _can_mount(folder: Path) -> bool:
    try:
        done = subprocess.run(
            [*ALONE, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


FULL = """
def strike():
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            print("the disk:", error.strerror)
fault.strike = strike
def undo():
    (folder / "filler").unlink()
"""
READ_ONLY = """
run = str(folder / "broken")
def strike():  # a mount of its own, since a file system with a file open for writing cannot be closed to writers
    subprocess.run(["mount", "--bind", run, run], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
fault.strike = strike
undo = lambda: subprocess.run(["umount", run], check=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [(FULL, "Unable to write"), (READ_ONLY, "Read-only file system")],
    ids=["full", "read-only"],
)
def test_a_disk_that_fills_up_or_closes_under_the_run(tmp_path: Path, fault: str, words: str) -> None:
    """A real file system of 6 MB: training goes on as long as there is something to learn, and the end says where."""
    if not _can_mount(tmp_path):
        pytest.skip("no file system can be mounted here (unshare --user --mount, mount -t tmpfs)")
    code = 'import subprocess, sys\nsubprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", sys.argv[1]])\n'
    done = in_a_child(code + CHILD + fault + LATER, tmp_path, *ALONE)
    assert done.returncode == 0, done.stderr
    if fault is READ_ONLY:  # of a full disk the last page that the file has takes a few lines more
        assert f"metrics.jsonl cannot be written ([Errno 30] {words}" in done.stderr
    assert "WARNING" in done.stdout
    assert "the run goes on without it" in done.stdout
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("said:"))
    assert words in said or "only" in said, said  # "only … are free", where the space was looked at first
    assert "With --resume" in said
    assert "goes on after step 2" in said
    assert "steps: [1, 2]" in done.stdout
    assert "differences: []" in done.stdout


MEMORY = """
import resource
def strike():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    mx.clear_cache()
    fault.held = []
    for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12):
        try:
            while True:
                fault.held.append(bytearray(size))
        except MemoryError:
            pass
fault.strike = strike
def undo():
    fault.held = []
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the limit is read from /proc, and macOS does not enforce it"
)
def test_memory_that_runs_out(tmp_path: Path) -> None:
    """Every byte that the process may have is taken; the next allocation, wherever it is, fails."""
    done = in_a_child(CHILD + MEMORY + LATER, tmp_path)
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("said:"))
    assert "memory ran out (" in said
    assert "lower micro_batch_size" in said
    assert "goes on after step" in said
    assert "differences: []" in done.stdout


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("[malloc] Unable to allocate 34359738368 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 99999 bytes which is greater than the maximum"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU…)"),
    ],
)
def test_how_the_backends_say_that_memory_ran_out(error: Exception) -> None:
    said = in_words(error)
    assert isinstance(said, TrainingRuntimeError)
    assert str(error) in str(said)


def test_an_allocation_that_no_machine_has_and_another_error() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        np.zeros((1 << 30, 1 << 20))
    assert is_out_of_memory(caught.value), caught.value
    other = RuntimeError("[matmul] shapes do not match")
    assert in_words(other) is other


def test_memory_that_runs_out_before_the_first_step(tmp_path: Path) -> None:
    class Huge:
        def on_train_begin(self, trainer: PPOTrainer) -> None:
            np.zeros((1 << 30, 1 << 20))

    with pytest.raises(TrainingRuntimeError, match="memory ran out") as caught:
        short_run(tmp_path / "run").train(PROMPTS, callbacks=[Huge()])
    assert "--resume" not in str(caught.value)  # there is nothing yet to go on from


def test_a_clock_that_goes_backwards(tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.time()]

    def earlier(*arguments: Any) -> str:
        now[0] -= 86400 * 40
        return strftime(arguments[0], time.localtime(now[0]))

    strftime = time.strftime
    monkeypatch.setattr("checkpointing.store.time.strftime", earlier)
    run = short_run(tmp_path / "broken", num_steps=3)
    run.train(PROMPTS)
    saved = run.store.complete()
    assert [one.update for one in saved] == [1, 2, 3]
    assert [one.path.name for one in saved] == sorted((one.path.name for one in saved), reverse=True)
    found = run.store.newest()
    assert found is not None
    assert found.update == 3
    assert (run.store.folder / "latest").resolve() == found.path


# What the run reads --------------------------------------------------------------------------------------


def prompt_file(path: Path, prompts: Sequence[str] = PROMPTS) -> Path:
    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    return path


def test_a_file_of_prompts_that_changes_between_kill_and_resume(tmp_path: Path, straight: Path) -> None:
    file = prompt_file(tmp_path / "p.jsonl")
    break_off(straight, tmp_path / "broken")
    prompt_file(file, [*PROMPTS[:-1], "eef"])
    with pytest.raises(CheckpointError, match=r"prompts: they are not those .*--adapter-path"):
        short_run(tmp_path / "broken").train(load_prompts(file), resume=True)
    prompt_file(file)
    goes_on_exactly(tmp_path, straight, load_prompts(file))


@pytest.mark.parametrize("how", ["another word", "cut short", "replaced", "longer"])
def test_a_file_of_prompts_that_changes_under_the_run(tmp_path: Path, straight: Path, how: str) -> None:
    """A row with other words is never learned from. A file that grows, or gives way to another, changes nothing."""
    file = prompt_file(tmp_path / "p.jsonl")

    class Change:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
            if step != 2:
                return
            if how == "another word":
                prompt_file(file, ["z" * len(one) for one in PROMPTS])
            elif how == "cut short":
                os.truncate(file, 5)
            elif how == "longer":
                prompt_file(file, [*PROMPTS, "more"])
            else:  # as editors save
                os.replace(prompt_file(tmp_path / "new", ["other"] * 9), file)

    run = short_run(tmp_path / "broken", prefetch_batches=1)
    if how in ("replaced", "longer"):
        run.train(load_prompts(file), callbacks=[Change()])
    else:
        with pytest.raises(TrainingRuntimeError, match=r"p\.jsonl:\d: .*the file has changed .*--resume"):
            run.train(load_prompts(file), callbacks=[Change()])
        prompt_file(file)
        short_run(tmp_path / "broken", prefetch_batches=1).train(load_prompts(file), resume=True)
    assert differences(straight, tmp_path / "broken") == []


def test_a_tokenizer_that_is_not_the_runs_own(tmp_path: Path, straight: Path) -> None:
    """Prompts have the same ids; a token that only completions may have means something else."""
    break_off(straight, tmp_path / "broken")
    other = short_run(tmp_path / "broken")
    other.policy.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(CheckpointError, match=r"tokenizer: it is not the one that this run trained with"):
        other.train(PROMPTS, resume=True)
    other.policy.tokenizer.chat_template = None
    goes_on_exactly(tmp_path, straight)


# Rewards -------------------------------------------------------------------------------------------------


def test_a_reward_that_hangs_ends_the_run_and_the_run_goes_on(tmp_path: Path, straight: Path) -> None:
    calls = []

    def hanging(completions: Sequence[str], **columns: Any) -> list[float]:
        calls.append(None)
        if len(calls) == 4:
            time.sleep(60)
        return letters(completions)

    hanging.__name__ = "letters"
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"letters.*reward_timeout.*goes on after step 3"):
        short_run(tmp_path / "broken", reward=hanging, reward_timeout=0.5).train(PROMPTS)
    assert time.monotonic() - begun < 30
    goes_on_exactly(tmp_path, straight)


NAN = float("nan")


@pytest.mark.parametrize("algorithm", [pytest.param("ppo", marks=pytest.mark.slow), "grpo"])
@pytest.mark.parametrize("kind", ["nobody scored", "all alike"])
def test_groups_that_teach_nothing(tmp_path: Path, algorithm: str, kind: str) -> None:
    """Step 3 has no score at all, or one and the same: the numbers stay finite, and the run resumes across it."""

    def reward(completions: Sequence[str], trainer_state: Any = None, **columns: Any) -> list[Any]:
        if trainer_state.global_step == 3:
            return [None if kind == "nobody scored" else 0.5] * len(completions)
        return letters(completions)

    options = {"algorithm": algorithm, "group_size": 1 if algorithm == "ppo" else 2, "reward": reward}
    options |= {"kl_coef": 0.0}  # which would pull even where no reward does
    short_run(tmp_path / "straight", **options).train(PROMPTS)
    step = next(line for line in lines(tmp_path / "straight") if line["step"] == 3)
    nothing = kind == "nobody scored"
    assert (step["reward"] is None) == nothing
    assert step["num_updates"] == (0 if nothing else 2)
    if not nothing:
        assert np.isfinite(step["loss/policy_avg"])
        assert (step["grad_norm"] == 0) == (algorithm == "grpo")  # a critic tells alike scores apart
    for after in (2, 3):
        break_off(tmp_path / "straight", tmp_path / "broken", after=after)
        goes_on_exactly(tmp_path, tmp_path / "straight", **options)
        shutil.rmtree(tmp_path / "broken")


# Completions ---------------------------------------------------------------------------------------------

END = 258  # of the embedded tokenizer
KINDS: list[dict[str, Any]] = [
    {"algorithm": "ppo"},
    {"algorithm": "grpo", "group_size": 2, "importance_correction": "none"},
]


def guarded(trainer: PPOTrainer) -> list[str]:
    """What the guards say in a run."""
    said: list[str] = []
    trainer.train(PROMPTS, callbacks=[RunGuards(said.append)])
    return said


@pytest.mark.parametrize("options", KINDS, ids=["ppo", "grpo"])
def test_completions_that_are_nothing_but_an_end(tmp_path: Path, options: Mapping[str, Any]) -> None:
    options = {**options, "logit_bias": {END: 200.0}, "allow_truncated_sampling": True}
    said = guarded(short_run(tmp_path / "straight", **options))
    assert any('"Empty answers")' in sentence for sentence in said), said
    steps = [line for line in lines(tmp_path / "straight") if "kind" not in line]
    assert [step["completions/max_length"] for step in steps] == [1] * 5
    assert all(value is None or np.isfinite(value) for step in steps for value in step.values())
    assert all(record["completion"] == "" for record in lines(tmp_path / "straight", "samples.jsonl"))
    break_off(tmp_path / "straight", tmp_path / "broken")
    goes_on_exactly(tmp_path, tmp_path / "straight", **options)


@pytest.mark.parametrize("options", KINDS, ids=["ppo", "grpo"])
@pytest.mark.parametrize("empty", ["one", "all"])
def test_completions_without_a_token(tmp_path: Path, options: Mapping[str, Any], empty: str) -> None:
    """No sampler of ours makes one, but a batch may come from elsewhere: one changes nothing in the others' part."""
    run = short_run(tmp_path / "run", **options)
    prompts = [run._prepare(PROMPTS)[i] for i in range(2)]
    rollouts = run.generate(prompts)

    def emptied(rollout: Rollout) -> Rollout:
        return replace(rollout, completion_ids=(), logprobs=(), terminated=False, text="")

    rollouts = [emptied(r) if empty == "all" or i == 0 else r for i, r in enumerate(rollouts)]
    before = weights(run)
    experience, _ = run.make_experience(rollouts)
    report = run.update(experience)
    assert not bool(mx.any(experience.mask[0]))
    assert report["num_updates"] == 0 or np.isfinite(report["grad_norm"])
    moved = any(not np.array_equal(before[name], x) for name, x in weights(run).items())
    assert moved == (empty == "one")
    assert report["skipped_updates"] == 0


@pytest.mark.parametrize("options", KINDS, ids=["ppo", "grpo"])
def test_a_run_of_nothing_but_cut_completions(tmp_path: Path, options: Mapping[str, Any]) -> None:
    """With mask_truncated_completions no gradient is left, exactly, and the run says so."""
    options = {
        **options,
        "logit_bias": {END: -200.0},
        "allow_truncated_sampling": True,
        "mask_truncated_completions": True,
    }
    run = short_run(tmp_path / "straight", **options)
    before = weights(run)
    said = guarded(run)
    assert all(np.array_equal(before[name], x) for name, x in weights(run).items())
    steps = [line for line in lines(tmp_path / "straight") if "kind" not in line]
    assert [step["num_updates"] for step in steps] == [0] * 5
    assert all(value is None or np.isfinite(value) for step in steps for value in step.values())
    (sentence,) = (one for one in said if "Nothing ends" in one)
    assert "nothing is learned" in sentence
    break_off(tmp_path / "straight", tmp_path / "broken")
    goes_on_exactly(tmp_path, tmp_path / "straight", **options)


# Folders -------------------------------------------------------------------------------------------------


def test_a_run_that_is_still_going_keeps_its_folder(tmp_path: Path, straight: Path) -> None:
    """The second is refused with nothing changed, and the first goes on as if nobody had asked."""
    refused: list[str] = []

    class Second:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
            if step == 2:
                with pytest.raises(CheckpointError) as caught:
                    short_run(tmp_path / "broken").train(PROMPTS, resume=True)
                refused.append(str(caught.value))

    short_run(tmp_path / "broken").train(PROMPTS, callbacks=[Second()])
    assert len(refused) == 1
    assert f"in use by a run that is still going (process {os.getpid()}" in refused[0]
    assert differences(straight, tmp_path / "broken") == []


def test_a_link_in_a_checkpoint_is_refused(tmp_path: Path, straight: Path) -> None:
    """Whatever it leads to, a value network elsewhere or a file of weights that nobody has listed."""
    shutil.copytree(straight, tmp_path / "broken", symlinks=True)
    newest = CheckpointStore(tmp_path / "broken").complete()[-1].path
    (newest / "value").rename(tmp_path / "value")
    (newest / "value").symlink_to(tmp_path / "value")
    with pytest.raises(CheckpointError, match=r"value: a link \(to "):
        short_run(tmp_path / "broken").train(PROMPTS, resume=True)
    (newest / "value").unlink()
    (tmp_path / "value").rename(newest / "value")
    (newest / "frozen.safetensors").symlink_to(newest / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"frozen\.safetensors: a link"):
        short_run(tmp_path / "broken").train(PROMPTS, resume=True)


def test_a_rowless_file_is_no_reason_to_lose_a_run(tmp_path: Path, straight: Path) -> None:
    """A file that has lost all its rows is refused before the run's folder is touched."""
    file = prompt_file(tmp_path / "p.jsonl")
    break_off(straight, tmp_path / "broken")
    before = lines(tmp_path / "broken")
    file.write_text("")
    with pytest.raises(DataLoadError, match=r"p\.jsonl"):
        short_run(tmp_path / "broken").train(load_prompts(file), resume=True)
    assert lines(tmp_path / "broken") == before
