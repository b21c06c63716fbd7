"""Bad input: found early, told in a sentence, and nothing earned is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

import models.sft_model
import ppo_trainer.ppo_trainer
from config.errors import (
    CheckpointError,
    DataLoadError,
    InvalidConfigurationError,
    ModelLoadError,
    RewardError,
    ToolkitError,
)
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    GRPO,
    PPO,
    PPO_AND_GRPO,
    PROMPTS,
    config,
    constant,
    even_share,
    same,
    steps_of,
    weights,
)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test that reaches for a model: what can be refused before must be."""

    def loaded(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(ppo_trainer.ppo_trainer, "load_language_model", loaded)
    monkeypatch.setattr(models.sft_model, "build_embedded", loaded)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "keywords", "error", "sentence"),
    [
        ({"algorithm": "ppp"}, {}, InvalidConfigurationError, 'there is no "ppp"; did you mean "ppo"'),
        ({"algorithm": "grpo", "group_size": 1}, {}, InvalidConfigurationError, "group_size: grpo"),
        ({"reward_weights": [1.0, 2.0]}, {}, InvalidConfigurationError, "2 reward weights were given for 1"),
        ({}, {"reward_model": "well_formd"}, InvalidConfigurationError, "well_formed"),
        ({}, {"reward_model": 3}, InvalidConfigurationError, "3"),
        ({}, {"reward_model": []}, InvalidConfigurationError, "[Nn]o reward"),
        ({}, {"callbacks": [3]}, TypeError, "callbacks: 3 is neither"),
        ({"kl_target": 6.0, "kl_horizon": 3, "batch_size": 16}, {}, InvalidConfigurationError, "kl_horizon"),
    ],
)
def test_a_mistake_is_found_before_a_weight_is_loaded(
    tmp_path: Path, options: dict[str, Any], keywords: dict[str, Any], error: type, sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        PPOTrainer(config(tmp_path, **options), **{"reward_model": constant, **keywords})


@pytest.mark.usefixtures("no_weights")
def test_a_folder_that_cannot_be_used_is_found_before_a_weight_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for model in ("embedded", "no/such-model"):
        with pytest.raises(CheckpointError, match=r'output_dir: ".*file/run" cannot be written to'):
            PPOTrainer(config(tmp_path / "file", model_name=model), reward_model=constant)
    used = tmp_path / "run"
    used.mkdir()
    (used / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="already holds a run"):
        PPOTrainer(config(tmp_path), reward_model=constant)
    assert (used / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_that_is_not_there_is_found_before_a_weight_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: adapter_config\.json is missing"):
        PPOTrainer(config(tmp_path, adapter_path=str(tmp_path / "nowhere")), reward_model=constant)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no such folder", 'model_name: there is no folder "no such folder"'),
        ("{tmp}", "has no config.json"),
        ("{tmp}/file", "is a file"),
    ],
)
def test_an_unknown_model_is_refused_in_a_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelLoadError, match=sentence):
        PPOTrainer(config(tmp_path, model_name=name.format(tmp=tmp_path)), reward_model=constant)


