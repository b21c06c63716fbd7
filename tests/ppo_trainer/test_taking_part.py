"""Taking part: callbacks, rewards, algorithms and models of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ppo_trainer.ppo_trainer
from config.errors import (
    InvalidConfigurationError,
    TrainingRuntimeError,
)
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt
from models.policy_model import PolicyModel
from models.reward_model import RewardModel
from models.sft_model import build_embedded
from models.value_model import ValueModel
from monitoring.metrics_file import read_metrics
from ppo_trainer.algorithms import Algorithm
from ppo_trainer.credit import Credit, Scored
from ppo_trainer.evaluator import score_rollouts
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    GRPO,
    PPO,
    PROMPTS,
    SMALLEST,
    arrays,
    config,
    constant,
    even_share,
    same,
    steps_of,
    weights,
)


def test_a_callback_that_says_false_ends_the_run_after_the_step(tmp_path: Path) -> None:
    class Stop:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> bool:
            return step < 3

    trainer = PPOTrainer(config(tmp_path, batch_size=2), reward_model=constant)
    result = trainer.train(PROMPTS, num_epochs=10, callbacks=[Stop()])
    assert trainer.step == 3
    assert len(result["history"]) == 2
    assert (tmp_path / "run" / "final" / "adapters.safetensors").is_file()


def test_every_prompt_is_met_once_per_epoch_in_an_order_drawn_from_the_seed(tmp_path: Path) -> None:
    met: list[list[str]] = []

    def reward(prompts: Sequence[str], **columns: Any) -> list[float]:
        met.append(list(prompts))
        return [0.0] * len(prompts)

    prompts = [f"prompt {i}" for i in range(7)]
    trainer = PPOTrainer(config(tmp_path, batch_size=3, max_new_tokens=1), reward_model=reward)
    trainer.train(prompts, num_epochs=2)
    assert [len(batch) for batch in met] == [3, 3, 1] * 2
    epochs = [[prompt for batch in half for prompt in batch] for half in (met[:3], met[3:])]
    assert all(sorted(epoch) == prompts for epoch in epochs)
    assert epochs[0] != epochs[1] != prompts


def test_columns_reach_the_reward_and_components_are_logged_beside_their_weighted_sum(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def matches(prompts: Sequence[str], answer: Sequence[int], **columns: Any) -> list[float]:
        seen.append({"prompts": prompts, "answer": answer, **columns})
        return [float(a) for a in answer]

    def sometimes(completions: Sequence[str], answer: Sequence[int]) -> list[float | None]:
        return [1.0 if a == 3 else None for a in answer]

    rows = [{"prompt": "what is one", "answer": 1}, {"prompt": "what is three", "answer": 3}]
    trainer = PPOTrainer(
        config(tmp_path, reward_weights=[0.5, 2.0], group_size=2, **PPO), reward_model=[matches, sometimes]
    )
    line = steps_of(trainer.train(rows, num_epochs=1)["run_folder"])[0]
    assert sorted(zip(seen[0]["prompts"], seen[0]["answer"], strict=True)) == [
        ("what is one", 1),
        ("what is one", 1),
        ("what is three", 3),
        ("what is three", 3),
    ]
    of_the_trainer = {"trainer_state", "log_extra", "log_metric"}
    assert {len(v) for name, v in seen[0].items() if name not in of_the_trainer} == {4}
    assert line["rewards/matches/mean"] == 2.0
    assert line["rewards/sometimes/mean"] == 1.0
    # 0.5 · 1 for the first prompt, to which the second reward does not apply, and 0.5 · 3 + 2 · 1.
    assert line["reward"] == pytest.approx((0.5 + 3.5) / 2)


def test_a_learned_reward_model_is_a_reward_like_any_other(tmp_path: Path) -> None:
    options = config(tmp_path, learning_rate=1e-2, **GRPO)
    judge = RewardModel(build_embedded(SMALLEST, seed=9), options)
    trainer = PPOTrainer(options, reward_model=[judge, even_share])
    before = arrays(judge.module)
    result = trainer.train(PROMPTS, num_epochs=2)
    rollouts = trainer.generate(_prepared(trainer))
    scored = score_rollouts(trainer.rewards, rollouts)
    expected = [float(judge.forward(mx.array([[*r.prompt.ids, *r.completion_ids]]))[0]) for r in rollouts]
    np.testing.assert_allclose(scored.components["reward_model"], expected, atol=1e-5)
    assert np.std(expected) > 0
    assert "rewards/reward_model/mean" in result
    assert same(arrays(judge.module), before)


def _prepared(trainer: PPOTrainer) -> list[Prompt]:
    encode = trainer.policy.tokenizer.encode
    return [Prompt(i, text, tuple(encode(text)), {}) for i, text in enumerate(PROMPTS)]


def test_an_algorithm_of_ones_own_is_a_function_and_a_row(tmp_path: Path) -> None:
    """REINFORCE with the batch mean as baseline: no critic, no groups, an unclipped ratio."""
    met: list[Scored] = []

    def centred(batch: Scored, config: PPOConfig) -> Credit:
        met.append(batch)
        return Credit((batch.scores - mx.mean(batch.scores))[:, None] * batch.mask, None)

    row = Algorithm(
        name="mine",
        credit=centred,
        surrogate="unclipped",
        reduction="fixed_length",
        defaults={"num_epochs_per_rollout": 2, "batch_size": 3},
    )
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2), reward_model=even_share, algorithm=row)
    before = weights(trainer)
    run = trainer.train(PROMPTS, num_epochs=1)["run_folder"]
    assert [line["num_updates"] for line in steps_of(run)] == [2, 2]
    assert [batch.mask.shape[0] for batch in met] == [3, 1]
    assert trainer.value_model is None
    assert json.loads((Path(run) / "config.json").read_text())["algorithm"] == "mine"
    assert not same(weights(trainer), before)


def test_models_that_are_built_already_are_used_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path, model_name="never/loaded", learning_rate=1e-2, **PPO)
    base = build_embedded(SMALLEST, seed=4)
    monkeypatch.setattr(ppo_trainer.ppo_trainer, "load_language_model", None)

    given = PPOTrainer(options, reward_model=constant, model=base)
    assert given.policy.base is base

    policy = PolicyModel(base, options)
    value, reference = ValueModel(base, options), policy.frozen_copy()
    trainer = PPOTrainer(
        options.replace(output_dir=str(tmp_path / "2")),
        reward_model=even_share,
        policy=policy,
        value_model=value,
        reference=reference,
    )
    assert (trainer.policy, trainer.value_model, trainer.reference) == (policy, value, reference)
    before = (arrays(policy.model), arrays(value.module), arrays(reference.model))
    trainer.train(PROMPTS, num_epochs=1)
    assert not same(arrays(policy.model), before[0])
    assert not same(arrays(value.module), before[1])
    assert same(arrays(reference.model), before[2])


def test_a_policy_that_has_learned_already_is_its_own_reference(tmp_path: Path) -> None:
    """The reference is the policy before the first update of this run, adapters and all."""
    first = PPOTrainer(config(tmp_path / "1", learning_rate=2e-2, **PPO), reward_model=even_share)
    first.train(PROMPTS, num_epochs=2)
    second = PPOTrainer(config(tmp_path / "2", **PPO), reward_model=even_share, policy=first.policy)
    assert second.evaluate(PROMPTS)["objective/kl"] == 0.0


def test_a_critic_that_the_algorithm_has_no_use_for_is_refused_or_left_alone(tmp_path: Path) -> None:
    options = config(tmp_path, **GRPO)
    base = build_embedded(SMALLEST, seed=4)
    value = ValueModel(base, options)
    before = arrays(value.module)
    try:
        PPOTrainer(options, reward_model=even_share, model=base, value_model=value).train(
            PROMPTS, num_epochs=1
        )
    except InvalidConfigurationError as error:
        assert "value_model" in str(error)  # noqa: PT017
    assert same(arrays(value.module), before)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # their spread has no float32
def test_numbers_that_are_not_finite_stop_the_run_after_a_while_and_not_the_weights(tmp_path: Path) -> None:
    """Rewards that float32 holds but their squares not: every update is skipped, then the run ends."""

    def enormous(completions: Sequence[str], **columns: Any) -> list[float]:
        return [(-1.0) ** i * 3e38 for i in range(len(completions))]

    trainer = PPOTrainer(config(tmp_path, max_skipped_steps=3, **PPO), reward_model=enormous)
    before = arrays(trainer.policy.model)
    with pytest.raises(TrainingRuntimeError, match=r"3 updates in a row .*interrupted"):
        trainer.train(PROMPTS, num_epochs=10)
    assert same(arrays(trainer.policy.model), before)


def test_evaluation_reaches_callbacks_and_the_metrics_file(tmp_path: Path) -> None:
    seen: list[tuple[int, Mapping[str, Any]]] = []

    class Watch:
        def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
            seen.append((step, metrics))

    trainer = PPOTrainer(config(tmp_path, **GRPO), reward_model=even_share, callbacks=[Watch()])
    trainer.train(PROMPTS, num_epochs=2)
    metrics = trainer.evaluate(PROMPTS)
    assert [step for step, _ in seen] == [2]
    assert seen[0][1]["avg_reward"] == metrics["avg_reward"]
    lines = [
        line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line.get("kind") == "evaluate"
    ]
    assert [line["eval/avg_reward"] for line in lines] == [pytest.approx(metrics["avg_reward"])]


def test_a_second_train_goes_on_with_other_orders_and_other_samples(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, batch_size=1, **GRPO), reward_model=even_share)
    trainer.train(PROMPTS, num_epochs=1)
    trainer.train(PROMPTS, num_epochs=1)
    lines = steps_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["reward"] for line in lines[:4]] != [line["reward"] for line in lines[4:]]


def test_a_learned_reward_reads_texts_where_the_policy_has_another_vocabulary(tmp_path: Path) -> None:
    """In a list, and as a key of a mapping of weights."""
    base = build_embedded(SMALLEST, seed=4)
    judge = RewardModel(base, config(tmp_path))
    policy_base = build_embedded(SMALLEST, seed=5)
    policy_base.tokenizer._tokenizer.add_tokens(["hello"])  # their ids now differ
    for spec in ([judge], {judge: 2.0}):
        trainer = PPOTrainer(
            config(tmp_path).replace(output_dir=None),
            reward_model=spec,
            policy=PolicyModel(policy_base, config(tmp_path)),
        )
        assert trainer.rewards.rewards[0] is not judge
        assert trainer.rewards.rewards[0](prompts=["a"], completions=["b"]) == judge.score_texts(["a"], ["b"])
