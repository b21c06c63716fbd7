"""The optimiser step and the supervised stages on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from base_setup.lora_setup import adapter_layers
from base_setup.parameters import named_arrays
from base_setup.tokenizer_setup import encode, end_token_ids
from config.errors import DataLoadError, TrainingRuntimeError
from config.model_config import ModelConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from config.training_config import TrainingConfig
from models.sft_model import LanguageModel, build_embedded
from training.model_trainer import ModelTrainer, build_schedule
from training.reward_trainer import RewardTrainer
from training.sft_trainer import SFTTrainer

SMALL = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
SHARED: dict[str, Any] = {"model_name": "embedded", "embedded_model": SMALL, "fine_tune_type": "full"}


@pytest.fixture
def base() -> LanguageModel:
    return build_embedded(SMALL, seed=1)


class Line(nn.Module):
    """One weight vector w; the losses below are linear or worse in it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = mx.array([1.0, 2.0, 3.0])


def trainer(line: Line, **options: Any) -> ModelTrainer:
    return ModelTrainer(line, TrainingConfig(**{"max_grad_norm": None, **options}), total_steps=10)


def along(line: Line, direction: mx.array) -> tuple[mx.array, None]:
    return mx.sum(line.w * direction), None


# The step ------------------------------------------------------------------------------------------------


def test_the_first_step_is_the_learning_rate_against_the_sign() -> None:
    """Adam with bias correction: m/√v = g/|g|, whatever the size of g; no weight decay."""
    line = Line()
    report = trainer(line, learning_rate=0.1).step(lambda g: along(line, g), [mx.array([5.0, -0.01, 200.0])])
    np.testing.assert_allclose(np.array(line.w), [0.9, 2.1, 2.9], atol=1e-6)
    assert report.grad_norm == pytest.approx(np.sqrt(25 + 1e-4 + 4e4))
    assert report.loss == pytest.approx(5 - 0.02 + 600)


def test_weight_decay_is_decoupled() -> None:
    line = Line()
    trainer(line, learning_rate=0.1, weight_decay=0.5).step(lambda g: along(line, g), [mx.ones(3)])
    np.testing.assert_allclose(np.array(line.w), [0.95 - 0.1, 1.9 - 0.1, 2.85 - 0.1], atol=1e-6)


def test_micro_batches_add_up() -> None:
    whole, parts = Line(), Line()
    gradients = [mx.array([1.0, 2.0, -3.0]), mx.array([0.5, -4.0, 1.0])]
    for _ in range(3):
        one = trainer(whole, learning_rate=0.1).step(lambda g: along(whole, g), [gradients[0] + gradients[1]])
        two = trainer(parts, learning_rate=0.1).step(lambda g: along(parts, g), gradients)
        assert one.loss == pytest.approx(two.loss)
        assert one.grad_norm == pytest.approx(two.grad_norm)
    np.testing.assert_allclose(np.array(whole.w), np.array(parts.w), atol=1e-6)


def test_a_long_gradient_is_scaled_to_the_norm() -> None:
    """Norms 5 and 0.5 under a limit of 1: Adam's moments remember (0.6, 0.8), then (0.3, 0.4)."""
    line = Line()
    steps = trainer(line, learning_rate=0.1, max_grad_norm=1.0, adam_beta1=0.0)
    for direction, expected in (([3.0, 4.0, 0.0], [0.6, 0.8, 0.0]), ([0.3, 0.4, 0.0], [0.3, 0.4, 0.0])):
        steps.step(lambda g: along(line, g), [mx.array(direction)])
        np.testing.assert_allclose(np.array(steps.optimizer.state["w"]["m"]), expected, atol=1e-5)


