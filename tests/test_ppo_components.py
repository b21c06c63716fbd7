"""The parts of the PPO trainer one by one: config, buffer, algorithms, generator, evaluator, callbacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import InvalidConfigurationError, ToolkitError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import PreferenceConfig, ProcessRewardConfig, RewardModelConfig, SFTConfig
from config.training_config import TrainingConfig
from data_loading.prepared_prompts import PreparedPrompts
from experience_buffer.buffer_manager import ExperienceBuffer, Minibatch
from experience_buffer.data_structures import Experience, Prompt, Rollout
from models.policy_model import PolicyModel
from models.sft_model import build_embedded
from ppo_trainer.algorithms import ALGORITHMS, GRPO, PPO, Algorithm, find_algorithm
from ppo_trainer.callbacks import MOMENTS, Callbacks
from ppo_trainer.credit import Scored, assign_credit
from ppo_trainer.evaluator import EVALUATION_STEP, Evaluator, score_rollouts
from ppo_trainer.generator import Generator
from ppo_trainer.resolution import resolve_config
from reward_kl.reward_computer import token_rewards
from rewards.composition import RewardSet

ROOT = Path(__file__).parents[1]
SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
CONFIG_CLASSES = (
    ModelConfig,
    TrainingConfig,
    PPOConfig,
    SFTConfig,
    RewardModelConfig,
    ProcessRewardConfig,
    PreferenceConfig,
)


# The experience buffer -----------------------------------------------------------------------------------


def experience(prompt_lengths: list[int], lengths: list[int], *, extra_columns: int = 0) -> Experience:
    """Rows whose every number says which row and column it came from: row i, column t is 100 i + t."""
    width = max(p + n for p, n in zip(prompt_lengths, lengths, strict=True)) - 1 + extra_columns
    mask = np.zeros((len(lengths), width), dtype=bool)
    for row, (start, n) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        mask[row, start - 1 : start - 1 + n] = True
    names = 100 * np.arange(len(lengths))[:, None] + np.arange(width + 1)[None]
    numbers = [
        mx.array(names[:, :-1] + offset, dtype=mx.float32) for offset in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    ]
    return Experience(mx.array(names, dtype=mx.int32), mx.array(mask), *numbers)


def rows_of(minibatch: Minibatch) -> list[int]:
    return [first // 100 for part in minibatch.micro_batches for first in part.tokens[:, 0].tolist()]


@pytest.mark.parametrize(("size", "minibatch", "micro"), [(7, 3, 2), (7, None, None), (8, 4, 3), (5, 9, 1)])
def test_every_row_is_dealt_exactly_once_per_epoch(size: int, minibatch: int, micro: int) -> None:
    buffer = ExperienceBuffer(
        experience([2] * size, list(range(1, size + 1))), minibatch_size=minibatch, micro_batch_size=micro
    )
    for epoch in range(3):
        dealt = list(buffer.minibatches(0, 1, epoch))
        assert len(dealt) == buffer.minibatches_per_epoch == -(-size // min(minibatch or size, size))
        assert sorted(row for m in dealt for row in rows_of(m)) == list(range(size))
        assert max(m.n_rows for m in dealt) - min(m.n_rows for m in dealt) <= 1
        assert all(part.size <= (micro or size) for m in dealt for part in m.micro_batches)


def test_the_counts_of_a_minibatch_are_those_of_its_own_rows() -> None:
    """Row i has i + 1 sampled tokens, so a minibatch of rows R has sum(i + 1) of them."""
    buffer = ExperienceBuffer(experience([3] * 7, list(range(1, 8))), minibatch_size=3, micro_batch_size=2)
    for minibatch in buffer.minibatches(5):
        rows = rows_of(minibatch)
        assert minibatch.n_rows == len(rows)
        assert minibatch.n_tokens == sum(row + 1 for row in rows)
        assert minibatch.n_tokens == sum(int(mx.sum(part.mask)) for part in minibatch.micro_batches)


def test_the_order_is_a_function_of_the_seed_and_differs_between_epochs_and_steps() -> None:
    buffer = ExperienceBuffer(experience([2] * 16, [3] * 16), minibatch_size=4)

    def order(*seed: int) -> list[list[int]]:
        return [rows_of(minibatch) for minibatch in buffer.minibatches(*seed)]

    assert order(0, 1, 0) == order(0, 1, 0)
    different = [order(0, 1, 0), order(0, 1, 1), order(0, 2, 0), order(1, 1, 0)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_rows_keeps_what_belongs_together_and_drops_padding_alone() -> None:
    whole = experience([2, 5, 3], [4, 1, 6], extra_columns=4)
    taken = whole.rows([2, 0])
    # Row 2 is the longer: prompt 3 and completion 6 are 9 tokens, so 8 columns.
    assert taken.tokens.shape == (2, 9)
    for name, array in zip(Experience._fields, taken, strict=True):
        if array is None:
            assert name == "rewards"  # only before values are known
            continue
        full = np.array(getattr(whole, name))
        assert np.array_equal(np.array(array), full[[2, 0]][:, : array.shape[1]]), name
        if name != "tokens":
            assert array.shape == (2, 8)
    assert int(mx.sum(taken.mask)) == 4 + 6
    bare = Experience(whole.tokens, whole.mask, whole.advantages, whole.sampler_logprobs).rows([1])
    assert (bare.old_logprobs, bare.ref_logprobs, bare.values, bare.returns) == (None,) * 4


def test_a_row_without_a_sampled_token_can_be_taken_alone() -> None:
    whole = experience([2, 2], [3, 3])
    unscored = whole._replace(mask=whole.mask & mx.array([[True], [False]]))
    taken = unscored.rows([1])
    assert taken.mask.shape[1] >= 1
    assert int(mx.sum(taken.mask)) == 0
    assert taken.tokens.shape[1] == taken.mask.shape[1] + 1


# The table of algorithms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ALGORITHMS.values(), ids=lambda row: row.name)
def test_the_rows_defaults_fill_in_what_nobody_set(row: Algorithm) -> None:
    resolved = resolve_config(PPOConfig(), row)
    columns = row.columns()
    assert {name: getattr(resolved, name) for name in columns} == columns
    untouched = [f.name for f in dataclasses.fields(PPOConfig) if f.name not in columns]
    assert all(getattr(resolved, name) == getattr(PPOConfig(), name) for name in untouched)


def test_a_value_that_was_set_wins_over_the_row_even_when_it_equals_the_declared_default() -> None:
    declared = PPOConfig()
    assert GRPO.defaults["kl_coef"] != declared.kl_coef
    resolved = resolve_config(PPOConfig(kl_coef=declared.kl_coef, group_size=3), GRPO)
    assert (resolved.kl_coef, resolved.group_size) == (declared.kl_coef, 3)
    assert resolve_config(PPOConfig(num_epochs_per_rollout=1), PPO).num_epochs_per_rollout == 1


def test_an_unknown_algorithm_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(InvalidConfigurationError, match='did you mean "grpo"') as caught:
        find_algorithm("gprpo")
    assert all(name in str(caught.value) for name in ALGORITHMS)


def test_a_method_that_compares_a_group_refuses_a_group_of_one() -> None:
    with pytest.raises(InvalidConfigurationError, match=r"group_size: grpo .* at least 2, found 1"):
        resolve_config(PPOConfig(group_size=1), GRPO)
    assert resolve_config(PPOConfig(group_size=1), PPO).group_size == 1


def test_a_row_whose_defaults_name_no_field_is_refused() -> None:
    row = dataclasses.replace(GRPO, name="mine", defaults={"group_sise": 4})
    with pytest.raises(InvalidConfigurationError, match='did you mean "group_size"'):
        resolve_config(PPOConfig(), row)


@pytest.mark.parametrize("row", ALGORITHMS.values(), ids=lambda row: row.name)
def test_credit_is_zero_where_the_mask_is_and_ignores_what_stands_there(row: Algorithm) -> None:
    mask = mx.array([[True, True, False], [True, False, False], [True, True, True], [False, True, True]])
    rewards = mx.array(np.random.default_rng(0).normal(size=(4, 3)), dtype=mx.float32)
    values = rewards * 0.5
    scores, groups = mx.array([1.0, 0.0, 0.5, 2.0]), mx.array([7, 7, 3, 3])

    components = mx.stack([scores, mx.zeros(4)], axis=1)

    def credit(garbage: float) -> tuple[mx.array, mx.array | None]:
        dirty = [mx.where(mask, x, garbage) for x in (rewards, values)]
        batch = Scored(scores, *dirty, mask, groups, components, mx.ones(2), scores * 0.5)
        return assign_credit(row.credit, batch, resolve_config(PPOConfig(), row))

    clean, dirty = credit(0.0), credit(1e6)
    assert mx.array_equal(clean[0], dirty[0])
    assert float(mx.max(mx.abs(mx.where(mask, 0.0, clean[0])))) == 0.0
    assert (clean[1] is not None) == row.needs_critic


def test_ppo_learns_values_from_raw_returns_and_the_policy_from_whitened_advantages() -> None:
    """gamma = lam = 1 makes the return of a token the sum of the rewards from it on."""
    mask = mx.array([[True, True, True], [True, True, False]])
    rewards = mx.array([[0.5, -1.0, 3.0], [2.0, 10.0, 0.0]])
    values = mx.array([[0.2, 0.4, -0.3], [4.0, 1.0, 0.0]])
    config = resolve_config(PPOConfig(gamma=1, lam=1), PPO)
    credit = assign_credit(PPO.credit, Scored(mx.zeros(2), rewards, values, mask, mx.arange(2)), config)
    returns = np.array([[2.5, 2.0, 3.0], [12.0, 10.0, 0.0]])
    assert credit.returns is not None
    np.testing.assert_allclose(np.array(credit.returns), returns, atol=1e-5)
    raw = (returns - np.array(values))[np.array(mask)]
    white = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(np.array(credit.advantages)[np.array(mask)], white, atol=1e-5)


def test_grpo_gives_every_token_of_a_row_its_score_against_its_own_group() -> None:
    """Scores 1, 2, 3 have mean 2 and standard deviation 1; the group of 10 and 10 teaches nothing."""
    mask = mx.array([[True, True], [True, False], [False, True], [True, True], [True, True]])
    scores, groups = mx.array([1.0, 10.0, 2.0, 3.0, 10.0]), mx.array([5, 9, 5, 5, 9])
    rewards = token_rewards(scores, None, mask, 0.0)
    credit = GRPO.credit(Scored(scores, rewards, None, mask, groups), PPOConfig())
    expected = np.array([[-1, -1], [0, 0], [0, 0], [1, 1], [0, 0]]) / (1 + 1e-4)
    np.testing.assert_allclose(np.array(credit.advantages), expected * np.array(mask), atol=1e-6)
    assert credit.returns is None


# Generator -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return PolicyModel(build_embedded(SMALLEST, seed=3), TrainingConfig(model_name="embedded"))


@pytest.fixture(scope="module")
def prompts(policy: PolicyModel) -> list[Prompt]:
    texts = ["a", "two words", "a", "longer than the others", "?"]
    return list(PreparedPrompts(policy.tokenizer, texts, max_prompt_length=64))


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


# Evaluator -----------------------------------------------------------------------------------------------


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


def test_evaluation_shares_no_random_numbers_with_any_training_step(
    policy: PolicyModel, prompts: list[Prompt]
) -> None:
    sampler = generator(policy, group_size=1)
    evaluated = sampled(sampler.generate(prompts, EVALUATION_STEP))
    assert all(evaluated != sampled(sampler.generate(prompts, step)) for step in range(4))


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


# Callbacks -----------------------------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.heard.append(("step", step))

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        self.heard.append(("epoch", epoch))


def test_an_object_hears_its_moments_and_a_function_the_end_of_each_epoch() -> None:
    heard: list[tuple[int, Mapping[str, Any]]] = []
    listener = Listener()
    told = Callbacks([listener, lambda epoch, metrics: heard.append((epoch, metrics))])
    told("on_train_begin", object())
    told("on_step_end", 1, {})
    told("on_epoch_end", 0, {"avg_reward": 1.0})
    told("on_train_end", {})
    assert listener.heard == [("step", 1), ("epoch", 0)]
    assert heard == [(0, {"avg_reward": 1.0})]
    assert not told.stop_requested


def test_a_callable_object_with_moments_is_told_its_moments_alone() -> None:
    class Both(Listener):
        def __call__(self, epoch: int, metrics: Mapping[str, Any]) -> None:
            self.heard.append(("called", epoch))

    both = Both()
    Callbacks([both])("on_epoch_end", 2, {})
    assert both.heard == [("epoch", 2)]


@pytest.mark.parametrize(("answer", "stops"), [(False, True), (None, False), (0, False), (True, False)])
def test_only_the_answer_false_stops(answer: Any, stops: bool) -> None:
    told = Callbacks([lambda epoch, metrics: answer, lambda epoch, metrics: None])
    told("on_epoch_end", 0, {})
    assert told.stop_requested is stops


def test_everyone_is_told_even_after_someone_asked_to_stop_and_exceptions_pass_through() -> None:
    heard = []
    told = Callbacks([lambda *_: False, lambda epoch, _: heard.append(epoch)])
    told("on_epoch_end", 3, {})
    assert heard == [3]

    def broken(epoch: int, metrics: Mapping[str, Any]) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Callbacks([broken])("on_epoch_end", 0, {})


@pytest.mark.parametrize("wrong", [3, "print", object(), {"on_step_end": print}])
def test_what_is_no_callback_is_refused_with_the_moments_there_are(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"callbacks: .* neither a function f\(epoch, metrics\)") as caught:
        Callbacks([wrong])
    assert all(moment in str(caught.value) for moment in MOMENTS)


# Config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CONFIG_CLASSES)
def test_a_config_is_frozen_compared_by_value_and_made_by_keyword(cls: type) -> None:
    config = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        cls("positional")
    assert config == cls()


@pytest.mark.parametrize("cls", CONFIG_CLASSES)
def test_every_field_has_one_line_of_documentation_and_every_default_is_valid(cls: type) -> None:
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        assert info.description, name
        assert "\n" not in info.description, name
    values = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
    assert cls(**values) == cls()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: PPOConfig(learning_rat=1),
            r'PPOConfig has no field "learning_rat"; did you mean "learning_rate"',
        ),
        (lambda: PPOConfig(zzz=1), r'PPOConfig has no field "zzz"$'),
        (
            lambda: PPOConfig(batch_size=True),
            r"batch_size: true/false where a number is expected \(found True\)",
        ),
        (lambda: PPOConfig(lora_layers=False), "lora_layers: true/false where a number is expected"),
        (lambda: PPOConfig(kl_coef=True), "kl_coef: true/false where a number is expected"),
        (lambda: PPOConfig(batch_size=0), r"batch_size: .*greater than 0 \(found 0\)"),
        (lambda: PPOConfig(batch_size=1.5), r"batch_size: .*\(found 1.5\)"),
        (lambda: PPOConfig(learning_rate=float("nan")), r"learning_rate: .*\(found nan\)"),
        (lambda: PPOConfig(learning_rate=float("inf")), r"learning_rate: .*\(found inf\)"),
        (lambda: PPOConfig(gamma=1.01), r"gamma: .*less than or equal to 1 \(found 1.01\)"),
        (lambda: PPOConfig(adam_beta1=1), r"adam_beta1: .*less than 1 \(found 1\)"),
        (lambda: PPOConfig(lora_layers=0), r"lora_layers: .*\(found 0\)"),
        (lambda: PPOConfig(seed=2**64), r"seed: .*\(found 18446744073709551616\)"),
        (lambda: PPOConfig(temperature=0), r"temperature: .*\(found 0\)"),
        (lambda: PPOConfig(top_p=0), r"top_p: .*\(found 0\)"),
        (
            lambda: PPOConfig(value_network="both"),
            r"value_network: .*'separate' or 'shared' \(found 'both'\)",
        ),
        (lambda: PPOConfig(model_name=None), r"model_name: .*\(found None\)"),
        (lambda: PPOConfig(batch_size=0, gamma=2), r"batch_size: .*; gamma: "),
        (lambda: PPOConfig(top_p=0.9), "top_p = 0.9: .*allow_truncated_sampling"),
        (lambda: PPOConfig(top_k=5, min_p=0.1), "top_k = 5 and min_p = 0.1: "),
        (
            lambda: ModelConfig(hidden_size=30, num_attention_heads=4),
            r"hidden_size \(30\) must be a multiple",
        ),
        (lambda: ModelConfig(num_key_value_heads=5), r"num_attention_heads \(12\) must be a multiple"),
        (lambda: ModelConfig(hidden_size=12, num_attention_heads=4), "rotary positions need it even"),
        (lambda: RewardModelConfig(list_size=1), r"list_size: .*2 \(found 1\)"),
    ],
)
def test_a_mistake_comes_back_as_one_sentence_that_names_field_and_value(
    make: Callable[[], Any], sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence) as caught:
        make()
    assert isinstance(caught.value, ToolkitError)
    assert "\n" not in str(caught.value)


def test_truncated_sampling_is_possible_for_who_asks_for_it() -> None:
    assert PPOConfig(top_p=0.9, allow_truncated_sampling=True).top_p == 0.9


def test_replace_changes_what_it_is_told_checks_it_and_leaves_the_original() -> None:
    config = PPOConfig(batch_size=3, group_size=2)
    changed = config.replace(batch_size=5, seed=1)
    assert (changed.batch_size, changed.group_size, changed.seed) == (5, 2, 1)
    assert (config.batch_size, config.seed) == (3, 0)
    assert type(changed) is PPOConfig
    with pytest.raises(InvalidConfigurationError, match='did you mean "batch_size"'):
        config.replace(batchsize=1)
    with pytest.raises(InvalidConfigurationError, match="batch_size"):
        config.replace(batch_size=0)


def test_what_was_set_on_purpose_stays_so_through_replace_and_defaults() -> None:
    """kl_coef is set, batch_size replaced, group_size filled in: later defaults move only the last."""
    config = PPOConfig(kl_coef=0.1).with_defaults({"group_size": 4, "kl_coef": 9.0}).replace(batch_size=7)
    assert (config.kl_coef, config.batch_size, config.group_size) == (0.1, 7, 4)
    later = config.with_defaults({"kl_coef": 5.0, "batch_size": 6, "group_size": 2})
    assert (later.kl_coef, later.batch_size, later.group_size) == (0.1, 7, 2)


def test_with_defaults_checks_names_and_values() -> None:
    with pytest.raises(InvalidConfigurationError, match='did you mean "group_size"'):
        PPOConfig().with_defaults({"group_sizes": 4})
    with pytest.raises(InvalidConfigurationError, match="gamma"):
        PPOConfig().with_defaults({"gamma": 4})


def test_as_dict_is_plain_and_makes_the_same_config_again() -> None:
    config = PPOConfig(embedded_model=SMALLEST, reward_weights=[1.0, 2.0], kl_coef=0.3)
    plain = config.as_dict()
    assert plain["embedded_model"]["hidden_size"] == 32
    assert PPOConfig(**plain) == config


def test_no_two_sections_share_a_field_name() -> None:
    """A config file's sections are headings only, so the model's fields must not repeat the trainer's."""
    trainers = {f.name for cls in CONFIG_CLASSES[1:] for f in dataclasses.fields(cls)}
    assert not trainers & {f.name for f in dataclasses.fields(ModelConfig)}


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match="value_warmup_steps: a head on the policy's trunk"):
        resolve_config(PPOConfig(value_network="shared", value_warmup_steps=2), find_algorithm("ppo"))
    with pytest.raises(InvalidConfigurationError, match=r"kl_target: .* 0 stays 0"):
        resolve_config(PPOConfig(kl_target=6.0, kl_coef=0.0), find_algorithm("ppo"))


def test_defaults_of_several_sources_add_up_and_never_beat_what_was_set() -> None:
    config = (
        PPOConfig(gamma=0.5).with_defaults({"group_size": 3, "gamma": 0.1}).with_defaults({"kl_coef": 0.5})
    )
    assert (config.gamma, config.group_size, config.kl_coef) == (0.5, 3, 0.5)
    assert resolve_config(config, find_algorithm("grpo")).group_size == 8  # a later source wins
    assert resolve_config(config.replace(group_size=3), find_algorithm("grpo")).group_size == 3
