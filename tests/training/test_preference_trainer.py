"""Preferences without RL: the first loss from logits by hand, toys learned in seconds, what may not move."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from base_setup.tokenizer_setup import encode
from config.errors import DataLoadError, InvalidConfigurationError
from config.model_config import ModelConfig
from config.options import options_of
from config.supervised_config import READ_BY, PreferenceConfig
from data_loading.loading import load_preferences
from models.sft_model import LanguageModel, build_embedded
from training.preference_algorithms import PREFERENCE_ALGORITHMS
from training.preference_trainer import PreferenceTrainer

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
PAIRS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "e"},
    {"prompt": "q", "chosen": "long answer", "rejected": "zzz"},
    {"prompt": "hello", "chosen": "x", "rejected": "yy"},
]
ALL = pytest.mark.parametrize("name", PREFERENCE_ALGORITHMS)


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return build_embedded(SMALLEST, seed=1)


def trainer_of(base: LanguageModel, name: str, **options: Any) -> PreferenceTrainer:
    common = {
        "model_name": "embedded",
        "embedded_model": SMALLEST,
        "fine_tune_type": "full",
        "algorithm": name,
        "batch_size": 3,
    }
    return PreferenceTrainer(base, PreferenceConfig(**{**common, **options}))


def summed_logprob(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """Of the answer and its end token, from the full logits in float64; and how many tokens that is."""
    before = encode(tokenizer, prompt)
    after = [*encode(tokenizer, answer), tokenizer.eos_token_id]
    z = np.array(model(mx.array([before + after])))[0].astype(np.float64)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return sum(logp[len(before) - 1 + i, token] for i, token in enumerate(after)), len(after)


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(model.parameters())}


def first_loss(name: str, base: LanguageModel) -> float:
    """At the start the policy is the reference: all log ratios are 0."""
    sides = [
        [summed_logprob(base.model, base.tokenizer, p["prompt"], p[side]) for side in ("chosen", "rejected")]
        for p in PAIRS
    ]

    def softplus(x: float) -> float:
        return float(np.log1p(np.exp(x)))

    def odds(x: tuple[float, int]) -> float:
        p = np.exp(x[0] / x[1])
        return float(p / (1 - p))

    per_pair = {
        "dpo": lambda c, r: np.log(2.0),
        "ipo": lambda c, r: 25.0,  # (0 − 1/(2 · 0.1))²
        "simpo": lambda c, r: softplus(-(2 * c[0] / c[1] - 2 * r[0] / r[1] - 1)),
        "orpo": lambda c, r: -c[0] / c[1] + 0.1 * softplus(-np.log(odds(c) / odds(r))),
        "cpo": lambda c, r: softplus(-0.1 * (c[0] - r[0])) - c[0],
        "kto": lambda c, r: 0.5,  # 1 − σ(0), of good and of bad answers
    }
    return float(np.mean([per_pair[name](c, r) for c, r in sides]))


def test_the_configs_choices_are_the_table() -> None:
    options = options_of(PreferenceConfig)
    assert options["algorithm"].choices == tuple(PREFERENCE_ALGORITHMS)
    for name, readers in READ_BY.items():
        assert readers == tuple(row.name for row in PREFERENCE_ALGORITHMS.values() if name in row.options)
    read = {name for row in PREFERENCE_ALGORITHMS.values() for name in row.options}
    assert read == {"preference_beta", *READ_BY}


@ALL
def test_the_first_loss_by_hand(base: LanguageModel, name: str) -> None:
    trainer = trainer_of(base, name, num_steps=1, batch_size=6)
    metrics = trainer.train(PAIRS)
    assert metrics["loss"] == pytest.approx(first_loss(name, base), rel=1e-5, abs=1e-5)
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["grad_norm"] > 0


@ALL
def test_micro_batches_and_their_order_do_not_change_what_is_learned(base: LanguageModel, name: str) -> None:
    options = {"num_steps": 3, "learning_rate": 1e-2, "adam_eps": 1e-2, "batch_size": 6}
    whole, parts = trainer_of(base, name, **options), trainer_of(base, name, **options, micro_batch_size=2)
    assert whole.train(PAIRS) == pytest.approx(parts.train(PAIRS), rel=1e-3, abs=1e-4)
    ours, theirs = weights(whole.policy.model), weights(parts.policy.model)
    assert max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours) < 1e-4
    start = weights(base.model)
    assert max(float(np.abs(ours[k] - start[k]).max()) for k in ours) > 1e-3


def digit_pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Chosen answers are letters, rejected ones digits: to be learned as a kind, not by heart."""
    rng = np.random.default_rng(seed)
    letters, digits, prompts = "abcdef", "123456", "uvwxyz"
    pick = lambda kind: "".join(rng.choice(list(kind), size=3))  # noqa: E731
    return [
        {"prompt": pick(prompts), "chosen": pick(letters), "rejected": pick(digits)} for _ in range(count)
    ]


