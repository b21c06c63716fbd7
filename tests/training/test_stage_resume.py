"""A supervised stage that is resumed is the one that was never interrupted: the same lines and weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest

from base_setup.parameters import named_arrays
from checkpointing.stopping import REQUEST
from checkpointing.store import CheckpointStore, Saved
from config.errors import CheckpointError, InvalidConfigurationError
from config.supervised_config import PreferenceConfig, ProcessRewardConfig, RewardModelConfig, SFTConfig
from monitoring.run_list import list_runs
from training import supervised
from training.early_stopping import EarlyStopping
from training.preference_trainer import PreferenceTrainer
from training.process_reward_trainer import ProcessRewardTrainer
from training.reward_trainer import RewardTrainer
from training.sft_trainer import SFTTrainer
from training.supervised import ShuffledBatches

STEPS = 6  # of two rows out of five: into the third epoch
WORDS = ["a", "bb cc", "dddd", "e f g h", "ii"]
PAIRS = [{"prompt": w, "completion": w[::-1] * (1 + i)} for i, w in enumerate(WORDS)]
CHOICES = [{"prompt": w, "chosen": w * (1 + i), "rejected": "x" * (5 - i)} for i, w in enumerate(WORDS)]
SCORED = [{"prompt": w, "completion": w * 2, "reward": i % 3} for i, w in enumerate(WORDS)]
STEPWISE = [{"prompt": w, "steps": [w, "x"], "labels": [True, i % 2 == 0]} for i, w in enumerate(WORDS)]

SFT = (SFTTrainer, SFTConfig, PAIRS)
REWARD = (RewardTrainer, RewardModelConfig, CHOICES)
PREFERENCE = (PreferenceTrainer, PreferenceConfig, CHOICES)
SCHEDULE = {"lr_schedule": "cosine", "warmup_steps": 2}
STOPPING = {"eval_every": 1, "early_stopping_patience": 3, "learning_rate": 0.3}

#: Name → trainer, config, rows, options. Dropout of the adapters (0.1) is on unless an option says otherwise.
STAGES: dict[str, tuple[Any, Any, Any, Mapping[str, Any]]] = {
    "sft, packed, schedule": (*SFT, {"packing": True, **SCHEDULE}),
    "sft, early stopping": (*SFT, STOPPING),
    "reward model": (*REWARD, SCHEDULE),
    "reward model, scored answers": (RewardTrainer, RewardModelConfig, SCORED, {"pairing": "random"}),
    "process reward": (ProcessRewardTrainer, ProcessRewardConfig, STEPWISE, {}),
    "dpo": (*PREFERENCE, {}),
    "kto": (*PREFERENCE, {"algorithm": "kto"}),
    "sft, 8-bit moments": (*SFT, {"optimizer_bits": 8, "lora_r": 64, "lora_dropout": 0.0}),
    "sft, every weight": (*SFT, {"fine_tune_type": "full", "learning_rate": 1e-3}),
    "sft, soft prompt": (*SFT, {"fine_tune_type": "soft_prompt", "soft_prompt_tokens": 3}),
    "sft, new tokens and a whole head": (
        *SFT,
        {"new_special_tokens": ["<x>"], "modules_to_save": ["embed_tokens"]},
    ),
    "reward model, early stopping": (*REWARD, STOPPING),
    "reward model, every weight": (*REWARD, {"fine_tune_type": "full", "learning_rate": 1e-3}),
    "dpo, early stopping": (*PREFERENCE, STOPPING),
}
FAST = (
    "sft, packed, schedule",
    "sft, early stopping",
    "reward model, scored answers",
    "process reward",
    "dpo",
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here pulls a plug; tests/checkpointing does."""
    monkeypatch.setattr("checkpointing.store.flush_to_disk", lambda path: None)


Make = Callable[..., Any]


@pytest.fixture
def stage(make_config, tiny, tmp_path: Path) -> Make:
    """A trainer of a stage in ``tmp_path / name``, with a checkpoint after every step."""

    def make(of: tuple[Any, Any], name: str = "run", **options: Any) -> Any:
        trainer, config = of
        settings = {
            "batch_size": 2,
            "num_steps": STEPS,
            "save_every": 1,
            "keep_last_n": 100,
            "min_free_gb": 0,
            "learning_rate": 1e-2,
            "lora_dropout": 0.1,
            "output_dir": str(tmp_path / name),
            "verbose": False,
        }
        made = make_config(config, **{**settings, **options})
        if not made.new_special_tokens:
            return trainer(tiny, made)
        from models.sft_model import load_language_model

        return trainer(load_language_model(made), made)

    return make


