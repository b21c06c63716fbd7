"""A run that is resumed is the run that was never interrupted: the same lines, the same weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base_setup.parameters import named_arrays
from checkpointing.resuming import FIXED, FREE
from checkpointing.store import Saved
from command_line.checkpoints import find_checkpoint
from config.errors import CheckpointError, InvalidConfigurationError
from config.ppo_config import PPOConfig
from models.value_model import ValueModel
from ppo_trainer.algorithms import ALGORITHMS
from ppo_trainer.ppo_trainer import PPOTrainer

PROMPTS = ["a", "bb", "ccc", "dd", "eee"]  # with batches of two the last one of an epoch is short
STEPS = 5  # into the second epoch


def letters(completions, **columns):
    return [len(set(text)) / 10 for text in completions]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here pulls a plug; tests/checkpointing does."""
    monkeypatch.setattr("checkpointing.store.flush_to_disk", lambda path: None)


@pytest.fixture
def trainer(make_config, tmp_path: Path):
    def make(name: str = "run", **options: Any) -> PPOTrainer:
        settings = {
            "batch_size": 2,
            "max_new_tokens": 5,
            "num_steps": STEPS,
            "save_every": 1,
            "keep_last_n": 100,
            "min_free_gb": 0,
            "learning_rate": 1e-2,
            "log_samples_every": 2,
            "output_dir": str(tmp_path / name),
            "verbose": False,
        }
        return PPOTrainer(make_config(PPOConfig, **{**settings, **options}), reward_model=letters)

    return make


def trained(of: PPOTrainer) -> dict[str, np.ndarray]:
    """Weights and optimiser states."""
    assert of._updater is not None
    found = {}
    for name, one in of._updater.trainers.items():
        for part in (named_arrays(one.module.trainable_parameters()), one.state_arrays()):
            found |= {f"{name}.{path}": np.array(x) for path, x in part.items()}
    return found


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if "time/" not in k and "tokens_per_second" not in k} for r in records
    ]


def resumed_at(trainer, tmp_path: Path, saved: Saved, **options: Any) -> PPOTrainer:
    """The run as a kill left it right after ``saved``: with later lines that a resumed run must not repeat."""
    shutil.copytree(tmp_path / "run", tmp_path / "other", symlinks=True)
    for path in (tmp_path / "other").glob("checkpoint_*"):
        if int(path.name.rpartition("_")[2]) > saved.update:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "other" / "final")
    other = trainer("other", **options)
    other.train(PROMPTS, resume=True)
    return other


def assert_same(straight: PPOTrainer, other: PPOTrainer) -> None:
    mine, theirs = trained(straight), trained(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not np.array_equal(mine[name], theirs[name])] == []
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(other.run_folder, name) == lines(straight.run_folder, name)
    assert straight.kl_controller.value == other.kl_controller.value


GROUPS = {"group_size": 2}
VARIANTS: dict[str, Mapping[str, Any]] = {
    "ppo": {"num_epochs_per_rollout": 2, "minibatch_size": 1},
    "shared critic": {"value_network": "shared"},
    "adaptive KL, scaled scores": {"kl_target": 0.1, "kl_horizon": 10, "score_scaling": "norm"},
    "8-bit moments, schedule": {
        "optimizer_bits": 8,
        "lora_r": 64,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
    },
    "dynamic sampling": {"algorithm": "dapo", **GROUPS, "dynamic_sampling": True},
    "lagging sampler": {"algorithm": "grpo", **GROUPS, "rollout_policy": "copy", "rollout_sync_every": 3},
    "lagging quantised sampler": {
        "algorithm": "grpo",
        **GROUPS,
        "quantize_for_rollouts": True,
        "rollout_quant_group_size": 32,
        "rollout_sync_every": 3,
    },
    "reference that follows": {
        "algorithm": "grpo",
        **GROUPS,
        "kl_coef": 0.1,
        "reference_sync_every": 2,
        "reference_mixup": 0.5,
    },
    "every weight": {"fine_tune_type": "full", "learning_rate": 1e-4},
}


