"""Reward models from comparisons: which answers are compared, the first loss by hand, a toy learned in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from base_setup.tokenizer_setup import encode
from config.errors import DataLoadError
from config.model_config import ModelConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from data_loading.loading import load_preferences
from models.sft_model import LanguageModel, build_embedded
from training.comparisons import Answer, Ranking
from training.reward_trainer import RewardTrainer
from training.sft_trainer import SFTTrainer

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
PAIRS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "e"},
    {"prompt": "q", "chosen": "long answer", "rejected": "zzz"},
    {"prompt": "hello", "chosen": "x", "rejected": "yy"},
]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return build_embedded(SMALLEST, seed=1)


def trainer_of(base: LanguageModel, **options: Any) -> RewardTrainer:
    common = {"model_name": "embedded", "embedded_model": SMALLEST, "fine_tune_type": "full"}
    return RewardTrainer(base, RewardModelConfig(**{**common, **options}))


def scored(texts: Sequence[str], rewards: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"prompt": "q", "completion": t, "reward": r} for t, r in zip(texts, rewards, strict=True)]


def raw_score(trainer: RewardTrainer, prompt: str, answer: str) -> float:
    """Of one row alone, without padding, read at its end token."""
    model = trainer.reward_model
    ids = [*encode(model.tokenizer, prompt), *encode(model.tokenizer, answer), model.tokenizer.eos_token_id]
    return float(model.raw_scores(mx.array([ids]), mx.array([len(ids)]))[0])


def minus_log_sigmoid(lead: float) -> float:
    return float(np.log1p(np.exp(-lead)))


def weights(trainer: RewardTrainer) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(trainer.reward_model.module.parameters())}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)


# What is compared with what ------------------------------------------------------------------------------


def test_every_answer_of_a_list_is_compared_with_every_other() -> None:
    """Of n different rewards n(n−1)/2 comparisons, the better one first, shifted by the list's place."""
    rewards = [0.3, -1.0, 2.0, 1.5]
    ranking = Ranking([Answer([0], r) for r in rewards])
    expected = {(i, j) if rewards[i] > rewards[j] else (j, i) for i, j in itertools.combinations(range(4), 2)}
    assert len(expected) == 6
    assert set(ranking.comparisons(0)) == expected
    assert sorted(ranking.comparisons(10)) == sorted((i + 10, j + 10) for i, j in expected)


def test_ties_are_not_compared() -> None:
    assert Ranking([Answer([0], 1.0)] * 3).comparisons(0) == []
    ranking = Ranking([Answer([0], r) for r in (1.0, 2.0, 1.0)])
    assert sorted(ranking.comparisons(0)) == [(1, 0), (1, 2)]


def test_rows_become_lists_of_their_kind(base: LanguageModel) -> None:
    trainer = trainer_of(base, list_size=2)
    pairs = trainer.encode(PAIRS)
    assert [[a.reward for a in ranking.answers] for ranking in pairs] == [[1, 0]] * 3
    end = base.tokenizer.eos_token_id
    assert pairs[0].answers[0].ids == [*encode(base.tokenizer, "abcd"), end]
    lists = trainer.encode(scored("abcde", ["0.75", 1, "-2e1", 0.5, 3]))
    assert [[a.reward for a in ranking.answers] for ranking in lists] == [[0.75], [1], [-20], [0.5], [3]]


# The loss ------------------------------------------------------------------------------------------------


def test_the_first_loss_of_pairs_by_hand(base: LanguageModel) -> None:
    trainer = trainer_of(base, batch_size=3, num_steps=1)
    leads = [
        raw_score(trainer, p["prompt"], p["chosen"]) - raw_score(trainer, p["prompt"], p["rejected"])
        for p in PAIRS
    ]
    assert min(abs(lead) for lead in leads) > 1e-3
    seen: list[int] = []
    metrics = trainer.train(PAIRS, lambda number, _: seen.append(number))
    assert seen == [1]
    assert metrics.keys() == {"loss", "grad_norm", "lr", "accuracy"}
    assert metrics["loss"] == pytest.approx(np.mean([minus_log_sigmoid(lead) for lead in leads]), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean([lead > 0 for lead in leads]))