def module_of(trainer: Any) -> Any:
    if isinstance(trainer, ProcessRewardTrainer):
        return trainer.model.reward_model.module
    return trainer.reward_model.module if isinstance(trainer, RewardTrainer) else trainer.policy.model


def weights(trainer: Any) -> dict[str, np.ndarray]:
    return {n: np.array(x) for n, x in named_arrays(module_of(trainer).trainable_parameters()).items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def killed_after(saved: Saved, other: Path) -> None:
    """Make ``other`` what a kill left right after ``saved``: later lines are there, later checkpoints are not."""
    shutil.copytree(saved.path.parent, other, symlinks=True)
    for one in CheckpointStore(other).complete():
        if one.update > saved.update:
            shutil.rmtree(one.path)


def assert_same(mine: Any, result: dict[str, Any], theirs: Any, other: dict[str, Any]) -> None:
    left, right = weights(mine), weights(theirs)
    assert left.keys() == right.keys()
    assert [name for name in left if not np.array_equal(left[name], right[name])] == []
    assert lines(Path(other["run_folder"])) == lines(Path(result["run_folder"]))
    assert {**other, "run_folder": ""} == {**result, "run_folder": ""}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in STAGES]
)
def test_what_follows_a_resume_is_what_followed_without(stage: Make, tmp_path: Path, name: str) -> None:
    *of, rows, options = STAGES[name]
    straight = stage(of, **options)
    # Of pairs that are turned round the validation gets worse with every step.
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows if "chosen" in row
    ]
    held_out = {"validation": (turned or rows)[:3]} if "eval_every" in options else {}
    result = straight.train(rows, **held_out)
    saved = CheckpointStore(tmp_path / "run").complete()
    assert [one.update for one in saved] == list(range(1, len(lines(tmp_path / "run")) + 1))
    if held_out:  # the best weights are from before the end, and come back
        best = min(lines(tmp_path / "run"), key=lambda line: line["validation/loss"])
        assert best["step"] < len(saved)
        assert result["validation/loss"] == best["validation/loss"]
    for one in [*saved[1 : -1 if name in FAST else None : 2], saved[-1]]:
        killed_after(one, tmp_path / "other")
        other = stage(of, "other", **options)
        assert_same(straight, result, other, other.train(rows, resume=True, **held_out))
        if isinstance(other, RewardTrainer):
            assert (other.reward_model.gain, other.reward_model.bias) == (
                straight.reward_model.gain,
                straight.reward_model.bias,
            )
        shutil.rmtree(tmp_path / "other")


