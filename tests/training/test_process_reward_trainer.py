"""Process rewards: read at the marks, the loss by hand, a toy learned, a reward for PPOTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import CheckpointError, DataLoadError
from config.model_config import ModelConfig
from config.supervised_config import ProcessRewardConfig
from models.process_reward_model import STEP_REWARDS, ProcessRewardModel
from models.reward_model import RewardModel
from models.sft_model import LanguageModel, build_embedded
from training.preference_loss import step_loss
from training.process_reward_trainer import ProcessRewardTrainer

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
ROWS = [
    {"prompt": "ab", "steps": ["c", "def"], "labels": [True, False]},
    {"prompt": "hello", "steps": ["x"], "labels": [0.25]},
]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return build_embedded(SMALLEST, seed=1)


def trainer_of(base: LanguageModel, **options: Any) -> ProcessRewardTrainer:
    common = {"model_name": "embedded", "embedded_model": SMALLEST, "fine_tune_type": "full"}
    return ProcessRewardTrainer(base, ProcessRewardConfig(**{**common, **options}))


def test_the_step_loss_by_hand() -> None:
    log3 = float(np.log(3.0))  # σ(log 3) = 3/4
    assert step_loss(mx.array([log3]), mx.array([1.0])).item() == pytest.approx(-np.log(0.75))
    assert step_loss(mx.array([log3]), mx.array([0.0])).item() == pytest.approx(-np.log(0.25))
    both = step_loss(mx.array([log3, 0.0]), mx.array([0.5, 0.3]), denominator=4).item()
    assert both == pytest.approx((-0.5 * np.log(0.75) - 0.5 * np.log(0.25) + np.log(2)) / 4)
    gradient = mx.grad(lambda s: step_loss(s, mx.array([1.0, 0.0])))(mx.array([log3, log3]))
    assert np.allclose(np.array(gradient), [-0.25 / 2, 0.75 / 2])


def test_scores_are_read_where_a_step_ends_whatever_stands_beside_it(base: LanguageModel) -> None:
    trainer = trainer_of(base)
    first, second = trainer.encode(ROWS)
    text = "abc\ndef\n"
    assert first.ids == trainer.model.encode("", [])[0] + list(trainer.model.encode(text, [])[0])
    assert first.marks == [3, 7]
    model = trainer.model.reward_model
    alone = [
        float(model.raw_scores(mx.array([one.ids[: mark + 1]]), mx.array([mark + 1]))[0])
        for one in (first, second)
        for mark in one.marks
    ]
    together = trainer.model.scores_at([first.ids, second.ids], [first.marks, second.marks])
    np.testing.assert_allclose(np.array(together), alone, atol=1e-5)
    labels = [1.0, 0.0, 0.25]
    expected = np.mean([np.log1p(np.exp(s)) - y * s for s, y in zip(alone, labels, strict=True)])
    assert trainer.evaluate(ROWS)["loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer_of(base, num_steps=1, batch_size=2, micro_batch_size=1).train(ROWS)[
        "loss"
    ] == pytest.approx(expected, abs=1e-5)


def labelled(count: int, seed: int) -> list[dict[str, Any]]:
    """A step is right if it has no z."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        steps = ["".join(rng.choice(list("abcz"), size=3)) for _ in range(rng.integers(1, 4))]
        rows.append({"prompt": "q", "steps": steps, "labels": ["z" not in step for step in steps]})
    return rows


def test_wrong_steps_are_found_in_answers_not_seen_and_the_reward_is_the_worst_step(
    base: LanguageModel, tmp_path: Path
) -> None:
    trainer = trainer_of(base, num_steps=60, batch_size=16, learning_rate=1e-2)
    trainer.train(labelled(200, seed=0))
    assert trainer.evaluate(labelled(60, seed=1))["accuracy"] > 0.95
    ((good, bad),) = trainer.model.step_scores(["q"], [["abc", "azb"]])
    assert good > 0.8 > 0.2 > bad
    rewards = trainer.model(["q", "q", "q"], ["abc\nazb", "abc", " \n"])
    assert rewards == [pytest.approx(bad, abs=1e-5), pytest.approx(good, abs=1e-5), 0.0]
    trainer.model.save(tmp_path / "prm")
    again = ProcessRewardModel.load(tmp_path / "prm", base=base)
    assert again.step_scores(["q"], [["abc", "azb"]])[0] == pytest.approx([good, bad], abs=1e-5)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"steps": ["a"], "labels": [1]}, '"prompt" must be a text or a chat, found None'),
        ({"prompt": "a", "steps": [], "labels": []}, '"steps" must be a list of texts'),
        ({"prompt": "a", "steps": ["b"], "labels": [1, 0]}, r'"labels" must have one entry per step \(1\)'),
        (
            {"prompt": "a", "steps": ["b"], "labels": [2]},
            "a label is true, false or a number from 0 to 1, found 2",
        ),
        (
            {"prompt": "a", "steps": ["b\n", "c\nd"], "labels": [1, 0]},
            "step 2 has step_separator '.n' inside, where answers are cut",
        ),
        ({"prompt": "a" * 30, "steps": ["b"], "labels": [1]}, "32 tokens, max_sequence_length is 20"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(base: LanguageModel, row: Any, sentence: str) -> None:
    with pytest.raises(DataLoadError, match=rf"process rows\[0\]: {sentence}"):
        trainer_of(base, max_sequence_length=20).train([row])


def test_what_an_answer_is_worth_whose_steps_are_right_with_these_probabilities() -> None:
    steps = [0.5, 0.25, 1.0]
    found = {name: make(steps) for name, make in STEP_REWARDS.items()}
    assert found == {"min": 0.25, "product": 0.125, "mean": pytest.approx(1.75 / 3), "last": 1.0}


@pytest.mark.parametrize("step_reward", STEP_REWARDS)
def test_the_folder_says_what_it_is_and_how_it_scores(
    base: LanguageModel, tmp_path: Path, step_reward: Any
) -> None:
    trainer = trainer_of(base, step_separator="; ", step_reward=step_reward)
    trainer.model.save(tmp_path / "prm")
    again = ProcessRewardModel.load(tmp_path / "prm", base)
    assert (again.separator, again.step_reward) == ("; ", step_reward)
    ((first, second),) = trainer.model.step_scores(["q"], [["ab", "c"]])
    by_hand = {
        "min": min(first, second),
        "product": first * second,
        "mean": (first + second) / 2,
        "last": second,
    }
    for text in ("ab; c", "ab; c; ", "ab; ; c"):
        assert again(["q"], [text]) == [pytest.approx(by_hand[step_reward], abs=1e-5)]
    with pytest.raises(
        CheckpointError, match=r"a process reward model, whose head .* ProcessRewardModel.load"
    ):
        RewardModel.load(tmp_path / "prm", base)
    trainer.model.reward_model.save(tmp_path / "rm")
    with pytest.raises(
        CheckpointError, match=r"for whole answers, not for steps; load it with RewardModel.load"
    ):
        ProcessRewardModel.load(tmp_path / "rm", base)


def test_a_step_may_bring_its_separator(base: LanguageModel) -> None:
    model = trainer_of(base).model
    assert model.encode("q", ["a\n", "b"]) == model.encode("q", ["a", "b\n"])