@pytest.mark.parametrize("poison", [mx.inf, -mx.inf, mx.nan])
def test_numbers_that_are_not_finite_change_nothing_and_end_the_run_after_a_while(poison: float) -> None:
    line = Line()
    steps = trainer(line, max_skipped_steps=2, learning_rate=0.1)
    steps.step(lambda g: along(line, g), [mx.ones(3)])
    before = {k: np.array(v) for k, v in named_arrays({"w": line.w, "state": steps.optimizer.state}).items()}
    bad = mx.array([1.0, poison, 1.0])
    assert steps.step(lambda g: along(line, g), [mx.ones(3), bad]).skipped
    after = named_arrays({"w": line.w, "state": steps.optimizer.state})
    assert all(np.array_equal(before[k], np.array(after[k])) for k in before)
    assert not steps.step(lambda g: along(line, g), [mx.ones(3)]).skipped  # the count starts again
    steps.step(lambda g: along(line, g), [bad])
    with pytest.raises(
        TrainingRuntimeError, match=r"2 updates in a row .* were skipped; lower learning_rate"
    ):
        steps.step(lambda g: along(line, g), [bad])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"lr_schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_schedule": "constant", "warmup_steps": 4}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ({"lr_schedule": "linear", "warmup_steps": 2}, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_schedule": "cosine"}, [(1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]),
        ({"lr_schedule": "constant", "warmup_steps": 1}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_course_of_the_learning_rate(options: dict[str, Any], expected: list[float]) -> None:
    schedule = build_schedule(TrainingConfig(**options), 1.0, 6)
    rates = [float(schedule(mx.array(i))) if callable(schedule) else schedule for i in range(6)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


# Supervised fine-tuning ----------------------------------------------------------------------------------

ROWS = [{"prompt": "ab", "completion": " cd"}, {"prompt": "x", "completion": "yzyz"}]


def test_the_sft_loss_is_the_mean_over_completion_tokens_and_the_end(base: LanguageModel) -> None:
    total, count = 0.0, 0
    for row in ROWS:
        prompt = encode(base.tokenizer, row["prompt"])
        completion = [*encode(base.tokenizer, row["completion"]), min(end_token_ids(base.tokenizer))]
        ids = [*prompt, *completion]
        logits = np.array(base.model(mx.array([ids]))).astype(np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(completion))
        count += len(completion)
    assert count == 4 + 5
    assert SFTTrainer(base, SFTConfig(**SHARED)).loss(ROWS) == pytest.approx(total / count, abs=1e-5)


def test_sft_learns_a_toy_whatever_the_micro_batches(base: LanguageModel) -> None:
    def trained(**options: Any) -> tuple[float, dict[str, mx.array]]:
        config = SFTConfig(**SHARED, learning_rate=1e-2, num_steps=40, batch_size=2, **options)
        sft = SFTTrainer(base, config)
        sft.train(ROWS)
        return sft.loss(ROWS), named_arrays(sft.language_model.model.parameters())

    before = SFTTrainer(base, SFTConfig(**SHARED)).loss(ROWS)
    (after, one), (_, two) = trained(), trained(micro_batch_size=1)
    assert before > 5
    assert after < 0.5
    again = trained()[1]
    assert all(mx.array_equal(one[name], again[name]) for name in one)
    assert max(float(mx.max(mx.abs(one[name] - two[name]))) for name in one) < 2e-2  # 40 steps of rounding


def test_an_sft_model_with_adapters_is_a_plain_base_for_the_next_stage(base: LanguageModel) -> None:
    config = SFTConfig(
        **{**SHARED, "fine_tune_type": "lora"}, learning_rate=1e-2, num_steps=5, lora_dropout=0.5
    )
    results = []
    for _ in range(2):
        sft = SFTTrainer(base, config)
        sft.train(ROWS)
        ids = mx.array([[5, 6, 7]])
        assert adapter_layers(sft.language_model.model) == []
        np.testing.assert_allclose(
            np.array(sft.language_model.model(ids)), np.array(sft.policy.forward(ids).logits), atol=1e-5
        )
        results.append(np.array(sft.policy.forward(ids).logits))
    assert np.array_equal(*results)  # dropout follows from the seed
    assert not np.allclose(results[0], np.array(base.model(ids)), atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "the list is empty"),
        ([ROWS[0], {"prompt": "a"}], r"rows\[1\]: .*must be strings"),
        ([{"prompt": "", "completion": "x"}], r"rows\[0\]: the prompt is empty"),
        ([{"prompt": "a" * 9, "completion": "b"}], r"rows\[0\]: 11 tokens, max_sequence_length is 10"),
    ],
)
def test_sft_rows_that_cannot_be_used(base: LanguageModel, rows: Any, sentence: str) -> None:
    with pytest.raises(DataLoadError, match=sentence):
        SFTTrainer(base, SFTConfig(**SHARED, max_sequence_length=10)).train(rows)


# Reward model --------------------------------------------------------------------------------------------


def scored(text: str, reward: Any) -> dict[str, Any]:
    return {"prompt": "q", "completion": text, "reward": reward}


def test_the_first_reward_loss_by_hand(base: LanguageModel) -> None:
    """Of 3, 1, 1 and 2 there are five comparisons; the two ones are not compared."""
    rewards = RewardTrainer(base, RewardModelConfig(**SHARED, list_size=4, num_steps=1, batch_size=4))
    rows = [scored("aa", "3"), scored("b", 1), scored("ccc", 1.0), scored("d", "2.0")]
    s = dict(zip("abcd", rewards.reward_model.score_texts(["q"] * 4, ["aa", "b", "ccc", "d"]), strict=True))
    leads = [s[x] - s[y] for x, y in ("ab", "ac", "ad", "db", "dc")]
    metrics = rewards.train(rows)
    assert metrics["loss"] == pytest.approx(np.mean([np.log1p(np.exp(-lead)) for lead in leads]), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean([lead > 0 for lead in leads]))


def test_a_pair_is_a_list_of_two(base: LanguageModel) -> None:
    options = {**SHARED, "num_steps": 3, "batch_size": 2, "learning_rate": 1e-3}
    pair = RewardTrainer(base, RewardModelConfig(**options))
    pair.train([{"prompt": "q", "chosen": "aa", "rejected": "b"}] * 2)
    listed = RewardTrainer(base, RewardModelConfig(**options, list_size=2))
    listed.train([scored("aa", 1), scored("b", 0)])
    ones, twos = pair.reward_model, listed.reward_model
    assert ones.score_texts(["q"], ["z"]) == pytest.approx(twos.score_texts(["q"], ["z"]), abs=1e-3)


def test_a_reward_model_learns_what_separates_answers(base: LanguageModel) -> None:
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abc"), size=6)) for _ in range(300)]
    rows = [scored(text, str(text.count("a"))) for text in texts]
    config = RewardModelConfig(
        **SHARED, list_size=16, batch_size=16, num_steps=60, learning_rate=3e-3, micro_batch_size=1
    )
    rewards = RewardTrainer(base, config)
    before = rewards.accuracy(rows[:60])
    rewards.train(rows[60:])
    assert rewards.accuracy(rows[:60]) > max(0.9, before)
    scores = np.array(rewards.reward_model.score_texts(["q"] * 300, texts))
    assert abs(scores.mean()) < 0.2  # normalised
    assert scores.std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "the list is empty"),
        (
            [scored("a", "high"), scored("b", 1)],
            r"rows\[0\]: \"reward\" must be a finite number, found 'high'",
        ),
        ([scored("a", 1), scored("b", float("nan"))], r"rows\[1\]: \"reward\" must be a finite number"),
        ([scored("a", 1), scored("b", 1)], "all rewards are equal"),
        ([{"prompt": "q", "chosen": "a"}], r"rows\[0\]: \"rejected\" must be a string"),
        ([scored("a" * 30, 1), scored("b", 0)], r"rows\[0\]: 32 tokens, max_sequence_length is 20"),
    ],
)
def test_preference_rows_that_cannot_be_used(base: LanguageModel, rows: Any, sentence: str) -> None:
    with pytest.raises(DataLoadError, match=sentence):
        RewardTrainer(base, RewardModelConfig(**SHARED, max_sequence_length=20)).train(rows)


def test_nothing_is_written_by_the_supervised_stages(
    base: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SFTTrainer(base, SFTConfig(**SHARED, num_steps=1)).train(ROWS)
    assert list(tmp_path.iterdir()) == []
