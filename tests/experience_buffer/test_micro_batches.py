"""Micro-batches by tokens, and rows that teach nothing: cheaper passes, the same update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import ExperienceBuffer, Minibatch
from experience_buffer.data_structures import Experience, Prompt, Rollout
from ppo_trainer.ppo_trainer import PPOTrainer
from ppo_trainer.updater import Updater
from rewards.scored_batch import ScoredBatch
from tests.tabular import table_model, token_id

Groups = Sequence[tuple[int, Sequence[int]]]


def experience(groups: Groups, *, unscored: Sequence[int] = (), shuffle: int | None = None) -> Experience:
    """``groups``: length of a prompt, lengths of its completions. A row's advantages are its number.

    ``unscored``: rows whose mask is empty. ``shuffle``: a seed to order the rows by.
    """
    rows = [(number, prompt, size) for number, (prompt, sizes) in enumerate(groups) for size in sizes]
    width = max(prompt + size for _, prompt, size in rows)
    tokens, mask = np.zeros((len(rows), width), dtype=np.int32), np.zeros((len(rows), width - 1), dtype=bool)
    for row, (number, prompt, size) in enumerate(rows):
        tokens[row, :prompt] = 1000 + number
        tokens[row, prompt : prompt + size] = np.arange(size) + row
        mask[row, prompt - 1 : prompt - 1 + size] = row not in unscored
    order = np.arange(len(rows)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(rows))
    names = np.broadcast_to(np.arange(len(rows), dtype=np.float32)[:, None], mask.shape)
    zeros = mx.zeros(mask.shape)
    return Experience(mx.array(tokens[order]), mx.array(mask[order]), mx.array(names[order]), zeros)


def dealt(minibatch: Minibatch) -> list[list[int]]:
    """The rows of each micro-batch, by their numbers."""
    return [[int(x) for x in part.advantages[:, 0].tolist()] for part in minibatch.micro_batches]


def packed(groups: Groups, limit: int, **more: Any) -> list[list[int]]:
    (minibatch,) = ExperienceBuffer(experience(groups, **more), micro_batch_tokens=limit).minibatches(0)
    return dealt(minibatch)


# Packing -------------------------------------------------------------------------------------------------

#: Prompt 5 and three completions of 4, of each of which 3 tokens are read: 5 + 9 = 14 tokens.
GROUP = (5, [4, 4, 4])


@pytest.mark.parametrize(
    ("groups", "limit", "expected"),
    [
        ([GROUP, GROUP], 28, [[0, 1, 2, 3, 4, 5]]),
        ([GROUP, GROUP], 27, [[0, 1, 2], [3, 4, 5]]),
        # The first row of the second group would fit in (8 + 8), the group would not (8 + 14), but does by itself.
        ([(5, [4]), GROUP], 20, [[0], [1, 2, 3]]),
        ([(5, [4]), GROUP], 22, [[0, 1, 2, 3]]),
        # A group that no pass has room for is torn wherever a pass is full, its prompt counted in each.
        ([GROUP], 13, [[0, 1], [2]]),
        ([GROUP], 11, [[0, 1], [2]]),
        ([GROUP], 10, [[0], [1], [2]]),
        ([(1, [4]), (5, [6, 6, 6])], 15, [[0, 1], [2, 3]]),  # 4 and 10; then 5 + 5 + 5
        # A row that is longer than the limit goes alone.
        ([(5, [40]), (5, [4])], 20, [[0], [1]]),
        ([(5, [4]), (5, [40]), (5, [4])], 20, [[0], [1], [2]]),
        ([GROUP], 1, [[0], [1], [2]]),
        # A completion of one token is read at its prompt, and costs nothing more.
        ([(6, [1, 1, 1, 1])], 6, [[0, 1, 2, 3]]),
    ],
)
def test_rows_are_packed_by_prompt_as_far_as_tokens_allow(
    groups: Groups, limit: int, expected: list[list[int]]
) -> None:
    assert packed(groups, limit) == expected


def tokens_of(rows: Sequence[int], groups: Groups) -> int:
    """What a pass computes: each prompt once, and of each completion all but its last token."""
    each = [(number, prompt, size) for number, (prompt, sizes) in enumerate(groups) for size in sizes]
    prompts = {each[row][0]: each[row][1] for row in rows}
    return sum(prompts.values()) + sum(each[row][2] - 1 for row in rows)


@pytest.mark.parametrize("limit", [15, 40, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_however_rows_come_each_is_in_one_pass_and_no_pass_is_too_large(seed: int, limit: int) -> None:
    random = np.random.default_rng(seed)
    groups = [
        (int(random.integers(1, 12)), random.integers(1, 12, size=random.integers(1, 6)).tolist())
        for _ in range(12)
    ]
    parts = packed(groups, limit, shuffle=seed)
    starts = np.cumsum([0, *(len(sizes) for _, sizes in groups)]).tolist()
    assert sorted(row for part in parts for row in part) == list(range(starts[-1]))
    assert all(len(part) == 1 or tokens_of(part, groups) <= limit for part in parts)
    for start, stop in pairwise(starts):
        members = range(start, stop)
        if tokens_of(members, groups) <= limit:
            assert sum(any(row in part for row in members) for part in parts) == 1  # not torn apart
    # Two passes that follow each other would not have fitted into one, or a group stood in the way of it.
    for one, other in pairwise(parts):
        assert tokens_of([*one, *other], groups) > limit


def test_prompts_meet_wherever_their_rows_were() -> None:
    (minibatch,) = ExperienceBuffer(
        experience([GROUP, GROUP, GROUP], shuffle=4), micro_batch_tokens=14
    ).minibatches(0)
    assert sorted(sorted(part) for part in dealt(minibatch)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_where_everything_fits_the_batch_stays_as_it_is() -> None:
    """The very arrays, in the order that the reference saw them in."""
    whole = experience([GROUP, (3, [2, 5])], shuffle=1)
    (minibatch,) = ExperienceBuffer(whole, micro_batch_tokens=10**6).minibatches(0)
    (part,) = minibatch.micro_batches
    assert part is whole


def test_how_a_pass_is_split_does_not_decide_who_meets_in_a_minibatch() -> None:
    whole = experience([(3, [2, 4, 3])] * 6, shuffle=2)

    def members(*seed: int, **more: Any) -> list[list[int]]:
        buffer = ExperienceBuffer(whole, minibatch_size=5, **more)
        return [sorted(row for part in dealt(m) for row in part) for m in buffer.minibatches(*seed)]

    by_tokens = members(0, 1, 0, micro_batch_tokens=9)
    assert by_tokens == members(0, 1, 0, micro_batch_tokens=9) == members(0, 1, 0, micro_batch_size=2)
    assert by_tokens == members(0, 1, 0)
    assert by_tokens != members(0, 1, 1, micro_batch_tokens=9)
    assert sorted(row for rows in by_tokens for row in rows) == list(range(18))


# Rows that teach nothing ---------------------------------------------------------------------------------


def test_they_are_not_dealt_and_count_all_the_same() -> None:
    whole = experience([GROUP, (2, [3, 1])], unscored=[1])
    teaches = np.array([True, True, False, False, True])
    for options in ({"micro_batch_tokens": 100}, {"micro_batch_size": 2}, {}):
        (minibatch,) = ExperienceBuffer(whole, teaches=teaches, **options).minibatches(0)
        assert sorted(row for part in dealt(minibatch) for row in part) == [0, 1, 4]
        assert (minibatch.n_rows, minibatch.n_tokens) == (4, 4 + 4 + 3 + 1)


def test_of_a_minibatch_in_which_nothing_teaches_one_row_stays() -> None:
    whole = experience([GROUP])
    (minibatch,) = ExperienceBuffer(whole, teaches=np.zeros(3, dtype=bool)).minibatches(0)
    assert len(minibatch.micro_batches) == 1
    assert minibatch.micro_batches[0].size == 1
    assert (minibatch.n_rows, minibatch.n_tokens) == (3, 12)
    alone = list(
        ExperienceBuffer(whole, minibatch_size=1, teaches=np.array([True, False, False])).minibatches(0)
    )
    assert [m.micro_batches[0].size for m in alone] == [1, 1, 1]


def test_the_row_that_stays_has_tokens_to_measure() -> None:
    """Else entropy and ratio would be those of no token: 0, and infinite at the extremes."""
    whole = experience([GROUP], unscored=[0, 1])
    (minibatch,) = ExperienceBuffer(whole, teaches=np.zeros(3, dtype=bool)).minibatches(0)
    assert dealt(minibatch) == [[2]]
    (empty,) = ExperienceBuffer(experience([GROUP], unscored=[0, 1, 2])).minibatches(0)
    assert empty.n_tokens == 0


LETTERS = "abcdefgh"


def trainer_of(folder: Path, algorithm: str, **options: Any) -> PPOTrainer:
    config = PPOConfig(
        algorithm=algorithm,
        model_name="embedded",
        fine_tune_type="full",
        max_new_tokens=4,
        output_dir=str(folder / f"run-{len(list(folder.iterdir()))}"),
        verbose=False,
        **{
            "group_size": 2,
            "kl_coef": 0.0,
            "overlong_buffer": 0.0,
            "dynamic_sampling": False,
            "learning_rate": 0.01,
            "allow_biased_kl": True,
            **options,
        },
    )
    random = np.random.default_rng(1)
    table = {letter: random.normal(size=len(LETTERS)).tolist() for letter in LETTERS}
    return PPOTrainer(config, model=table_model(table, LETTERS), reward_model=lambda completions, **_: [0.0])


def rollouts() -> list[Rollout]:
    """Two completions of each of three prompts."""
    random, made = np.random.default_rng(0), []
    for index, text in enumerate("abc"):
        prompt = Prompt(index, text, (token_id(text),), {})
        for member in range(2):
            answer = "".join(random.choice(list(LETTERS), size=4 - member))
            ids = tuple(token_id(letter) for letter in answer)
            made.append(Rollout(prompt, member, ids, (-2.0,) * len(ids), True, answer))
    return made


def learn(trainer: PPOTrainer, *batches: list[float]) -> list[dict[str, np.ndarray]]:
    """The weights before, and after each batch of scores; NaN where no reward applies."""

    def weights() -> dict[str, np.ndarray]:
        flat = list(tree_flatten(trainer.policy.model.trainable_parameters()))
        return {name: np.array(x, copy=True) for name, x in flat}

    after = [weights()]
    for scores in batches:
        total = np.array(scores, dtype=np.float32)
        made, _ = trainer.make_experience(rollouts(), ScoredBatch(total, {trainer.rewards.names[0]: total}))
        trainer.update(made)
        after.append(weights())
    return after


LIVE, HALF_DEAD, DEAD = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, math.nan, 0.5], [1.0] * 6


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("grpo", {}),
        ("dapo", {}),
        ("dr_grpo", {}),
        ("gspo", {}),
        ("cispo", {}),
        ("sapo", {}),
        ("grpo", {"num_epochs_per_rollout": 2, "minibatch_size": 2}),
    ],
)
def test_the_weights_are_those_of_an_update_from_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, options: dict[str, Any]
) -> None:
    """Denominators are the batch's, and a batch without any advantage still lets Adam's momentum act."""
    batches = (LIVE, HALF_DEAD, DEAD)
    before, *ours = learn(trainer_of(tmp_path, algorithm, **options), *batches)
    monkeypatch.setattr(Updater, "_only_advantages_teach", property(lambda self: False))
    _, *theirs = learn(trainer_of(tmp_path, algorithm, **options), *batches)
    previous = before
    for mine, other in zip(ours, theirs, strict=True):
        for name, x in mine.items():
            assert np.abs(x - previous[name]).max() > 1e-3  # each of them is a step
            np.testing.assert_allclose(x, other[name], atol=1e-6)
        previous = mine


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({}, True),
        ({"kl_coef": 0.1, "kl_placement": "loss"}, False),
        ({"kl_coef": 0.1, "kl_placement": "reward", "kl_estimator": "k1"}, True),
        ({"entropy_coef": 0.01}, False),
        ({"reduction": "micro_batch_mean"}, False),
        ({"target_kl": 0.1}, False),  # such limits are on means over all tokens
        ({"ratio_threshold": 2.0}, False),
    ],
)
def test_only_where_nothing_but_advantages_teaches_are_rows_left_out(
    tmp_path: Path, options: dict[str, Any], alone: bool
) -> None:
    trainer = trainer_of(tmp_path, "grpo", **options)
    updater = trainer._build_updater(1)
    total = np.array(HALF_DEAD, dtype=np.float32)
    made, _ = trainer.make_experience(rollouts(), ScoredBatch(total, {trainer.rewards.names[0]: total}))
    made = made._replace(advantages=made.advantages * mx.array([[0.0], [0.0], [1.0], [1.0], [1.0], [1.0]]))
    (minibatch,) = updater._buffer(made).minibatches(0)
    computed = sum(part.size for part in minibatch.micro_batches)
    # Row 4 was not scored; row 5 is alone in its group then.
    assert (computed < 6) is alone
    assert minibatch.n_rows == 5


def test_a_limit_on_the_kl_is_on_that_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epochs end where the KL passes it, and rows that teach nothing hold it down."""
    one_group = [1.0, 1.0, 0.0, 1.0, 0.5, 0.5]

    def kl_after(epochs: int, **options: Any) -> tuple[float, float]:
        trainer = trainer_of(tmp_path, "grpo", num_epochs_per_rollout=epochs, learning_rate=0.05, **options)
        total = np.array(one_group, dtype=np.float32)
        made, _ = trainer.make_experience(rollouts(), ScoredBatch(total, {trainer.rewards.names[0]: total}))
        metrics = trainer.update(made)
        return metrics["policy/approxkl_avg"], metrics["num_updates"]

    of_live_rows, _ = kl_after(2)
    of_all_rows, _ = kl_after(2, target_kl=1e6)
    assert of_live_rows > 1.2 * of_all_rows
    # Means are over both epochs, of which the first has none.
    between = of_live_rows + of_all_rows
    assert kl_after(3, target_kl=between)[1] == 3
    assert kl_after(3, target_kl=1.9 * of_all_rows)[1] == 2


def test_a_critic_learns_from_rows_without_advantage(tmp_path: Path) -> None:
    assert not trainer_of(tmp_path, "ppo", group_size=1)._build_updater(1)._only_advantages_teach