@ALL
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_preference_is_learned_and_holds_for_rows_never_seen(
    base: LanguageModel, name: str, kind: str
) -> None:
    trainer = trainer_of(
        base,
        name,
        fine_tune_type=kind,
        num_steps=40,
        batch_size=8,
        learning_rate=1e-2 if kind == "full" else 3e-2,
        lora_dropout=0.0,
    )
    held_out = digit_pairs(16, seed=9)
    before = trainer.evaluate(held_out)
    trainer.train(digit_pairs(32, seed=0))
    after = trainer.evaluate(held_out)
    # Adapters learn what they can over a frozen random embedding: 0.62 to 1, by the last bits of the BLAS.
    assert after["accuracy"] >= (0.95 if kind == "full" else 0.55), (before, after)
    assert after["loss"] < before["loss"]
    assert after["margin"] > before["margin"]


@ALL
def test_the_reference_of_a_fresh_adapter_is_the_base_and_stays(base: LanguageModel, name: str) -> None:
    trainer = trainer_of(base, name, fine_tune_type="lora", num_steps=3, learning_rate=1e-2)
    before = weights(base.model)
    tokens, mask = mx.array([[5, 6, 7, 8]]), mx.array([[False, True, True]])
    trainer.train(PAIRS)
    after = weights(base.model)
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    if trainer.reference is None:
        assert not trainer.algorithm.has_reference
        return
    theirs = np.array(trainer.reference.logprobs(tokens, mask))
    with trainer.policy.adapters_off():
        off = np.array(trainer.policy.logprobs(tokens, mask))
    assert theirs.tobytes() == off.tobytes()
    assert not np.allclose(theirs, np.array(trainer.policy.logprobs(tokens, mask)), atol=1e-4)


def test_the_reference_of_a_loaded_adapter_is_the_policy_as_it_begins(
    base: LanguageModel, tmp_path: Any
) -> None:
    options = {"fine_tune_type": "lora", "num_steps": 3, "learning_rate": 1e-2, "lora_dropout": 0.0}
    first = trainer_of(base, "dpo", **options)
    first.train(PAIRS)
    first.policy.save(tmp_path)
    again = trainer_of(base, "dpo", **options, adapter_path=str(tmp_path))
    assert again.evaluate(PAIRS)["loss"] == pytest.approx(np.log(2), abs=1e-6)


@ALL
def test_prompts_take_no_part(base: LanguageModel, name: str) -> None:
    """The loss reads nothing at a prompt's positions: its gradient there is exactly 0."""
    trainer = trainer_of(base, name)
    rows = trainer.encode(PAIRS)
    prepared = trainer._prepare(rows, {})
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    true_sums = trainer._sums

    def at_zero(shift: mx.array, mask_out: list[Any]) -> mx.array:
        def sums(model: Any, answers: Any) -> mx.array:
            from token_attribution.extractor import pad_sequences

            tokens, mask = pad_sequences([a.prompt for a in answers], [a.completion for a in answers])
            mask_out.append(np.array(mask))
            logp = model.logprobs(tokens, mask)
            return mx.sum(mx.where(mask, logp + shift[: logp.shape[0], : logp.shape[1]], logp), axis=1)

        trainer._sums = sums  # type: ignore[method-assign]
        try:
            return trainer._loss(rows, prepared, len(rows))[0]
        finally:
            trainer._sums = true_sums  # type: ignore[method-assign]

    masks: list[Any] = []
    gradient = np.array(mx.grad(lambda shift: at_zero(shift, masks))(mx.zeros((6, 32))))
    mask = masks[0]
    seen.append((gradient, mask))
    inside = gradient[: mask.shape[0], : mask.shape[1]]
    assert (inside[~mask] == 0).all()
    assert (inside[mask] != 0).all()