def test_centering_adds_the_squared_sum_of_a_pairs_scores(base: LanguageModel) -> None:
    trainer = trainer_of(base, batch_size=3, num_steps=1, centering=0.5)
    expected = []
    for p in PAIRS:
        better, worse = (raw_score(trainer, p["prompt"], p[side]) for side in ("chosen", "rejected"))
        expected.append(minus_log_sigmoid(better - worse) + 0.5 * (better + worse) ** 2)
    assert trainer.train(PAIRS)["loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_first_loss_of_scored_answers_by_hand(base: LanguageModel) -> None:
    """Rewards as text and a tie: of four answers five comparisons, each as heavy as the others."""
    trainer = trainer_of(base, list_size=4, batch_size=4, num_steps=1)
    texts, rewards = ["a", "bcd", "ef", "ghijk"], ["0.5", "2", "0.5", "-1.25"]
    s = [raw_score(trainer, "q", text) for text in texts]
    leads = [s[1] - s[0], s[1] - s[2], s[1] - s[3], s[0] - s[3], s[2] - s[3]]
    metrics = trainer.train(scored(texts, rewards))
    assert metrics["loss"] == pytest.approx(np.mean([minus_log_sigmoid(lead) for lead in leads]), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean([lead > 0 for lead in leads]))


def test_accuracy_counts_comparisons_and_half_of_each_tie(base: LanguageModel) -> None:
    """Rewards by construction from what the model says of five answers; then a head that says 0 of each."""
    trainer = trainer_of(base, list_size=5)
    texts = ["a", "b", "cc", "dd", "eee"]
    scores = [raw_score(trainer, "q", text) for text in texts]
    order = np.argsort(scores).tolist()
    rank = [float(order.index(i)) for i in range(5)]
    assert trainer.accuracy(scored(texts, rank)) == 1
    assert trainer.accuracy(scored(texts, [-r for r in rank])) == 0
    # Only the likeliest and the second change places: one of ten comparisons is wrong.
    swapped = [{4.0: 3.0, 3.0: 4.0}.get(r, r) for r in rank]
    assert trainer.accuracy(scored(texts, swapped)) == pytest.approx(0.9)
    best, worst = texts[order[-1]], texts[order[0]]
    right, wrong = ({"prompt": "q", "chosen": x, "rejected": y} for x, y in ((best, worst), (worst, best)))
    assert trainer.accuracy([right, right, right, wrong]) == pytest.approx(0.75)
    trainer.reward_model.batch_rows = 2  # in parts
    assert trainer.accuracy([right, right, right, wrong]) == pytest.approx(0.75)
    head = trainer.reward_model.module.head
    head.weight = mx.zeros(head.weight.shape)
    assert trainer.accuracy(PAIRS) == trainer.accuracy(scored(texts, rank)) == 0.5


# Training ------------------------------------------------------------------------------------------------


def answers(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list("abcd"), size=generator.integers(3, 8))) for _ in range(count)]


def more_a(texts: Sequence[str]) -> list[dict[str, str]]:
    """Pairs of which the chosen answer has more of the letter a."""
    pairs = [sorted(pair, key=lambda t: t.count("a")) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return [
        {"prompt": "q", "chosen": high, "rejected": low}
        for low, high in pairs
        if low.count("a") < high.count("a")
    ]


@pytest.mark.parametrize("kind", ["pairs", "scored"])
def test_what_separates_answers_is_learned_for_answers_not_seen(base: LanguageModel, kind: str) -> None:
    train, held_out = answers(400, seed=0), answers(200, seed=1)
    trainer = trainer_of(base, num_steps=60, batch_size=16, learning_rate=5e-3)
    if kind == "pairs":
        trainer.train(more_a(train))
    else:
        trainer.train(scored(train, [f"{t.count('a')}.0" for t in train]))
    assert trainer.accuracy(more_a(held_out)) > 0.9
    assert trainer.accuracy(scored(held_out, [t.count("a") for t in held_out])) > 0.9


def test_scores_are_normalised_on_the_training_answers(base: LanguageModel) -> None:
    trainer = trainer_of(base, num_steps=3, batch_size=8, learning_rate=1e-2)
    texts = answers(40, seed=0)
    trainer.train(scored(texts, range(40)))
    scores = np.array(trainer.reward_model(["q"] * 40, texts))
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-4)
    raw = np.array([raw_score(trainer, "q", text) for text in texts])
    np.testing.assert_allclose(scores, (raw - raw.mean()) / raw.std(), atol=1e-3)


