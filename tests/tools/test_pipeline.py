"""What a stage of a pipeline is made from, and what makes it run again; the stages themselves are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base_setup.lora_setup import DESCRIPTION, WEIGHTS
from config.errors import CheckpointError
from config.files import Setting
from monitoring.run_lock import RunLock
from tools.pipeline import Plan, read_plan, run_pipeline, settings_of

TEXT = """
[pipeline]
output_dir = "out"
model_name = "base"
[train]
train_path = "prompts"
rewards = ["mine.py:length", "well_formed"]
[evaluate]
benchmark = "gsm8k"
benchmark_data = ["gsm8k=rows.jsonl"]
[fuse]
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Plan]:
    """A plan from a file's text, in a folder with what it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "tools.pipeline._forget", lambda: None
    )  # nothing is held, and looking for it takes time
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    Path("mine.py").write_text("def length(completions, **columns): return [1.0 for _ in completions]\n")
    Path("rows.jsonl").write_text("{}\n")
    for part in ("prompts", "completions"):
        np.save(f"prompts_{part}.npy", np.arange(3))

    def made(text: str = TEXT) -> Plan:
        Path("plan.toml").write_text(text)
        return read_plan("plan.toml")

    return made


def stand_in(stage: str, settings: list[Setting], folder: Path) -> None:
    """Leaves the same adapter whatever it is made from."""
    (folder / "final").mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, DESCRIPTION):
        (folder / "final" / name).write_text(stage)


def carried_out(plan: Plan) -> list[str]:
    """The stages that are not done yet, which they are then."""
    stages: list[str] = []

    def run(stage: str, settings: list[Setting], folder: Path) -> None:
        stages.append(stage)
        stand_in(stage, settings, folder)

    run_pipeline(plan, run, say=lambda line: None)
    return stages


@pytest.mark.parametrize(
    ("change", "again"),
    [
        # evaluate judges by the rewards that the run wrote down, whether the weights came out the same or not
        (lambda: Path("mine.py").write_text("other\n"), ["train", "evaluate", "fuse"]),
        (lambda: np.save("prompts_completions.npy", np.arange(4)), ["train", "evaluate", "fuse"]),
        (lambda: Path("base/config.json").write_text("{ }"), ["train", "evaluate", "fuse"]),
        (lambda: Path("rows.jsonl").write_text("{ }\n"), ["evaluate"]),
        (lambda: None, []),
    ],
    ids=["reward file", "token files", "model", "benchmark rows", "nothing"],
)
def test_every_file_that_is_named_counts(
    plan: Callable[..., Plan], change: Callable[[], Any], again: list[str]
) -> None:
    assert carried_out(plan()) == ["train", "evaluate", "fuse"]
    change()
    assert carried_out(plan()) == again


@pytest.mark.parametrize("stage", ["evaluate", "fuse"])
def test_an_adapter_goes_with_the_base_that_it_was_trained_on(plan: Callable[..., Plan], stage: str) -> None:
    """``final/base`` is a base quantised or grown on loading; the name that was given loads another one."""

    def base(text: str) -> Any:
        return {one.name: one.value for one in settings_of(plan(text), stage)}["model_name"]

    assert base(TEXT) == "base"
    assert base(TEXT.replace("[train]", '[train]\nmodel_name = "other"')) == "other"
    with_sft = TEXT.replace("[train]", "[sft]\n[train]")
    assert base(with_sft) == "base"
    Path("out/sft/final/base").mkdir(parents=True)
    assert base(with_sft) == "out/sft/final/base"
    Path("out/train/final/base").mkdir(parents=True)
    assert base(with_sft) == base(TEXT) == "out/train/final/base"


def test_a_stage_that_is_running_is_not_moved_away(plan: Callable[..., Plan]) -> None:
    carried_out(plan())
    changed = TEXT.replace("[train]", "[train]\nseed = 2")
    for folder, words in (("out/train", 'out/train" is in use'), ("out", 'out" is in use')):
        lock = RunLock(Path(folder))
        lock.acquire()
        with pytest.raises(CheckpointError, match=words):
            carried_out(plan(changed))
        lock.release()
        assert not Path("out/train-old-1").exists()
    assert carried_out(plan(changed)) == ["train", "evaluate", "fuse"]
    assert Path("out/train-old-1").is_dir()