FAST = ("ppo", "lagging quantised sampler", "8-bit moments, schedule")


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=n, marks=[] if n in FAST else [pytest.mark.slow]) for n, o in VARIANTS.items()],
)
def test_what_follows_a_resume_is_what_followed_without(trainer, tmp_path: Path, options) -> None:
    straight = trainer(**options)
    straight.train(PROMPTS)
    saved = straight.store.complete()
    assert [one.update for one in saved] == [1, 2, 3, 4, 5]
    assert_same(straight, resumed_at(trainer, tmp_path, saved[1], **options))


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"ppo"}))
@pytest.mark.slow
def test_every_row_resumes_exactly(trainer, tmp_path: Path, name: str) -> None:
    options = {"algorithm": name} | (GROUPS if ALGORITHMS[name].needs_groups else {})
    straight = trainer(**options)
    straight.train(PROMPTS)
    for saved in straight.store.complete():
        assert_same(straight, resumed_at(trainer, tmp_path, saved, **options))
        shutil.rmtree(tmp_path / "other")


def test_a_checkpoint_is_an_adapter_that_mlx_lm_reads(trainer, tiny) -> None:
    run = trainer(num_steps=1)
    run.train(PROMPTS)
    folder = run.store.complete()[-1].path
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"} <= names
    assert not any(name.endswith((".pkl", ".pt", ".npz")) for name in names)
    assert (run.run_folder / "latest").resolve() == folder.resolve()


def test_epochs_and_their_history_go_on(trainer, tmp_path: Path) -> None:
    straight = trainer(num_steps=None, num_epochs=2)
    result = straight.train(PROMPTS)
    other = trainer("other", num_steps=None, num_epochs=2)
    again = other.train(
        PROMPTS, resume=straight.store.complete()[3].path
    )  # the first batch of the second epoch
    assert [h["epoch"] for h in again["history"]] == [0, 1]
    for mine, theirs in zip(result["history"], again["history"], strict=True):
        assert mine["avg_reward"] == theirs["avg_reward"]
        assert mine["loss/policy_avg"] == theirs["loss/policy_avg"]
    assert lines(other.run_folder) == lines(straight.run_folder)  # what came before was copied


def test_a_finished_run_that_is_resumed_is_still_the_same(trainer, tmp_path: Path) -> None:
    straight = trainer()
    straight.train(PROMPTS)
    before, after = lines(straight.run_folder), trainer()
    after.train(PROMPTS, resume=True)
    assert lines(straight.run_folder) == before
    assert_same(straight, after)


def test_a_used_folder_is_refused_unless_it_is_resumed(trainer) -> None:
    trainer(num_steps=1).train(PROMPTS)
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume"):
        trainer(num_steps=1).train(PROMPTS)


