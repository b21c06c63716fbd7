"""Dead groups are replaced: by whom, judged by what, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from monitoring.metrics_file import read_metrics
from ppo_trainer.dynamic_sampling import collect_live_groups
from ppo_trainer.ppo_trainer import PPOTrainer
from rewards.scored_batch import ScoredBatch
from tests.tabular import Bandit, table_model, token_id

PROMPTS = [Prompt(i, f"p{i}", (i + 1,), {}) for i in range(6)]
CONFIG = PPOConfig(group_size=2, dynamic_sampling=True, dynamic_sampling_max_batches=4)


def generate(prompts: Sequence[Prompt], first_member: int) -> list[Rollout]:
    return [
        Rollout(prompt, first_member + m, (7,), (-1.0,), True, f"{prompt.index}.{first_member + m}")
        for prompt in prompts
        for m in range(2)
    ]


def scoring(live: Callable[[Rollout], bool]) -> Callable[[Sequence[Rollout]], ScoredBatch]:
    """1 and 0 in the groups of ``live`` prompts, 0 and 0 in the others; a second reward differs everywhere."""

    def score(rollouts: Sequence[Rollout]) -> ScoredBatch:
        total = np.array([float(live(r) and r.member % 2) for r in rollouts], dtype=np.float32)
        other = np.array([float(r.member) for r in rollouts], dtype=np.float32)
        return ScoredBatch(total, {"right": total, "length": other})

    return score


def collect(live: Callable[[Rollout], bool], config: PPOConfig = CONFIG, count: int = 3) -> Any:
    return collect_live_groups(PROMPTS[:count], PROMPTS, generate, scoring(live), config)


def test_live_groups_stay_and_dead_ones_are_replaced_by_prompts_that_were_not_used() -> None:
    rollouts, scored, metrics = collect(lambda r: r.prompt.index in (0, 2, 4, 5))
    assert [r.text for r in rollouts] == ["0.0", "0.1", "2.0", "2.1", "4.0", "4.1"]
    assert scored.total.tolist() == [0, 1] * 3
    assert scored.components["length"].tolist() == [0, 1] * 3
    # 3 groups at first; 3 is tried for 1 and is dead; then 4.
    assert metrics == {
        "dynamic_sampling/acceptance_rate": 3 / 5,
        "dynamic_sampling/sampled_groups": 5.0,
        "dynamic_sampling/live_groups": 3.0,
        "reward_errors": 0.0,
    }


def test_rows_on_which_a_reward_failed_are_counted_wherever_they_went_and_make_no_group_live() -> None:
    """One of three groups fails throughout and is replaced; the judge alone would call it live."""

    def score(rollouts: Sequence[Rollout]) -> ScoredBatch:
        failed = np.array([r.prompt.index == 1 for r in rollouts])
        judged = np.array([float(r.member % 2) for r in rollouts], dtype=np.float32)
        return ScoredBatch(np.where(failed, np.nan, judged), {"right": judged}, failed)

    for judge in (None, "right"):
        config = CONFIG.replace(dynamic_sampling_reward=judge)
        rollouts, scored, metrics = collect_live_groups(PROMPTS[:3], PROMPTS, generate, score, config)
        assert [r.prompt.index for r in rollouts] == [0, 0, 2, 2, 3, 3]
        assert not np.isnan(scored.total).any()
        assert metrics["reward_errors"] == 2.0


def test_a_prompt_that_comes_again_gets_other_random_numbers_and_its_group_stays_one() -> None:
    rollouts, _, _ = collect(lambda r: r.prompt.index == 0 or r.member >= 2)
    by_prompt: dict[int, list[int]] = {}
    for r in rollouts:
        by_prompt.setdefault(r.prompt.index, []).append(r.member)
    assert by_prompt[0] == [0, 1]
    assert len(by_prompt) == 3
    assert all(members == [2, 3] for index, members in by_prompt.items() if index != 0)


def test_the_cap_ends_the_search_with_fewer_groups() -> None:
    rollouts, _, metrics = collect(lambda r: r.prompt.index == 1)
    assert [r.prompt.index for r in rollouts] == [1, 1]
    assert metrics["dynamic_sampling/sampled_groups"] == 3 + 2 * 3  # four batches in all


def test_without_any_live_group_the_first_batch_comes_back_as_it_was() -> None:
    rollouts, scored, metrics = collect(lambda r: False)
    assert [r.prompt.index for r in rollouts] == [0, 0, 1, 1, 2, 2]
    assert not scored.total.any()
    assert metrics["dynamic_sampling/acceptance_rate"] == 0


def test_one_named_reward_may_be_the_judge() -> None:
    config = CONFIG.replace(dynamic_sampling_reward="length")
    rollouts, _, metrics = collect(lambda r: False, config)
    assert len(rollouts) == 6
    assert metrics["dynamic_sampling/acceptance_rate"] == 1


def test_a_judge_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = PPOConfig(
        algorithm="dapo",
        model_name=str(tmp_path / "nowhere"),
        dynamic_sampling_reward="sequential_digit",
    )
    with pytest.raises(InvalidConfigurationError, match='did you mean "sequential_digits"'):
        PPOTrainer(config, reward_model="sequential_digits")


# Through the trainer ---------------------------------------------------------------------------------------


def trainer_for(folder: Path, reward: Any, **options: Any) -> PPOTrainer:
    config = PPOConfig(
        model_name="embedded",
        fine_tune_type="full",
        output_dir=str(folder / "run"),
        verbose=False,
        **{
            "algorithm": "dapo",
            "max_new_tokens": 3,
            "batch_size": 2,
            "group_size": 8,
            "learning_rate": 0.05,
            **options,
        },
    )
    letters = "abcdef"
    return PPOTrainer(
        config, model=table_model({letter: [0.0] * 6 for letter in letters}, letters), reward_model=reward
    )


def vowels_if_possible(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Hopeless for the prompts b, c and d."""
    return [
        float(prompt in "aef") * sum(letter in "ae" for letter in text) / 3
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def test_every_step_has_its_number_of_live_groups_although_half_of_the_prompts_are_hopeless(
    tmp_path: Path,
) -> None:
    trainer = trainer_for(tmp_path, vowels_if_possible)
    history = trainer.train(list("abcdef"), num_epochs=6)["history"]
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "kind" not in m]
    assert len(steps) == 18
    assert all(m["dynamic_sampling/live_groups"] == 2 for m in steps)
    assert all(m["frac_reward_zero_std"] == 0 for m in steps)
    rates = [m["dynamic_sampling/acceptance_rate"] for m in steps]
    assert 0.2 < np.mean(rates) < 0.95
    assert history[-1]["avg_reward"] > history[0]["avg_reward"] + 0.1


