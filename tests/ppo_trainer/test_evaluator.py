"""The evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.policy_model import PolicyModel
from ppo_trainer.evaluator import Evaluator, score_rollouts
from ppo_trainer.generator import Generator
from rewards.composition import RewardSet


def share_of_small_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i < 94 for i in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    "options", [{}, {"eval_temperature": 0.0}, {"micro_batch_size": 2, "temperature": 0.7}]
)
def test_evaluation_gives_the_same_numbers_twice_and_no_kl_before_training(
    policy: PolicyModel, prompts: list[Prompt], options: dict[str, Any]
) -> None:
    config = PPOConfig(max_new_tokens=6, **options)
    reference = policy.frozen_copy(with_adapter=False)
    evaluator = Evaluator(Generator(policy, config), RewardSet.build(share_of_small_ids), reference, config)
    first, again = evaluator.evaluate(prompts), evaluator.evaluate(prompts)
    assert first == again
    assert first["objective/kl"] == 0.0
    assert first["avg_reward"] == first["reward"]
    assert first["avg_reward"] == pytest.approx(np.mean([s["score"] for s in first["samples"]]), abs=1e-6)
    assert [sample["prompt"] for sample in first["samples"]] == [prompt.text for prompt in prompts]


def test_rewards_receive_columns_as_lists_with_none_where_a_prompt_has_no_such_field() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        services = {"log_extra", "log_metric", "trainer_state"}  # of TRL, to whoever takes everything
        assert services <= columns.keys()
        seen.update(
            {k: v for k, v in columns.items() if k not in services}, prompts=prompts, completions=completions
        )
        return [1.0] * len(completions)

    rollouts = [
        Rollout(Prompt(0, "p", (1,), {"answer": 3}), 0, (5, 6), (-1.0, -2.0), True, "x"),
        Rollout(Prompt(1, "q", (1, 2), {"hint": "h"}), 1, (7,), (-0.5,), False, "y"),
    ]
    score_rollouts(RewardSet.build(reward), rollouts)
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["x", "y"],
        "answer": [3, None],
        "hint": [None, "h"],
        "prompt_ids": [[1], [1, 2]],
        "completion_ids": [[5, 6], [7]],
        "terminated": [True, False],
    }