@pytest.mark.parametrize(
    ("prompts", "epochs", "error", "sentence"),
    [
        ([], 1, DataLoadError, "prompts: the list is empty"),
        ("one string", 1, DataLoadError, r"prompts: a list of prompts is expected.*write \[prompt\]"),
        (["fine", "x" * 600], 1, DataLoadError, r"prompts\[1\]: 600 tokens, but max_prompt_length is 512"),
        (["fine", ""], 1, DataLoadError, r"prompts\[1\]: the prompt is empty"),
        ([{"text": "x"}], 1, DataLoadError, r'prompts\[0\]: "prompt" is missing \(fields: text\)'),
        ([3], 1, DataLoadError, r"prompts\[0\]: a string or a list of chat messages is expected, found int"),
        (["fine"], 0, InvalidConfigurationError, "num_epochs: at least 1 is expected, found 0"),
        (["fine"], -3, InvalidConfigurationError, "num_epochs: at least 1 is expected, found -3"),
        (["fine"], 1.5, InvalidConfigurationError, "num_epochs: .*found 1.5"),
        ([{"prompt": "fine", "completions": "x"}], 1, DataLoadError, r"prompts\[0\]: .*completions"),
        (None, 1, DataLoadError, "prompts: a list of prompts is expected, found NoneType"),
        ({"prompt": "fine"}, 1, DataLoadError, "prompts: a list of prompts is expected, found dict"),
        (iter(["fine"]), 1, DataLoadError, "prompts: a list of prompts is expected, found list_iterator"),
        (["half a character: \ud800"], 1, DataLoadError, r"prompts\[0\]"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_before_anything_is_written(
    tmp_path: Path, prompts: Any, epochs: Any, error: type, sentence: str
) -> None:
    trainer = PPOTrainer(config(tmp_path), reward_model=constant)
    with pytest.raises(error, match=sentence):
        trainer.train(prompts, num_epochs=epochs)
    assert list((tmp_path / "run").iterdir()) == []


class Broken:
    """A reward that works until its third call."""

    reward_name = "mine"

    def __init__(self, then: Callable[[int], Any]) -> None:
        self.then = then
        self.calls = 0

    def __call__(self, completions: Sequence[str], completion_ids: Any, **columns: Any) -> Any:
        self.calls += 1
        return even_share(completion_ids) if self.calls < 3 else self.then(len(completions))


def divide_by_zero(rows: int) -> Any:
    return 1 / (rows - rows)


@PPO_AND_GRPO
@pytest.mark.parametrize(
    ("then", "sentence"),
    [
        (lambda rows: [1.0] * (rows - 1), "'mine' returned .* values for .* completions"),
        (lambda rows: [1.0] * (rows - 1) + [math.nan], "'mine' returned nan for row"),
        (lambda rows: ["good"] * rows, "'mine' returned str 'good' for row 0"),
        (lambda rows: None, "'mine' returned None for the whole batch"),
        (divide_by_zero, "'mine' raised ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_in_the_third_step_loses_nothing_of_the_first_two(
    tmp_path: Path, kind: dict[str, Any], then: Callable[[int], Any], sentence: str
) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, batch_size=2, **kind), reward_model=Broken(then)
    )
    with pytest.raises(RewardError, match=sentence) as caught:
        trainer.train(PROMPTS, num_epochs=5)
    interrupted = tmp_path / "run" / "interrupted"
    assert str(interrupted) in str(caught.value)
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2]
    other = PPOTrainer(config(tmp_path / "2", **kind), reward_model=constant)
    other.load_model(interrupted)
    assert same(weights(other), weights(trainer))
    mlx_lm.load(str(interrupted / "base"), adapter_path=str(interrupted))


def test_the_sentence_counts_the_steps_that_were_learned_from(tmp_path: Path) -> None:
    """The third batch was sampled and never learned from: two steps are in the saved weights."""
    trainer = PPOTrainer(config(tmp_path, **PPO), reward_model=Broken(divide_by_zero))
    with pytest.raises(RewardError, match=r"after step 2\b"):
        trainer.train(PROMPTS, num_epochs=5)


def test_a_reward_that_fails_at_once_is_one_sentence(tmp_path: Path) -> None:
    def broken(completions: Sequence[str], **columns: Any) -> list[float]:
        return []

    trainer = PPOTrainer(config(tmp_path), reward_model=broken)
    before = weights(trainer)
    with pytest.raises(RewardError, match="'broken' returned 0 values"):
        trainer.train(PROMPTS)
    assert steps_of(tmp_path / "run") == [] if (tmp_path / "run" / "metrics.jsonl").exists() else True
    assert same(weights(trainer), before)


def test_an_interrupted_run_is_saved_and_stays_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(rows: int) -> Any:
        raise KeyboardInterrupt

    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **PPO), reward_model=Broken(interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(PROMPTS, num_epochs=5)
    interrupted = tmp_path / "run" / "interrupted"
    assert str(interrupted) in capsys.readouterr().out
    other = PPOTrainer(config(tmp_path / "2", **PPO), reward_model=constant)
    other.load_model(interrupted)
    assert same(weights(other), weights(trainer))


def test_a_callback_that_raises_ends_the_run_with_its_own_exception_and_the_weights_saved(
    tmp_path: Path,
) -> None:
    def broken(epoch: int, metrics: Mapping[str, Any]) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        PPOTrainer(config(tmp_path), reward_model=constant).train(PROMPTS, callbacks=[broken])
    assert (tmp_path / "run" / "interrupted" / "adapters.safetensors").is_file()


def test_when_the_weights_cannot_be_saved_either_the_first_mistake_is_still_told(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, **GRPO), reward_model=Broken(divide_by_zero))
    (tmp_path / "run" / "interrupted").write_text("in the way")
    with pytest.raises(ToolkitError, match="ZeroDivisionError"):
        trainer.train(PROMPTS, num_epochs=5)
