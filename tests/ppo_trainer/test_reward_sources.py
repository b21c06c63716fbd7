"""Rewards in a run: learned ones by folder, failures that end it or are counted, metrics, conversations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.tokenizer_setup import byte_tokenizer, prepare_prompt
from config.errors import InvalidConfigurationError, ModelLoadError, RewardError
from config.ppo_config import PPOConfig
from config.supervised_config import ProcessRewardConfig, RewardModelConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.process_reward_model import ProcessRewardModel
from models.reward_model import RewardModel
from models.sft_model import LanguageModel, load_language_model
from ppo_trainer.evaluator import score_metrics, score_rollouts
from ppo_trainer.ppo_trainer import PPOTrainer
from ppo_trainer.reward_sources import build_rewards
from rewards.composition import RewardSet
from rewards.scored_batch import ScoredBatch


@pytest.fixture
def trainer(
    tmp_path: Path, make_config: Callable[..., Any], tiny: LanguageModel
) -> Callable[..., PPOTrainer]:
    def make(reward: Any, **options: Any) -> PPOTrainer:
        small = {
            "algorithm": "grpo",
            "group_size": 4,
            "max_new_tokens": 4,
            "batch_size": 2,
            "verbose": False,
            "log_samples_every": 1,
            "max_logged_samples": 8,
            "output_dir": str(tmp_path / "run"),
        }
        return PPOTrainer(make_config(PPOConfig, **{**small, **options}), model=tiny, reward_model=reward)

    return make


def test_a_saved_reward_model_by_its_folder(
    trainer: Callable[..., PPOTrainer], make_config: Callable[..., Any], tiny: LanguageModel, tmp_path: Path
) -> None:
    saved = RewardModel(tiny, make_config(RewardModelConfig))
    saved.save(tmp_path / "rm")
    made = trainer(f"learned:{tmp_path / 'rm'}")
    assert made.rewards.names == ["reward_model"]
    np.testing.assert_allclose(
        made.rewards.score(["a"], ["b"]).total, saved.score_texts(["a"], ["b"]), rtol=1e-5, atol=1e-6
    )


def process_model(tiny: LanguageModel, config: Any, folder: Path) -> ProcessRewardModel:
    model = ProcessRewardModel(RewardModel(tiny, config), "\n", "product")
    model.save(folder)
    return model


def test_a_saved_process_reward_model_by_its_folder(
    trainer: Callable[..., PPOTrainer], make_config: Callable[..., Any], tiny: LanguageModel, tmp_path: Path
) -> None:
    saved = process_model(tiny, make_config(ProcessRewardConfig), tmp_path / "prm")
    ((first, second),) = saved.step_scores(["a"], [["b", "c"]])
    folder = f"learned:{tmp_path / 'prm'}"
    by_hand = {
        folder: first * second,
        str(tmp_path / "prm"): first * second,
        "min": min(first, second),
        "mean": (first + second) / 2,
    }
    for name, expected in by_hand.items():
        spec: Any = (
            {"name": folder, "config": {"step_reward": name}} if name in ("min", "mean") else {name: 1.0}
        )
        made = trainer(spec)
        assert made.rewards.names == ["process_reward_model"]
        assert made.rewards.score(["a"], ["b\nc"]).total[0] == pytest.approx(expected, abs=1e-5)
    metrics = trainer(folder).train(["a", "b"], num_epochs=1)
    assert 0 <= metrics["rewards/process_reward_model/mean"] <= 1


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("prm", {"aggregate": "min"}, r'"aggregate" is no option of .*prm \(there is: step_reward\)'),
        ("prm", {"step_reward": "max"}, "is one of min, product, mean, last, found 'max'"),
        ("rm", {"step_reward": "min"}, '"step_reward" is no option of .*rm, which has no options'),
    ],
)
def test_options_of_a_learned_reward_are_refused_before_a_weight_is_loaded(
    make_config: Callable[..., Any],
    tiny: LanguageModel,
    tmp_path: Path,
    kind: str,
    options: dict[str, Any],
    sentence: str,
) -> None:
    model = process_model(tiny, make_config(ProcessRewardConfig), tmp_path / "prm")
    model.reward_model.save(tmp_path / "rm")
    spec = {"name": f"learned:{tmp_path / kind}", "config": options}
    with pytest.raises(InvalidConfigurationError, match=sentence):
        PPOTrainer(PPOConfig(model_name="no/such-model"), reward_model=spec)


def test_a_reward_model_on_another_base_of_the_same_name_brings_its_own(
    trainer: Callable[..., PPOTrainer], make_config: Callable[..., Any], tmp_path: Path
) -> None:
    """The embedded model of another seed, with adapters: other weights under the same name."""
    config = make_config(RewardModelConfig, seed=5)
    saved = RewardModel(load_language_model(config), config)
    saved.save(tmp_path / "rm")
    made = trainer(f"learned:{tmp_path / 'rm'}")
    assert made.rewards.score(["a"], ["b"]).total[0] == pytest.approx(
        saved.score_texts(["a"], ["b"])[0], abs=1e-5
    )


def test_a_folder_without_a_reward_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is no folder of a reward model; expected is one"):
        PPOTrainer(PPOConfig(model_name="no/such-model"), reward_model=f"learned:{tmp_path}")


def odd(completions: list[str], **columns: Any) -> list[float]:
    if any(len(text.encode()) % 2 for text in completions):
        raise ValueError("odd")
    return [1.0 for _ in completions]


def test_a_failing_reward_ends_the_run_with_its_row(trainer: Callable[..., PPOTrainer]) -> None:
    def fails(completions: list[str]) -> list[float]:
        return [math.nan if row == 3 else 1.0 for row in range(len(completions))]

    with pytest.raises(RewardError, match="'fails' returned nan for row 3"):
        trainer(fails).train(["a", "b"], num_epochs=1)


def test_skipped_rows_are_counted_and_teach_nothing(
    trainer: Callable[..., PPOTrainer], tmp_path: Path
) -> None:
    def sometimes(completions: list[str]) -> list[float]:
        return [math.inf if row in (1, 6) else float(row) for row in range(len(completions))]

    made = trainer([sometimes, "default"], on_reward_error="skip")
    seen: list[Any] = []
    make = made._maker.make
    made._maker.make = lambda *a, **k: seen.append(make(*a, **k)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    metrics = made.train(["a", "b"], num_epochs=1)
    assert metrics["reward_errors"] == 2.0
    assert metrics["rewards/sometimes/applied"] == pytest.approx(6 / 8)
    assert metrics["rewards/well_formed/applied"] == 1.0
    mask = np.array(seen[0][0].mask)
    assert [row for row in range(8) if not mask[row].any()] == [1, 6]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["score"] is None for sample in samples] == [row in (1, 6) for row in range(8)]


def test_the_config_reaches_the_set(trainer: Callable[..., PPOTrainer]) -> None:
    made = trainer(
        ["default", "word_count"],
        reward_weights=[1.0, 3.0],
        reward_composition="weighted_mean_clip01",
        reward_timeout=7.0,
    )
    rewards = made.rewards
    assert (rewards.composition, rewards.timeout, rewards.on_error) == ("weighted_mean_clip01", 7.0, "stop")
    own = RewardSet([odd], timeout=3.0, on_error="skip")
    assert (trainer(own).rewards.timeout, trainer(own).rewards.on_error) == (3.0, "skip")
    assert trainer(own, reward_timeout=5.0).rewards.timeout == 5.0


def test_metrics_of_rewards_by_hand() -> None:
    nan = math.nan
    rewards = RewardSet([odd, lambda completions: []])
    scored = ScoredBatch(
        np.array([1.0, 1.0, 2.0, 4.0, nan]),
        {"odd": np.array([1.0, 1.0, 2.0, 4.0, nan]), "lambda": np.array([nan, 3.0, 3.0, 3.0, 3.0])},
        np.array([False, False, False, False, True]),
        measured={"own/number": 7.0, "reward": 99.0},
    )
    metrics = score_metrics(rewards, scored, [5, 5, 9, 9, 9])
    assert metrics["rewards/odd/applied"] == pytest.approx(4 / 5)
    assert metrics["rewards/odd/frac_zero_std"] == pytest.approx(2 / 4)  # group 5
    assert metrics["rewards/lambda/frac_zero_std"] == 1.0
    assert metrics["reward_errors"] == 1.0
    assert metrics["own/number"] == 7.0
    assert metrics["reward"] == 2.0  # ours, whatever a reward calls its own
    assert "rewards/odd/frac_zero_std" not in score_metrics(rewards, scored)


def test_conversations_reach_rewards_as_messages() -> None:
    seen: dict[str, Any] = {}

    def look(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    turns = ({"role": "user", "content": "hi"},)
    chat = Rollout(Prompt(0, "hi", (1,), messages=turns), 0, (2,), (0.0,), True, "yes")
    plain = Rollout(Prompt(1, "hi", (1,)), 0, (2,), (0.0,), True, "no")
    score_rollouts(RewardSet([look]), [chat, plain])
    assert seen["prompts"] == [[{"role": "user", "content": "hi"}], "hi"]
    assert seen["completions"] == [[{"role": "assistant", "content": "yes"}], "no"]


def test_a_template_that_opens_the_thinking_is_seen() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n"
    wrapped = TokenizerWrapper(tokenizer, eos_token_ids=[tokenizer.eos_token_id])
    prompt = prepare_prompt(wrapped, 0, {"prompt": [{"role": "user", "content": "2 + 2?"}]}, "row 0")
    assert prompt.text == "2 + 2?"
    rollout = Rollout(prompt, 0, (2,), (0.0,), True, "it is 4</think><answer>4</answer>")
    other = Rollout(replace(prompt, ending=""), 0, (2,), (0.0,), True, rollout.text)
    assert score_rollouts(RewardSet.build("format"), [rollout, other]).total.tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"config": {"scale": 2}}, '"scale" is no option of'),
        ({"wieght": 2}, "'wieght'"),
    ],
)
def test_an_entry_for_a_learned_reward_is_read_like_any_other(
    entry: Any, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    for name in (f"learned:{tmp_path}", str(tmp_path)):
        assert len(build_rewards({"name": name, "weight": 0.5}, PPOConfig())) == 1
        with pytest.raises(InvalidConfigurationError, match=sentence):
            build_rewards({"name": name, **entry}, PPOConfig())


@pytest.mark.parametrize("name", ["~nobody-here/x", "x" * 5000, "a\0b"])
def test_a_name_that_is_no_path_is_said(name: str) -> None:
    with pytest.raises(InvalidConfigurationError, match="There is no reward named"):
        build_rewards(name, PPOConfig())
    with pytest.raises(ModelLoadError, match="is no folder of a reward model"):
        build_rewards(f"learned:{name}", PPOConfig())