@pytest.mark.parametrize("kind", ["pairs", "scored"])
def test_micro_batches_do_not_change_what_is_learned(base: LanguageModel, kind: str) -> None:
    """Lists of 3, 3 and 1 with a tie: a mean per list would weight their comparisons differently."""
    rows: Sequence[Any] = PAIRS
    if kind == "scored":
        rows = scored(["a", "bcd", "ef", "ghijk", "l", "mn", "opq"], [1, 2, 1, 3, 5, 4, 0])
    # A large epsilon keeps a step smooth in its gradient, where otherwise rounding decides a sign.
    options = {
        "num_steps": 4,
        "batch_size": len(rows),
        "list_size": 3,
        "learning_rate": 1e-2,
        "adam_eps": 1e-2,
    }
    whole, parts = trainer_of(base, **options), trainer_of(base, **options, micro_batch_size=1)
    one, other = whole.train(rows), parts.train(rows)
    assert one == pytest.approx(other, rel=1e-4)
    ours, theirs = weights(whole), weights(parts)
    assert max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours) < 1e-5
    start = weights(trainer_of(base, **options))
    assert max(float(np.abs(ours[k] - start[k]).max()) for k in ours) > 1e-3


DROPPED = {
    "fine_tune_type": "lora",
    "lora_dropout": 0.5,
    "num_steps": 4,
    "learning_rate": 1e-2,
    "batch_size": 2,
}


def test_the_seed_decides_everything(base: LanguageModel) -> None:
    def trained(seed: int) -> dict[str, np.ndarray]:
        trainer = trainer_of(base, **DROPPED, seed=seed)
        trainer.train(PAIRS)
        return weights(trainer)

    first = trained(3)
    assert same(first, trained(3))
    assert not same(first, trained(4))


def test_dropout_follows_from_the_seed_whatever_was_drawn_before_training(base: LanguageModel) -> None:
    """Two trainers of one seed, both made before either trains."""
    one, other = trainer_of(base, **DROPPED), trainer_of(base, **DROPPED)
    one.train(PAIRS)
    other.train(PAIRS)
    assert same(weights(one), weights(other))


def test_training_may_begin_from_an_adapter_that_has_dropout(base: LanguageModel, tmp_path: Path) -> None:
    options = {"model_name": "embedded", "embedded_model": SMALLEST, **DROPPED}
    sft = SFTTrainer(base, SFTConfig(**options))
    sft.train([{"prompt": "ab", "completion": "cd"}])
    sft.policy.save(tmp_path)
    trainer = trainer_of(base, **DROPPED, adapter_path=str(tmp_path))
    tokens = mx.array([[5, 6, 7]])
    np.testing.assert_allclose(
        np.array(trainer.reward_model.trunk.head(trainer.reward_model.trunk.hidden(tokens))),
        np.array(sft.policy.forward(tokens).logits),
        atol=1e-5,
    )
    assert np.isfinite(trainer.train(PAIRS)["loss"])


