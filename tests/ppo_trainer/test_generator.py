"""Groups are handed over whole, once, while others are still being decoded; texts are the tokenizer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.policy_model import PolicyModel
from ppo_trainer.generator import Generator


@pytest.fixture
def make_generator(tiny: Any, make_config: Callable[..., Any]) -> Callable[..., Generator]:
    def make(**options: Any) -> Generator:
        config = make_config(PPOConfig, max_new_tokens=12, group_size=3, **options)
        policy = PolicyModel(tiny, config)
        policy.end_ids = frozenset(range(0, 259, 9))
        return Generator(policy, config)

    return make


PROMPTS = [
    Prompt(i, "", ids, {}) for i, ids in enumerate([(1, 2, 3), (4, 5, 6, 7, 8), (1, 2, 3), (9,), (10, 11)])
]


@pytest.mark.parametrize("places", [1, 2, 4, 7, 100])
def test_each_group_is_told_of_once_and_whole(make_generator: Callable[..., Generator], places: int) -> None:
    told: list[list[Rollout]] = []
    generator = make_generator(rollout_batch_size=places)
    rollouts = generator.generate(PROMPTS, 1, on_group=told.append)
    groups = [rollouts[start : start + 3] for start in range(0, 15, 3)]
    assert sorted(told, key=lambda group: group[0].prompt.index) == groups
    assert [(r.prompt.index, r.member) for r in rollouts] == [(i, m) for i in range(5) for m in range(3)]
    assert rollouts == generator.generate(PROMPTS, 1)


def test_a_group_is_told_of_while_others_are_decoded(
    make_generator: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time: when the first group is told, the other twelve rows have made no text yet."""
    generator = make_generator(rollout_batch_size=1)
    texts = []
    plain = Generator._rollout

    def counted(self: Generator, *arguments: Any) -> Rollout:
        rollout = plain(self, *arguments)
        texts.append(rollout)
        return rollout

    monkeypatch.setattr(Generator, "_rollout", counted)
    when: list[int] = []
    generator.generate(PROMPTS, 1, on_group=lambda group: when.append(len(texts)))
    assert when == [3, 6, 9, 12, 15]


def test_members_may_be_counted_from_elsewhere_and_no_prompts_are_no_rollouts(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator(rollout_batch_size=4)
    told: list[list[Rollout]] = []
    whole = generator.generate(PROMPTS, 1, group_size=5)
    rest = generator.generate(PROMPTS, 1, group_size=2, first_member=3, on_group=told.append)
    last = [r for r in whole if r.member >= 3]
    assert [(r.prompt, r.member, r.completion_ids) for r in rest] == [
        (r.prompt, r.member, r.completion_ids) for r in last
    ]
    assert sorted(len(group) for group in told) == [2] * 5
    assert generator.generate([], 1, on_group=told.append) == []
    assert len(told) == 5