def test_latest_of_an_empty_folder_is_a_new_run(trainer) -> None:
    assert trainer(resume="latest", num_steps=1).train(PROMPTS)["step"] == 1


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(trainer, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    run = trainer(resume="latest", num_steps=1)
    run.train(PROMPTS)
    assert (tmp_path / "run" / "metrics.abandoned-1.jsonl").read_text() == '{"step": 1}\n'
    assert [r["step"] for r in lines(run.run_folder) if "kind" not in r] == [1]


def test_what_has_changed_is_named(trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(num_steps=1).train(PROMPTS)
    with pytest.raises(InvalidConfigurationError, match=r"lora_r.*lora_r was 4 and is 2"):
        trainer(num_steps=1, lora_r=2).train(PROMPTS, resume=True)
    trainer(num_steps=2, log_samples_every=1).train(PROMPTS, resume=True)
    out = capsys.readouterr().out
    assert "num_steps was 1 and is 2" in out
    assert "log_samples_every" not in out  # nothing that is trained depends on it


def test_every_name_that_is_told_apart_is_a_field() -> None:
    assert PPOConfig.__dataclass_fields__.keys() >= (FREE | FIXED)
    assert not FREE & FIXED


def test_other_prompts_and_another_model_are_refused(trainer) -> None:
    trainer(num_steps=1).train(PROMPTS)
    with pytest.raises(CheckpointError, match="prompts: they are not those"):
        trainer(num_steps=2).train([*PROMPTS[:-1], "else"], resume=True)
    with pytest.raises(CheckpointError, match="base model's weights are not those"):
        trainer(num_steps=2, seed=5).train(PROMPTS, resume=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken_if_allowed(
    trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = trainer(num_steps=3)
    straight.train(PROMPTS)
    victim = straight.store.complete()[-1].path / "optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*_update_2 .*--resume-fallback"):
        trainer(num_steps=3).train(PROMPTS, resume=True)
    after = trainer(num_steps=3, resume_fallback=True)
    after.train(PROMPTS, resume=True)
    assert "optimizer.safetensors" in capsys.readouterr().out
    assert_same(straight, after)


def test_older_weights_do_not_stand_for_a_run_that_went_on(trainer) -> None:
    """Interrupted after step 2, gone on, and killed at step 5: its newest weights are those of checkpoint 4."""
    folder = break_at(trainer(num_steps=5), 3)
    assert find_checkpoint(str(folder)).folder == folder / "interrupted"
    break_at(trainer(num_steps=5, save_every=2, resume="latest"), 5, Killed)
    shutil.rmtree(folder / "interrupted")  # as if killed: nobody has written it
    found = find_checkpoint(str(folder)).folder
    assert found.name.endswith("_periodic_update_4")
    assert (folder / "interrupted.older-1" / "adapters.safetensors").is_file()


def test_weights_of_a_run_that_ends_are_its_own(trainer) -> None:
    """``final`` of a run that goes on and comes to its end again is written anew, and stays."""
    trainer(num_steps=1).train(PROMPTS)
    run = trainer(num_steps=2, save_every=100)
    run.train(PROMPTS, resume=True)
    assert find_checkpoint(str(run.run_folder)).folder == run.run_folder / "final"
    assert not list(run.run_folder.glob("*.older-*"))
    trainer(num_steps=4).train(PROMPTS, resume=True)
    assert (run.run_folder / "final").is_dir()
    assert (run.run_folder / "final.older-1").is_dir()  # of step 2


class Killed(BaseException):
    pass


def break_at(run: PPOTrainer, step: int, error: type[BaseException] = RuntimeError) -> Path:
    """Train until ``step`` is learned from, then fail."""

    class Fault:
        def on_step_end(self, now: int, metrics: Mapping[str, Any]) -> None:
            if now == step:
                raise error

    with pytest.raises(error):
        run.train(PROMPTS, callbacks=[Fault()])
    assert run.run_folder is not None
    return run.run_folder


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, save, calls = trainer(num_steps=3), ValueModel.save, []

    def full(self: ValueModel, folder: Path) -> None:
        calls.append(folder)
        if "value" in folder.parts[-1] and len(calls) == 1:
            raise CheckpointError(f"{folder}: No space left on device")
        save(self, folder)

    monkeypatch.setattr(ValueModel, "save", full)
    run.train(PROMPTS)
    assert "No space left" in capsys.readouterr().out
    assert [one.update for one in run.store.complete()] == [2, 3]
    assert not list(run.run_folder.glob(".partial-*"))


def test_a_reward_that_keeps_something_and_finds_nothing_of_it(trainer, tmp_path: Path) -> None:
    class Keeping:
        __name__ = "keeping"

        def __call__(self, completions, **columns):
            return letters(completions)

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: Mapping[str, int]) -> None:
            raise AssertionError

    config = trainer(num_steps=1).config
    PPOTrainer(config, reward_model=letters).train(PROMPTS)
    other = PPOTrainer(config.replace(num_steps=2), reward_model=Keeping())
    with pytest.raises(CheckpointError, match=r'rewards: "keeping" keeps something .*--adapter-path'):
        other.train(PROMPTS, resume=True)


def test_a_reward_that_keeps_something_goes_on_too(trainer, make_config, tmp_path: Path) -> None:
    class Growing:
        __name__ = "growing"

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, completions, **columns):
            self.calls += 1
            return [float(self.calls + len(set(text))) for text in completions]

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.calls}

        def load_state_dict(self, state: Mapping[str, int]) -> None:
            self.calls = state["calls"]

    config = trainer().config
    straight = PPOTrainer(config.replace(output_dir=str(tmp_path / "a")), reward_model=Growing())
    straight.train(PROMPTS)
    other = PPOTrainer(config.replace(output_dir=str(tmp_path / "b")), reward_model=Growing())
    other.train(PROMPTS, resume=straight.store.complete()[1].path)
    assert lines(other.run_folder) == lines(straight.run_folder)