# What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("dpo", {"target_margin": 1.0}, r"target_margin: dpo has no use for it \(simpo has\)"),
        ("simpo", {"label_smoothing": 0.1}, r"label_smoothing: simpo has no use for it \(dpo has\)"),
        ("kto", {"batch_size": 1}, "batch_size: kto measures its KL"),
        ("dpo", {"early_stopping_patience": 2}, "early_stopping_patience: it counts validations"),
    ],
)
def test_options_that_cannot_work_are_refused(
    base: LanguageModel, name: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        trainer_of(base, name, **options)


@pytest.mark.parametrize(
    ("name", "rows", "sentence"),
    [
        ("dpo", [], "preference rows: the list is empty"),
        (
            "dpo",
            [{"prompt": "a", "completion": "b", "reward": 1}],
            r"preference rows\[0\]: dpo learns from pairs",
        ),
        (
            "ipo",
            [PAIRS[0], {"prompt": "a", "chosen": "b"}],
            r'preference rows\[1\]: "rejected" must be a string',
        ),
        (
            "dpo",
            [{"prompt": "", "chosen": "b", "rejected": "c"}],
            r"preference rows\[0\]: the prompt is empty",
        ),
        ("kto", [PAIRS[0]], "there is one prompt only"),
        ("kto", [{"prompt": "a", "completion": "b", "reward": "x"}], r'"label" must be true or false'),
        ("dpo", [{"prompt": "a" * 2000, "chosen": "b", "rejected": "c"}], "max_sequence_length is 1024"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(base: LanguageModel, name: str, rows: Any, sentence: str) -> None:
    with pytest.raises(DataLoadError, match=sentence):
        trainer_of(base, name).train(rows)


def test_kto_reads_labels_rewards_and_pairs_alike(base: LanguageModel) -> None:
    trainer = trainer_of(base, "kto")
    by_label = [
        {"prompt": p, "completion": c, "label": g} for p, c, g in (("a", "x", True), ("b", "y", False))
    ]
    by_reward = [
        {"prompt": "a", "completion": "x", "reward": 2},
        {"prompt": "b", "completion": "y", "reward": "-1"},
    ]
    assert [c[1:] for c in trainer.encode(by_label)] == [c[1:] for c in trainer.encode(by_reward)]
    goods = [c.good for c in trainer.encode(PAIRS)]
    assert goods == [True, False] * 3


def test_kto_measures_its_kl_on_each_prompt_with_the_next_ones_answer(base: LanguageModel) -> None:
    rows = [
        {"prompt": p, "completion": c, "label": True} for p, c in (("ab", "cd"), ("q", "efg"), ("hello", "h"))
    ]
    trainer = trainer_of(base, "kto", num_steps=20, learning_rate=1e-2)
    trainer.train(rows)
    mixed = [("ab", "efg"), ("q", "h"), ("hello", "cd")]
    kl = [
        summed_logprob(trainer.policy.model, base.tokenizer, *one)[0]
        - summed_logprob(base.model, base.tokenizer, *one)[0]
        for one in mixed
    ]
    assert np.mean(kl) > 0.1
    assert trainer._prepare(trainer.encode(rows), {}).baseline == pytest.approx(np.mean(kl), rel=1e-4)


def test_no_row_is_judged_by_a_kl_of_its_own_answer(base: LanguageModel) -> None:
    """Three rows in batches of two are one batch: the third alone would be measured on its own answer."""
    rows = [
        {"prompt": p, "completion": c, "label": True} for p, c in (("ab", "cd"), ("q", "efg"), ("hello", "h"))
    ]
    trainer = trainer_of(base, "kto", num_steps=20, learning_rate=1e-2, batch_size=3)
    trainer.train(rows)
    whole = trainer.evaluate(rows)
    trainer.config = trainer.config.replace(batch_size=2)
    assert trainer.evaluate(rows) == pytest.approx(whole, rel=1e-5)


def test_the_reference_sees_a_held_out_row_once(base: LanguageModel) -> None:
    trainer = trainer_of(base, "dpo", num_steps=3, eval_every=1, micro_batch_size=1)
    assert trainer.reference is not None
    seen, logprobs = [], trainer.reference.logprobs

    def counted(tokens: Any, mask: Any) -> Any:
        seen.append(tokens.shape)
        return logprobs(tokens, mask)

    trainer.reference.logprobs = counted  # type: ignore[method-assign]
    trainer.train(PAIRS[:1], validation=PAIRS[1:])
    assert len(seen) == len(PAIRS)


def test_an_empty_answer_is_the_end_token_alone(base: LanguageModel) -> None:
    rows = [
        {"prompt": "ab", "completion": "", "label": False},
        {"prompt": "q", "completion": "x", "label": True},
    ]
    empty = trainer_of(base, "kto").encode(load_preferences(rows))[0]
    assert (empty.answers[0].completion, empty.good) == ([base.tokenizer.eos_token_id], False)


@ALL
def test_a_ranked_list_is_its_pairs(base: LanguageModel, name: str) -> None:
    lists = [
        {"prompt": "ab", "completions": ["c", "dd", "e"], "rewards": [2.0, 1.0, 1.0]},
        {"prompt": "q", "completions": ["x", "y"], "rewards": [1.0, 0.0]},
    ]
    pairs = [
        {"prompt": "ab", "chosen": "c", "rejected": "dd"},
        {"prompt": "ab", "chosen": "c", "rejected": "e"},
        {"prompt": "q", "chosen": "x", "rejected": "y"},
    ]
    trainer = trainer_of(base, name)
    assert trainer.encode(lists) == trainer.encode(pairs)
