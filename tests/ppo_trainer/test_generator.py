"""Groups are handed over whole, once, while others are still being decoded; texts are the tokenizer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.policy_model import PolicyModel
from ppo_trainer.evaluator import EVALUATION_STEP
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


def sampled(rollouts: list[Rollout]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(r.prompt.index, r.member): r.completion_ids for r in rollouts}


def generator(policy: PolicyModel, **options: Any) -> Generator:
    return Generator(policy, PPOConfig(**{"max_new_tokens": 6, "group_size": 3, **options}))


def test_a_completion_depends_on_seed_step_prompt_and_member_and_on_nothing_else(
    policy: PolicyModel, prompts: list[Prompt]
) -> None:
    together = sampled(generator(policy).generate(prompts, step=4))
    assert len(together) == len(prompts) * 3
    assert together == sampled(generator(policy).generate(prompts, step=4))
    assert together == sampled(generator(policy).generate(prompts[::-1], step=4))
    assert together == sampled(generator(policy, rollout_batch_size=2).generate(prompts, step=4))
    for prompt in prompts:
        alone = sampled(generator(policy, group_size=2).generate([prompt], step=4))
        assert alone == {key: together[key] for key in alone}
    assert together != sampled(generator(policy).generate(prompts, step=5))
    assert together != sampled(generator(policy, seed=1).generate(prompts, step=4))


def test_members_of_a_group_and_equal_prompts_at_different_places_differ(
    policy: PolicyModel, prompts: list[Prompt]
) -> None:
    completions = sampled(generator(policy).generate(prompts, step=1))
    assert prompts[0].ids == prompts[2].ids
    of_the_same_text = [ids for (prompt, _), ids in completions.items() if prompt in (0, 2)]
    assert len(set(of_the_same_text)) == 6


def test_rollouts_come_in_the_order_of_the_prompts_with_the_groups_together(
    policy: PolicyModel, prompts: list[Prompt]
) -> None:
    rollouts = generator(policy, rollout_batch_size=4).generate(prompts, step=1)
    assert [(r.prompt.index, r.member) for r in rollouts] == [(p, m) for p in range(5) for m in range(3)]
    for rollout in rollouts:
        assert len(rollout.logprobs) == len(rollout.completion_ids) <= 6
        assert rollout.terminated == (rollout.completion_ids[-1] in policy.end_ids)
        assert not rollout.terminated or len(set(rollout.completion_ids) & policy.end_ids) == 1
        assert rollout.text == policy.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)


def test_greedy_completions_do_not_depend_on_the_seed(policy: PolicyModel, prompts: list[Prompt]) -> None:
    greedy = [
        sampled(generator(policy, seed=seed).generate(prompts, step=seed, temperature=0, group_size=1))
        for seed in (0, 1)
    ]
    assert greedy[0] == greedy[1]


def test_evaluation_shares_no_random_numbers_with_any_training_step(
    policy: PolicyModel, prompts: list[Prompt]
) -> None:
    sampler = generator(policy, group_size=1)
    evaluated = sampled(sampler.generate(prompts, EVALUATION_STEP))
    assert all(evaluated != sampled(sampler.generate(prompts, step)) for step in range(4))