def test_groups_are_judged_by_what_the_reward_said_and_not_by_shaped_scores(tmp_path: Path) -> None:
    """Lengths differ, so penalties do; everything is equally wrong, so nothing is to be learned."""
    trainer = trainer_for(
        tmp_path,
        lambda completions, **columns: [0.0] * len(completions),
        dynamic_sampling_max_batches=2,
        missing_end_penalty=1.0,
        overlong_buffer=1.0,
    )
    # Half of the answers end at once: the end token is as likely as all letters together.
    end = min(trainer.policy.end_ids)
    table = np.array(trainer.policy.model.lm_head.weight)
    table[end] = np.log(6)
    trainer.policy.model.lm_head.weight = mx.array(table)
    before = np.array(trainer.policy.model.lm_head.weight)
    trainer.train(list("ab"), num_epochs=2)
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "kind" not in m]
    assert all(0 < m["completions/clipped_ratio"] < 1 for m in steps)
    assert all(m["dynamic_sampling/live_groups"] == 0 for m in steps)
    np.testing.assert_array_equal(np.array(trainer.policy.model.lm_head.weight), before)


def test_a_seed_determines_what_is_sampled(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        trainer = trainer_for(tmp_path / name, vowels_if_possible)
        trainer.train(list("abcdef"), num_epochs=2)
        runs.append(np.array(trainer.policy.model.lm_head.weight))
    np.testing.assert_array_equal(*runs)


# A world in which a score is a function of prompt and member -----------------------------------------------

G = 3


class World:
    """Completions are numbered by member, and a table says which score each one gets."""

    def __init__(self, score: Callable[[int, int], float], group_size: int = G) -> None:
        self.score_of = score
        self.group_size = group_size
        self.calls: list[tuple[int, list[int]]] = []  # first member, prompts
        self.batches = 0

    def generate(self, prompts: Sequence[Prompt], first: int) -> list[Rollout]:
        self.calls.append((first, [p.index for p in prompts]))
        members = range(first, first + self.group_size)
        return [Rollout(p, m, (m,), (0.0,), True, f"{p.index}/{m}") for p in prompts for m in members]

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        self.batches += 1
        total = np.array([self.score_of(r.prompt.index, r.member) for r in rollouts], dtype=np.float32)
        return ScoredBatch(total, {"own": total, "member": np.array([float(r.member) for r in rollouts])})

    def collect(
        self, prompts: Sequence[int], reserve: Sequence[int], **options: Any
    ) -> tuple[list[Rollout], ScoredBatch, dict[str, float]]:
        config = PPOConfig(group_size=self.group_size, **options)
        return collect_live_groups(
            [Prompt(i, f"p{i}", (1,), {}) for i in prompts],
            [Prompt(i, f"p{i}", (1,), {}) for i in reserve],
            self.generate,
            self.score,
            config,
        )


def even_prompts_live(prompt: int, member: int) -> float:
    """In odd prompts everything is wrong; in even ones the last member of three is right."""
    return float(prompt % 2 == 0 and member % G == G - 1)


def names(rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
    return [(r.prompt.index, r.member) for r in rollouts]


def group(prompt: int, first: int = 0) -> list[tuple[int, int]]:
    return [(prompt, first + m) for m in range(G)]


def test_live_groups_stay_in_order_and_dead_ones_give_way_to_the_reserve() -> None:
    world = World(even_prompts_live)
    rollouts, scored, metrics = world.collect([0, 1, 2, 3], [0, 1, 2, 3, 5, 4, 7, 6, 8])
    # 0 and 2 live at once; 5 and 4 are tried for 1 and 3; 7 for 5; then 6.
    assert [indices for _, indices in world.calls] == [[0, 1, 2, 3], [5, 4], [7], [6]]
    assert names(rollouts) == [*group(0), *group(2), *group(4), *group(6)]
    assert scored.total.tolist() == [0, 0, 1] * 4
    assert scored.components["member"].tolist() == [0, 1, 2] * 4
    assert metrics == {
        "dynamic_sampling/acceptance_rate": 4 / 8,
        "dynamic_sampling/sampled_groups": 8.0,
        "dynamic_sampling/live_groups": 4.0,
        "reward_errors": 0.0,
    }


def test_rollouts_and_scores_stay_together_where_a_batch_mixes_numbers_of_members() -> None:
    """A second try at some prompts beside a first one at others; each row's score is a function of its name."""
    world = World(lambda prompt, member: 100.0 * prompt + member if prompt == 2 or member >= G else 7.0)
    rollouts, scored, _ = world.collect([0, 1, 2], [3, 0, 1, 2, 3])
    expected = [100.0 * r.prompt.index + r.member for r in rollouts]
    assert scored.total.tolist() == expected
    assert scored.components["own"].tolist() == expected
    # 3 and 0 are tried for 0 and 1; the group of 0 is a new one.
    assert world.calls[1:3] == [(0, [3]), (3, [0])]
    for row in range(0, len(rollouts), G):
        assert len({r.prompt.index for r in rollouts[row : row + G]}) == 1
    assert len({r.prompt.index for r in rollouts}) == 3  # one group of each: group ids are the prompts'


def test_a_prompt_sampled_again_in_a_step_goes_on_counting_its_members() -> None:
    world = World(lambda prompt, member: 0.0)
    world.collect([0, 1], [0, 1], dynamic_sampling_max_batches=4)
    assert [first for first, _ in world.calls] == [0, 3, 6, 9]
    assert [sorted(indices) for _, indices in world.calls] == [[0, 1]] * 4


@pytest.mark.parametrize("most", [1, 2, 3])
def test_not_more_batches_are_sampled_than_the_cap(most: int) -> None:
    """Each batch has one live group of the two it is asked for, as long as there is an even prompt in it."""
    world = World(even_prompts_live)
    rollouts, _, metrics = world.collect([0, 1], [3, 5, 7, 9], dynamic_sampling_max_batches=most)
    assert world.batches == most
    assert names(rollouts) == group(0)
    assert metrics["dynamic_sampling/live_groups"] == 1.0
    assert metrics["dynamic_sampling/acceptance_rate"] == 1 / (1 + most)


def test_a_live_prompt_is_not_sampled_again_however_small_the_reserve() -> None:
    world = World(even_prompts_live)
    rollouts, _, _ = world.collect([0, 1], [0, 1], dynamic_sampling_max_batches=5)
    assert [indices for _, indices in world.calls] == [[0, 1], [1], [1], [1], [1]]
    assert names(rollouts) == group(0)


def test_an_empty_reserve_ends_it() -> None:
    world = World(even_prompts_live)
    assert names(world.collect([0, 1], [])[0]) == group(0)
    assert world.batches == 1


@pytest.mark.parametrize(
    ("scores", "live"),
    [
        ([np.nan, np.nan, np.nan], False),
        ([np.nan, 1.0, np.nan], False),
        ([np.nan, 1.0, 1.0], False),
        ([np.nan, 1.0, 0.0], True),
        ([0.1, 0.1, 0.1], False),
        ([0.1, 0.1, 0.1001], True),
        ([-5.0, -5.0, -5.0], False),
    ],
)
def test_a_group_is_live_if_two_scorable_completions_differ(scores: list[float], live: bool) -> None:
    world = World(lambda prompt, member: scores[member % G])
    _, _, metrics = world.collect([0], [], dynamic_sampling_max_batches=1)
    assert metrics["dynamic_sampling/live_groups"] == float(live)


# What a step teaches, and what it must not -----------------------------------------------------------------

HOPEFUL, HOPELESS = "abcd", "efgh"


def right(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Answers u of hopeful prompts are right; nothing answers a hopeless one."""
    return [float(p in HOPEFUL and c[:1] == "u") for p, c in zip(prompts, completions, strict=True)]


def run_of(folder: Path, reward: Any = right, algorithm: str = "dapo", **options: Any) -> PPOTrainer:
    """A table over which every prompt answers u or v evenly."""
    config = PPOConfig(
        algorithm=algorithm,
        model_name="embedded",
        fine_tune_type="full",
        output_dir=str(folder / f"run-{len(list(folder.iterdir()))}"),
        verbose=False,
        **{
            "dynamic_sampling": True,
            "max_new_tokens": 1,
            "overlong_buffer": 0.0,
            "batch_size": 2,
            "group_size": 4,
            "learning_rate": 0.05,
            **options,
        },
    )
    table = {letter: [0.0, 0.0] for letter in HOPEFUL + HOPELESS + "uv"}
    return PPOTrainer(config, model=table_model(table, "uv"), reward_model=reward)


class Watch:
    """Keeps the metrics of each step and the weights after it."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, Any]] = []
        self.tables: list[np.ndarray] = []
        self.trainer: PPOTrainer | None = None

    def on_train_begin(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        assert self.trainer is not None
        self.metrics.append(metrics)
        self.tables.append(table_of(self.trainer))


def table_of(trainer: PPOTrainer) -> np.ndarray:
    return np.array(trainer.policy.model.lm_head.weight)


def test_with_half_of_the_prompts_hopeless_every_step_learns_from_a_full_batch(tmp_path: Path) -> None:
    seen, met = Watch(), []

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        met.append(list(prompts))
        return right(prompts, completions)

    trainer = run_of(tmp_path, reward, learning_rate=1e-4, group_size=8)
    trainer.train(list(HOPEFUL + HOPELESS), num_epochs=2, callbacks=[seen])
    assert [m["dynamic_sampling/live_groups"] for m in seen.metrics] == [2.0] * 8
    assert all(0 < m["reward"] < 1 for m in seen.metrics)
    rates = [m["dynamic_sampling/acceptance_rate"] for m in seen.metrics]
    assert min(rates) < 1  # some were replaced
    assert 0.3 < np.mean(rates) < 0.7  # about half
    assert trainer.episodes == sum(len(batch) for batch in met)
    assert sum(m["dynamic_sampling/sampled_groups"] for m in seen.metrics) == trainer.episodes / 8
    # What was learned concerns the hopeful alone: nothing else has a gradient.
    moved = np.abs(seen.tables[-1] - table_of(run_of(tmp_path))).max(axis=0)
    assert all(moved[token_id(letter)] == 0 for letter in HOPELESS)
    assert all(moved[token_id(letter)] > 0 for letter in HOPEFUL)


def test_completions_of_a_second_try_have_random_numbers_of_their_own(tmp_path: Path) -> None:
    """One prompt, four tries of eight fair coins: two of them alike would be one in 128."""
    met = []

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        met.append("".join(completions))
        return [0.0] * len(completions)

    options = {"group_size": 16, "batch_size": 1, "dynamic_sampling_max_batches": 4}
    run_of(tmp_path, reward, **options).train(["e"], num_epochs=1)
    assert len(met) == 4
    assert len(set(met)) == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_coef": 0.5}, {"entropy_coef": 0.1}, {"weight_decay": 0.1}],
    ids=["plain", "kl", "entropy", "decay"],
)
def test_a_step_without_a_live_group_moves_no_weight(tmp_path: Path, options: dict[str, Any]) -> None:
    """Not even by what the optimiser remembers of the steps before it, nor by what needs no score."""
    calls = []

    def first_step_only(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return right(prompts, completions) if len(calls) == 1 else [0.0] * len(completions)

    seen = Watch()
    trainer = run_of(tmp_path, first_step_only, group_size=16, dynamic_sampling_max_batches=1, **options)
    start = table_of(trainer)
    trainer.train(list(HOPEFUL), num_epochs=2, callbacks=[seen])
    assert [m["dynamic_sampling/live_groups"] for m in seen.metrics] == [2.0, 0.0, 0.0, 0.0]
    assert np.abs(seen.tables[0] - start).max() > 1e-3
    for table in seen.tables[1:]:
        assert table.tobytes() == seen.tables[0].tobytes()


def test_groups_are_judged_by_the_reward_that_is_named(tmp_path: Path) -> None:
    """``noise`` differs in every group and ``right`` in hopeful ones."""

    def noise(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [0.01 * (c[:1] == "u") for c in completions]

    rates = []
    for judge in (None, "noise", "right"):
        seen = Watch()
        trainer = run_of(
            tmp_path, [right, noise], group_size=8, dynamic_sampling_reward=judge, learning_rate=1e-6
        )
        trainer.train(list(HOPEFUL + HOPELESS), num_epochs=1, callbacks=[seen])
        rates.append(np.mean([m["dynamic_sampling/acceptance_rate"] for m in seen.metrics]))
    assert rates[0] == rates[1] > 0.9
    assert rates[2] < 0.75
    with pytest.raises(InvalidConfigurationError, match="dynamic_sampling_reward"):
        run_of(tmp_path, [right, noise], dynamic_sampling_reward="wrong")


def test_the_bandit_still_reaches_its_optimum(tmp_path: Path) -> None:
    """One prompt that is always live: dynamic sampling changes nothing, to the last bit."""
    bandit = Bandit([0.0, 0.5], [1.0, 0.0])
    one, other = (
        bandit.learn(tmp_path, "dapo", steps=5, kl_coef=0.5, dynamic_sampling=on) for on in (False, True)
    )
    assert table_of(one).tobytes() == table_of(other).tobytes()