# Rows that cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "preference rows: the list is empty"),
        ([PAIRS[0], {"prompt": "q", "chosen": "a"}], r'preference rows\[1\]: "rejected" must be a string'),
        ([{"chosen": "a", "rejected": "b"}], r'preference rows\[0\]: "prompt" must be a string, found None'),
        ([{"prompt": "q", "completion": "a"}], r'preference rows\[0\]: "reward" must be a finite number'),
        ([{"prompt": "q", "reward": 1}], r'preference rows\[0\]: "completion" must be a string'),
        (scored("ab", [1, "abc"]), r"preference rows\[1\]: \"reward\" must be a finite number, found 'abc'"),
        (
            scored("ab", [float("nan"), 1]),
            r'preference rows\[0\]: "reward" must be a finite number, found nan',
        ),
        (scored("ab", [1, "inf"]), r"preference rows\[1\]: \"reward\" must be a finite number, found 'inf'"),
        (scored("ab", [None, 1]), r'preference rows\[0\]: "reward" must be a finite number, found None'),
        (scored("abc", [2, "2", 2.0]), "preference rows: all rewards are equal"),
        (scored("a", [1]), "preference rows: "),  # one answer has nothing to be compared with
        (scored(["a", "b" * 20], [1, 2]), r"preference rows\[1\]: 22 tokens, max_sequence_length is 14"),
        (
            [PAIRS[0], {"prompt": "q", "chosen": "a" * 13, "rejected": "b"}],
            r"preference rows\[1\]: 15 tokens, max_sequence_length is 14",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(base: LanguageModel, rows: Any, sentence: str) -> None:
    trainer = trainer_of(base, max_sequence_length=14, num_steps=1)
    before = weights(trainer)
    with pytest.raises(DataLoadError, match=sentence):
        trainer.train(rows)
    with pytest.raises(DataLoadError, match=sentence):
        trainer.accuracy(rows)
    assert same(before, weights(trainer))


@pytest.mark.parametrize("size", [2, 4])
def test_rewards_that_differ_between_lists_only_are_not_all_equal(base: LanguageModel, size: int) -> None:
    """Sorted data: the first lists are all good and the others all bad, yet training mixes them."""
    trainer = trainer_of(base, list_size=size, batch_size=8, num_steps=3, learning_rate=1e-2)
    losses: list[float] = []
    trainer.train(
        scored(answers(8, seed=0), [1] * 4 + [0] * 4), lambda _, metrics: losses.append(metrics["loss"])
    )
    assert max(losses) > 0


# Margins, ranked lists, pairings -------------------------------------------------------------------------


def test_a_margin_is_subtracted_from_the_lead(base: LanguageModel) -> None:
    """A pair's own, or 1; of scored answers the difference of their rewards; times margin_scale."""
    leads = [
        raw_score(trainer_of(base), p["prompt"], p["chosen"])
        - raw_score(trainer_of(base), p["prompt"], p["rejected"])
        for p in PAIRS
    ]
    rows = [{**PAIRS[0], "margin": "2.5"}, PAIRS[1], {**PAIRS[2], "margin": 0.5}]
    trainer = trainer_of(base, batch_size=3, num_steps=1, margin_scale=0.4)
    expected = [minus_log_sigmoid(lead - 0.4 * m) for lead, m in zip(leads, (2.5, 1, 0.5), strict=True)]
    assert trainer.train(rows)["loss"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_ranked_list_is_every_comparison_in_it(base: LanguageModel) -> None:
    trainer = trainer_of(base, batch_size=1, num_steps=1)
    texts = ["a", "bcd", "ef"]
    s = [raw_score(trainer, "q", text) for text in texts]
    expected = np.mean([minus_log_sigmoid(s[i] - s[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert trainer.train([{"prompt": "q", "completions": texts}])["loss"] == pytest.approx(expected, abs=1e-5)
    by_rewards = trainer_of(base, batch_size=1, num_steps=1)
    row = {"prompt": "q", "completions": ["ef", "a", "bcd"], "rewards": [-1, "7", 0]}
    assert by_rewards.train([row])["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pairing", ["lists", "random", "nearest"])
def test_scored_answers_one_at_a_time_are_compared_all_the_same(base: LanguageModel, pairing: str) -> None:
    trainer = trainer_of(base, batch_size=1, num_steps=4, pairing=pairing, learning_rate=1e-2)
    losses: list[float] = []
    trainer.train(scored(["a", "b", "c"], [1, 2, 3]), lambda _, metrics: losses.append(metrics["loss"]))
    assert min(losses) > 0
    assert 0 <= trainer.accuracy(scored(["a", "b", "c"], [1, 2, 3])) <= 1


@pytest.mark.parametrize("pairing", ["lists", "random", "nearest"])
def test_each_pairing_learns(base: LanguageModel, pairing: str) -> None:
    train, held_out = answers(200, seed=0), answers(100, seed=1)
    trainer = trainer_of(base, num_steps=50, batch_size=8, learning_rate=5e-3, pairing=pairing)
    trainer.train(scored(train, [t.count("a") for t in train]))
    assert trainer.accuracy(more_a(held_out)) > 0.85


def test_no_batch_of_scored_answers_is_without_a_comparison(base: LanguageModel) -> None:
    """One good answer among many bad ones: nearly every batch has one reward only."""
    trainer = trainer_of(base, batch_size=2, num_steps=1)
    rows = trainer.encode(scored(answers(12, seed=0), [1] + [0] * 11))
    batches = trainer._batches(rows)
    for batch in (batches(number) for number in range(20)):
        compared = sum(len(ranking.comparisons(0)) for ranking in batch)
        assert compared >= len([a for ranking in batch for a in ranking.answers]) - 1


def test_early_stopping_keeps_the_best_weights(base: LanguageModel) -> None:
    """Validation rows that say the opposite: every step makes them worse, so the first validation is the best."""
    wrong = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS]
    options = {"batch_size": 3, "learning_rate": 3e-3, "eval_every": 1}
    trainer = trainer_of(base, num_steps=30, early_stopping_patience=3, **options)
    seen: list[dict[str, float]] = []
    metrics = trainer.train(PAIRS, lambda _, m: seen.append(m), validation=wrong)
    assert len(seen) == 4
    assert seen[0]["validation/loss"] < seen[1]["validation/loss"] < seen[3]["validation/loss"]
    assert metrics["validation/loss"] == seen[0]["validation/loss"]
    assert trainer.report(wrong).loss == pytest.approx(seen[0]["validation/loss"], abs=1e-6)
    one = trainer_of(base, num_steps=1, **options)
    one.train(PAIRS)
    assert same(weights(one), weights(trainer))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([PAIRS[0], *scored("a", [1])], r"\[1\]: a row of scored answers among rows of pairs"),
        ([{**PAIRS[0], "margin": -1}], r'\[0\]: "margin" must be above 0, found -1'),
        ([{"prompt": "q", "completions": ["a"]}], r'\[0\]: "completions" must be a list of two answers'),
        (
            [{"prompt": "q", "completions": ["a", "b"], "rewards": [1]}],
            r'"completions" must be a list of two',
        ),
        ([{"prompt": "q", "completions": ["a", "b"], "rewards": [1, "x"]}], r'"rewards" must be a finite'),
        ([{"prompt": "q", "completions": ["a", "b"], "rewards": 1}], r'"completions" must be a list of two'),
        (
            [{"prompt": "q", "completions": ["a", "b"], "rewards": [n, n]} for n in (0, 1)],
            r"\[0\]: all rewards of the list are equal",
        ),
    ],
)
def test_lists_and_margins_that_cannot_be_used_are_named(
    base: LanguageModel, rows: Any, sentence: str
) -> None:
    with pytest.raises(DataLoadError, match=sentence):
        trainer_of(base).train(rows)


def test_the_report_compares_as_pairing_says(base: LanguageModel) -> None:
    """Four answers of rewards 0, 1, 3 and 7: all six pairs; each with the nearest; each with one that is drawn."""
    rows = scored(["a", "bb", "ccc", "dddd"], [0, 1, 3, 7])
    score = [raw_score(trainer_of(base), "q", row["completion"]) for row in rows]

    def expected(pairs: Sequence[tuple[int, int]]) -> Any:
        margins = [score[better] - score[worse] for better, worse in pairs]
        return (
            len(pairs),
            pytest.approx(np.mean(margins), abs=1e-5),
            pytest.approx(np.mean([minus_log_sigmoid(m) for m in margins]), abs=1e-5),
        )

    def found(pairing: str) -> Any:
        report = trainer_of(base, pairing=pairing).report(rows)
        assert report.answers == 4
        assert report.length_correlation == pytest.approx(np.corrcoef(score, [2, 3, 4, 5])[0, 1], abs=1e-4)
        return report.comparisons, report.margin_mean, report.loss

    assert found("lists") == expected([(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)])
    # The nearest of 0 is 1, of 1 is 0, of 3 is 1, of 7 is 3; the better one stands first.
    assert found("nearest") == expected([(1, 0), (1, 0), (2, 1), (3, 2)])
    drawn = found("random")
    assert drawn == found("random")
    partners = itertools.product(*[[j for j in range(4) if j != i] for i in range(4)])
    possible = [[(max(i, j), min(i, j)) for i, j in enumerate(chosen)] for chosen in partners]
    assert any(drawn == expected(pairs) for pairs in possible)


def test_an_empty_answer_is_the_end_token_alone(base: LanguageModel) -> None:
    rows = load_preferences(scored(["", "a"], [0, 1]))
    found = trainer_of(base).encode(rows)[0].answers[0]
    assert found.ids == [*encode(base.tokenizer, "q", special=True), base.tokenizer.eos_token_id]