def test_a_run_in_a_folder_is_the_one_without(stage: Make) -> None:
    """Checkpoints cost time and nothing else."""
    inside, outside = stage(SFT[:2]), stage(SFT[:2], output_dir=None)
    result, plain = inside.train(PAIRS), outside.train(PAIRS)
    assert plain == {name: value for name, value in result.items() if name != "run_folder"}
    left, right = weights(inside), weights(outside)
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_a_request_stops_at_the_next_step_and_the_rest_follows(stage: Make, tmp_path: Path) -> None:
    straight = stage(SFT[:2])
    result = straight.train(PAIRS)
    stopped = stage(SFT[:2], "other", save_every=0)

    def wish(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            (tmp_path / "other" / REQUEST).touch()

    half = stopped.train(PAIRS, wish)
    assert half["stopped"] == "request"
    assert Path(half["checkpoint"]).name.endswith("_request_update_3")
    assert [(line.stage, line.state, line.step) for line in list_runs(tmp_path / "other")] == [
        ("sft", "stopped", 3)
    ]
    other = stage(SFT[:2], "other", save_every=0)
    assert_same(straight, result, other, other.train(PAIRS, resume=half["checkpoint"]))


def test_what_the_reference_said_of_a_row_is_in_the_checkpoint(stage: Make, tmp_path: Path) -> None:
    """After three batches of two out of five, every row has been seen: none is computed again after a resume."""
    stage(PREFERENCE[:2]).train(CHOICES)
    other = stage(PREFERENCE[:2], "other")
    other.reference = other.policy.frozen_copy(with_adapter=False)
    other.reference.logprobs = None  # whoever asks it, fails
    result = other.train(CHOICES, resume=CheckpointStore(tmp_path / "run").complete()[2].path)
    assert lines(Path(result["run_folder"])) == lines(tmp_path / "run")


def test_batches_follow_from_seed_and_number_alone() -> None:
    batches = ShuffledBatches(range(5), 2, seed=3)
    in_order = [batches(number) for number in range(10)]
    assert [batches(number) for number in (9, 2, 7)] == [in_order[number] for number in (9, 2, 7)]
    assert ShuffledBatches(range(5), 2, seed=3)(9) == in_order[9]
    epochs = np.array(in_order).reshape(4, 5)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [[0, 1, 2, 3, 4]] * 4
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    generator = np.random.default_rng(3)
    assert epochs.tolist() == [generator.permutation(5).tolist() for _ in range(4)]
    assert [ShuffledBatches(range(3), 5, 0, shuffle=False)(n) for n in range(2)] == [[0, 1, 2]] * 2


def test_the_best_checkpoint_has_the_lowest_validation_loss(stage: Make, tmp_path: Path) -> None:
    options = {"eval_every": 2, "learning_rate": 0.3, "keep_last_n": 1, "keep_best": True}
    stage(SFT[:2], **options).train(PAIRS, validation=PAIRS[:3])
    validated = [line for line in lines(tmp_path / "run") if "validation/loss" in line]
    assert [line["step"] for line in validated] == [2, 4, 6]
    best = min(validated, key=lambda line: line["validation/loss"])["step"]
    assert [one.update for one in CheckpointStore(tmp_path / "run").complete()] == sorted({best, STEPS})


def test_other_rows_other_weights_and_other_stages_are_refused(stage: Make, tmp_path: Path) -> None:
    stage(SFT[:2], num_steps=1, eval_every=1).train(PAIRS, validation=PAIRS[:2])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    def resumed(of: Any = SFT[:2], rows: Any = PAIRS, held_out: Any = PAIRS[:2], **options: Any) -> None:
        trainer = stage(of, **{"num_steps": 2, "eval_every": 1, **options})
        trainer.train(rows, validation=held_out, resume=True)

    with pytest.raises(CheckpointError, match="train_path: the rows are not those"):
        resumed(rows=PAIRS[::-1])
    with pytest.raises(CheckpointError, match="val_path: the rows are not those"):
        resumed(held_out=PAIRS[1:3])
    with pytest.raises(InvalidConfigurationError, match="lora_r was 4 and is 2"):
        resumed(lora_r=2)
    with pytest.raises(CheckpointError, match="is of a run of sft, and this one is of reward-model"):
        resumed(REWARD[:2], CHOICES, CHOICES[:2])
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume"):
        stage(SFT[:2]).train(PAIRS)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_what_has_changed_is_named(stage: Make, capsys: pytest.CaptureFixture[str]) -> None:
    stage(SFT[:2], num_steps=2).train(PAIRS)
    stage(SFT[:2], num_steps=3, keep_last_n=7).train(PAIRS, resume=True)
    out = capsys.readouterr().out
    assert "num_steps was 2 and is 3" in out
    assert "keep_last_n" not in out


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken_if_allowed(
    stage: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = stage(SFT[:2], num_steps=3)
    result = straight.train(PAIRS)
    victim = CheckpointStore(tmp_path / "run").complete()[-1].path / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*_update_2 .*--resume-fallback"):
        stage(SFT[:2], num_steps=3).train(PAIRS, resume=True)
    after = stage(SFT[:2], num_steps=3, resume_fallback=True)
    assert_same(straight, result, after, after.train(PAIRS, resume=True))
    assert "optimizer.safetensors" in capsys.readouterr().out


def test_a_run_that_fails_keeps_what_it_earned(
    stage: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = supervised.Walk.advance

    def fail(self: Any) -> dict[str, float]:
        if self.step == 2:
            raise CheckpointError("something broke.")
        return advance(self)

    monkeypatch.setattr(supervised.Walk, "advance", fail)
    with pytest.raises(
        Exception, match=r"something broke\..*interrupted \(after step 2\).*after step 2"
    ) as failed:
        stage(SFT[:2]).train(PAIRS)
    assert "--resume" in str(failed.value)
    assert (tmp_path / "run" / "interrupted" / "adapters.safetensors").is_file()


@pytest.mark.parametrize(("before", "after"), [(None, 1), (1, None), (1, 1), (None, None)])
def test_early_stopping_that_is_set_or_dropped_on_the_way_begins_anew(
    before: int | None, after: int | None
) -> None:
    """What was best before has no weights to go back to, or none that are wanted."""
    module = nn.Linear(1, 1)
    old = EarlyStopping(module, before)
    old.see({"loss": 1.0})
    new = EarlyStopping(module, after)
    new.load_state_arrays(old.state_arrays())
    new.load_state_dict(old.state_dict())
    module.weight = module.weight + 1
    last = np.array(module.weight)
    new.see({"loss": 2.0})
    kept = new.keep_best()["loss"]
    assert kept == (1.0 if before == after == 1 else 2.0)
    assert np.array_equal(np.array(module.weight), last) == (kept == 2.0)
