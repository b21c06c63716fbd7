"""How often each model runs: nothing is computed that nobody reads, and nothing twice.

The model is a table, so a pass is a call of its trunk; batches are too small to be split for their lengths.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Experience, Prompt, Rollout
from ppo_trainer.ppo_trainer import PPOTrainer
from rewards.scored_batch import ScoredBatch
from tests import tabular
from tests.tabular import table_model, token_id

LETTERS = "abcdefgh"
ROWS = 6
LIVE = [1.0, 0.0, 0.0, 1.0, 0.5, 0.0]


class Observed:
    """A trainer whose models are counted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, **options: Any) -> None:
        config = PPOConfig(
            algorithm=algorithm,
            model_name="embedded",
            fine_tune_type="full",
            max_new_tokens=4,
            output_dir=str(folder / "run"),
            verbose=False,
            **{
                "group_size": 2,
                "kl_coef": 0.0,
                "overlong_buffer": 0.0,
                "dynamic_sampling": False,
                "num_epochs_per_rollout": 1,
                "allow_biased_kl": True,
                **options,
            },
        )
        random = np.random.default_rng(1)
        table = {letter: random.normal(size=len(LETTERS)).tolist() for letter in LETTERS}
        self.trainer = PPOTrainer(
            config, model=table_model(table, LETTERS), reward_model=lambda completions, **_: [0.0]
        )
        self.passes: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        names = {id(self.trainer.policy.model.model): "policy"}
        if self.trainer.reference is not None:
            names[id(self.trainer.reference.model.model)] = "reference"
        value = self.trainer.value_model
        if value is not None and not value.shared:
            names[id(value.module.model.model)] = "value"
        own = tabular._LastToken.__call__

        def counted(trunk: Any, tokens: mx.array, cache: Any = None) -> mx.array:
            self.passes[names[id(trunk)]] += 1
            self.rows[names[id(trunk)]] += tokens.shape[0]
            return own(trunk, tokens, cache)

        monkeypatch.setattr(tabular._LastToken, "__call__", counted)

    def experience(self, scores: list[float] = LIVE) -> tuple[Experience, dict[str, int]]:
        """One batch, and how often each model ran for it."""
        total = np.array(scores, dtype=np.float32)
        self.passes.clear()
        made, _ = self.trainer.make_experience(
            rollouts(), ScoredBatch(total, {self.trainer.rewards.names[0]: total})
        )
        return made, dict(self.passes)

    def update(self, made: Experience) -> dict[str, int]:
        """How often each model runs while the batch is learned."""
        self.passes.clear()
        self.rows.clear()
        self.trainer.update(made)
        return dict(self.passes)

    def both(self) -> tuple[dict[str, int], dict[str, int]]:
        """Passes for the experience, and for the update."""
        made, before = self.experience()
        return before, self.update(made)


def rollouts() -> list[Rollout]:
    """Two completions of each of three prompts."""
    random, made = np.random.default_rng(0), []
    for index, text in enumerate("abc"):
        prompt = Prompt(index, text, (token_id(text),), {})
        for member in range(2):
            answer = "".join(random.choice(list(LETTERS), size=4))
            ids = tuple(token_id(letter) for letter in answer)
            made.append(Rollout(prompt, member, ids, (-2.0,) * 4, True, answer))
    return made


IN_REWARD = {"kl_coef": 0.1, "kl_placement": "reward", "kl_estimator": "k1"}
IN_LOSS = {"kl_coef": 0.1, "kl_placement": "loss", "kl_estimator": "k3"}
TWICE = {"num_epochs_per_rollout": 2}
SHARED = {"value_network": "shared", "group_size": 1}


@pytest.mark.parametrize(
    ("algorithm", "options", "before", "during"),
    [
        # The only update's ratio is measured from the policy itself, and no KL is asked for: no pass at all.
        ("grpo", {}, {}, {"policy": 1}),
        ("grpo", TWICE, {"policy": 1}, {"policy": 2}),
        ("grpo", {"minibatch_size": 2}, {"policy": 1}, {"policy": 3}),
        ("grpo", TWICE | {"old_logprobs_from": "rollout"}, {}, {"policy": 2}),
        ("grpo", IN_LOSS, {"reference": 1}, {"policy": 1}),
        ("grpo", IN_LOSS | TWICE, {"policy": 1, "reference": 1}, {"policy": 2}),
        ("grpo", IN_REWARD, {"policy": 1, "reference": 1}, {"policy": 1}),
        ("grpo", IN_REWARD | {"kl_coef": 0.0}, {}, {"policy": 1}),
        ("grpo", IN_LOSS | {"kl_coef": 0.0}, {}, {"policy": 1}),
        ("grpo", {"top_entropy_quantile": 0.5}, {"policy": 1}, {"policy": 1}),
        ("grpo", {"micro_batch_size": 2}, {}, {"policy": 3}),
        ("grpo", {"entropy_coef": 0.1}, {}, {"policy": 1}),
        # A critic of its own runs by itself; on the policy's trunk it reads what the policy computes anyway.
        ("ppo", {"group_size": 1}, {"value": 1}, {"policy": 1, "value": 1}),
        ("ppo", {"group_size": 1} | TWICE, {"policy": 1, "value": 1}, {"policy": 2, "value": 2}),
        ("ppo", SHARED, {"policy": 1}, {"policy": 1}),
        ("ppo", SHARED | TWICE, {"policy": 1}, {"policy": 2}),
        ("ppo", SHARED | IN_REWARD, {"policy": 1, "reference": 1}, {"policy": 1}),
        ("ppo", SHARED | IN_REWARD | TWICE, {"policy": 1, "reference": 1}, {"policy": 2}),
        ("ppo", SHARED | {"micro_batch_size": 3}, {"policy": 2}, {"policy": 2}),
    ],
)
def test_each_model_runs_as_often_as_somebody_reads_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    options: dict[str, Any],
    before: dict[str, int],
    during: dict[str, int],
) -> None:
    assert Observed(tmp_path, monkeypatch, algorithm, **options).both() == (before, during)


def test_a_critic_of_its_own_runs_once_for_its_values_and_its_only_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(tmp_path, monkeypatch, "ppo", group_size=1)
    total = np.array(LIVE, dtype=np.float32)
    scored = ScoredBatch(total, {observed.trainer.rewards.names[0]: total})
    made, _ = observed.trainer._make_experience(rollouts(), scored, teaches=True, critic_learns_first=True)
    observed.trainer.update(made)
    assert observed.passes == {"value": 1, "policy": 1}


def test_the_exact_kl_of_the_loss_needs_one_pass_of_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kl_coef": 0.1, "kl_placement": "loss", "kl_estimator": "full"}
    _, during = Observed(tmp_path, monkeypatch, "grpo", **options).both()
    assert during == {"policy": 1, "reference": 1}


def test_the_exact_kl_of_the_reward_needs_one_pass_of_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kl_coef": 0.1, "kl_placement": "reward", "kl_estimator": "full"}
    observed = Observed(tmp_path, monkeypatch, "grpo", **options)
    made, before = observed.experience()
    assert before == {"policy": 1, "reference": 1}
    reference = observed.trainer.reference
    assert reference is not None
    assert made.ref_logprobs is not None
    alone = reference.logprobs(made.tokens, made.mask, observed.trainer.config.temperature)
    np.testing.assert_allclose(np.array(made.ref_logprobs), np.array(alone), atol=1e-6)


def test_what_was_not_computed_is_not_in_the_experience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = Observed(tmp_path, monkeypatch, "grpo").experience()
    assert (made.old_logprobs, made.ref_logprobs, made.values) == (None, None, None)


@pytest.mark.parametrize("options", [SHARED, SHARED | TWICE, SHARED | IN_REWARD])
def test_values_from_the_policys_pass_are_those_of_a_pass_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    observed = Observed(tmp_path, monkeypatch, "ppo", **options)
    value = observed.trainer.value_model
    assert value is not None
    value.module.head.weight = mx.random.normal(value.module.head.weight.shape, key=mx.random.key(0))
    value.module.head.bias = mx.array([0.25])
    made, _ = observed.experience()
    assert made.values is not None
    table = np.array(value.module.head.weight)[0]  # a state says which token was last
    expected = np.where(np.array(made.mask), table[np.array(made.tokens)[:, :-1]] + 0.25, 0.0)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.array(made.values), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "rows"),
    [
        (LIVE, 6),
        ([1.0, 1.0, 0.0, 1.0, 0.5, 0.5], 2),  # the second group alone tells its answers apart
        ([1.0, 1.0, 0.0, 0.0, 0.5, 0.5], 1),  # for a step in which momentum acts
    ],
)
def test_groups_whose_scores_are_equal_are_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], rows: int
) -> None:
    observed = Observed(tmp_path, monkeypatch, "grpo")
    made, before = observed.experience(scores)
    assert before == {}
    assert observed.update(made) == {"policy": 1}
    assert observed.rows["policy"] == rows


def test_with_a_kl_in_the_loss_every_row_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = Observed(tmp_path, monkeypatch, "grpo", **IN_LOSS)
    observed.update(observed.experience([1.0, 1.0, 0.0, 0.0, 0.5, 0.5])[0])
    assert observed.rows["policy"] == ROWS


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_what_nobody_could_score_is_no_reason_for_any_pass_of_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    observed = Observed(tmp_path, monkeypatch, algorithm)
    made, _ = observed.experience([float("nan")] * ROWS)
    assert observed.update(made) == {}
