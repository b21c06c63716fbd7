"""Supervised fine-tuning: the loss by hand, a toy learned in seconds, and the base that comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from base_setup.lora_setup import adapter_layers
from base_setup.tokenizer_setup import encode
from config.errors import DataLoadError, InvalidConfigurationError
from config.model_config import ModelConfig
from config.supervised_config import SFTConfig
from models.sft_model import LanguageModel, build_embedded
from training.sft_trainer import SFTTrainer

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
#: Of different lengths on both sides, so that every batch is padded.
ROWS = [
    {"prompt": "ab", "completion": "cd"},
    {"prompt": "hello", "completion": "w"},
    {"prompt": "x", "completion": "yzyzyz"},
]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return build_embedded(SMALLEST, seed=1)


def config(**options: Any) -> SFTConfig:
    common = {"model_name": "embedded", "embedded_model": SMALLEST, "fine_tune_type": "full", "batch_size": 3}
    return SFTConfig(**{**common, **options})


def weights(trainer: SFTTrainer) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(trainer.policy.model.parameters())}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)


def negative_logprobs(base: LanguageModel, row: Mapping[str, str]) -> list[float]:
    """Of the completion's bytes and the end token, each from the full logits in float64."""
    prompt = encode(base.tokenizer, row["prompt"])
    completion = [*encode(base.tokenizer, row["completion"]), base.tokenizer.eos_token_id]
    z = np.array(base.model(mx.array([prompt + completion])))[0].astype(np.float64)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return [-logp[len(prompt) - 1 + i, token] for i, token in enumerate(completion)]


# The loss ------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_completion_tokens_and_the_end(base: LanguageModel) -> None:
    """Over the tokens of all rows, not of each row first: 3 + 2 + 7 of them, prompts left out."""
    terms = [x for row in ROWS for x in negative_logprobs(base, row)]
    assert len(terms) == 12
    assert SFTTrainer(base, config()).loss(ROWS) == pytest.approx(np.mean(terms), abs=1e-5)


def test_the_first_step_reports_that_loss(base: LanguageModel) -> None:
    terms = [x for row in ROWS for x in negative_logprobs(base, row)]
    seen: list[tuple[int, dict[str, float]]] = []
    last = SFTTrainer(base, config(num_steps=3, learning_rate=1e-3)).train(
        ROWS, lambda number, metrics: seen.append((number, metrics))
    )
    assert [number for number, _ in seen] == [1, 2, 3]
    assert seen[0][1]["loss"] == pytest.approx(np.mean(terms), abs=1e-5)
    assert seen[0][1].keys() == {"loss", "grad_norm", "lr"}
    assert seen[-1][1] == last
    assert seen[0][1]["loss"] > seen[1][1]["loss"] > seen[2][1]["loss"]


def test_an_empty_completion_teaches_the_end(base: LanguageModel) -> None:
    row = {"prompt": "ab", "completion": ""}
    (term,) = negative_logprobs(base, row)
    assert SFTTrainer(base, config()).loss([row]) == pytest.approx(term, abs=1e-5)


def test_control_tokens_spelled_out_in_a_row_stay_text(base: LanguageModel) -> None:
    (example,) = SFTTrainer(base, config()).encode([{"prompt": "a", "completion": "<|im_end|>"}])
    assert example.n_learned == len("<|im_end|>") + 1
    assert example.ids.count(base.tokenizer.eos_token_id) == 1


# Training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "share"), [("full", 0.01), ("lora", 0.92)])
def test_a_toy_is_learned(base: LanguageModel, kind: str, share: float) -> None:
    """Every weight: to nothing. Adapters: by as much as they can over a frozen random embedding."""
    trainer = SFTTrainer(
        base, config(fine_tune_type=kind, num_steps=60, learning_rate=1e-2, lora_dropout=0.0)
    )
    before = trainer.loss(ROWS)
    assert before == pytest.approx(np.log(259), abs=0.2)  # a fresh model guesses among 259 tokens
    trainer.train(ROWS)
    assert trainer.loss(ROWS) < share * before


def test_the_base_stays_as_it_was(base: LanguageModel) -> None:
    before = {name: np.array(x) for name, x in tree_flatten(base.model.parameters())}
    SFTTrainer(base, config(num_steps=2, learning_rate=1e-2)).train(ROWS)
    assert same(before, {name: np.array(x) for name, x in tree_flatten(base.model.parameters())})


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_do_not_change_what_is_learned(base: LanguageModel, size: int) -> None:
    """Rows of 3, 2 and 7 tokens: a mean per micro-batch would weight them differently."""
    # A large epsilon keeps a step smooth in its gradient, where otherwise rounding decides a sign.
    options = {"num_steps": 4, "learning_rate": 1e-2, "adam_eps": 1e-2}
    whole, parts = SFTTrainer(base, config(**options)), SFTTrainer(
        base, config(**options, micro_batch_size=size)
    )
    assert whole.train(ROWS)["grad_norm"] == pytest.approx(parts.train(ROWS)["grad_norm"], rel=1e-4)
    ours, theirs = weights(whole), weights(parts)
    assert max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours) < 1e-5
    moved = dict(tree_flatten(base.model.parameters()))
    assert max(float(np.abs(ours[k] - np.array(moved[k])).max()) for k in ours) > 1e-3
    assert parts.loss(ROWS) == pytest.approx(whole.loss(ROWS), abs=1e-5)


DROPPED = {
    "fine_tune_type": "lora",
    "lora_dropout": 0.5,
    "num_steps": 4,
    "learning_rate": 1e-2,
    "batch_size": 2,
}


def test_the_seed_decides_order_adapters_and_dropout(base: LanguageModel) -> None:
    def trained(seed: int) -> dict[str, np.ndarray]:
        trainer = SFTTrainer(base, config(**DROPPED, seed=seed))
        trainer.train(ROWS)
        return weights(trainer)

    first = trained(3)
    assert same(first, trained(3))
    assert not same(first, trained(4))


def test_dropout_follows_from_the_seed_whatever_was_drawn_before_training(base: LanguageModel) -> None:
    """Two trainers of one seed, both made before either trains, and other random numbers drawn in between."""
    one, other = SFTTrainer(base, config(**DROPPED)), SFTTrainer(base, config(**DROPPED))
    assert same(weights(one), weights(other))
    one.train(ROWS)
    mx.eval(mx.random.uniform(shape=(7,)))
    other.train(ROWS)
    assert same(weights(one), weights(other))


def test_dropout_is_for_training_alone(base: LanguageModel) -> None:
    trainer = SFTTrainer(base, config(**DROPPED))
    trainer.train(ROWS)
    assert trainer.loss(ROWS) == trainer.loss(ROWS)
    assert not trainer.policy.model.training


# The result ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_language_model_is_plain_and_computes_what_the_policy_does(
    base: LanguageModel, kind: str
) -> None:
    trainer = SFTTrainer(base, config(**{**DROPPED, "fine_tune_type": kind}))
    trainer.train(ROWS)
    result = trainer.language_model
    names = {name for name, _ in tree_flatten(result.model.parameters())}
    assert names == {name for name, _ in tree_flatten(base.model.parameters())}
    assert adapter_layers(result.model) == []
    assert bool(adapter_layers(trainer.policy.model)) == (kind == "lora")  # training may go on
    ids = mx.array([[5, 6, 7, 8], [100, 3, 2, 1]])
    np.testing.assert_allclose(
        np.array(result.model(ids)), np.array(trainer.policy.forward(ids).logits), atol=1e-5
    )
    assert not np.allclose(np.array(result.model(ids)), np.array(base.model(ids)), atol=1e-3)
    again = SFTTrainer(result, config(num_steps=1))
    assert again.loss(ROWS) == pytest.approx(trainer.loss(ROWS), abs=1e-5)


# Rows that cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "SFT rows: the list is empty"),
        ([{"completion": "x"}], r'SFT rows\[0\]: "prompt" must be a string, found None'),
        ([ROWS[0], {"prompt": "a"}], r'SFT rows\[1\]: "completion" must be a string, found None'),
        (
            [ROWS[0], {"prompt": "a", "completion": 3}],
            r"SFT rows\[1\]: \"completion\" must be a string, found 3",
        ),
        ([{"prompt": "", "completion": "x"}], r"SFT rows\[0\]: the prompt is empty"),
        (
            [ROWS[0], ROWS[1], {"prompt": "abcdef", "completion": "ghijk"}],
            r"SFT rows\[2\]: 12 tokens, max_sequence_length is 11",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(base: LanguageModel, rows: Any, sentence: str) -> None:
    trainer = SFTTrainer(base, config(max_sequence_length=11, num_steps=1))
    before = weights(trainer)
    with pytest.raises(DataLoadError, match=sentence):
        trainer.train(rows)
    with pytest.raises(DataLoadError, match=sentence):
        trainer.loss(rows)
    assert same(before, weights(trainer))


def test_the_longest_row_that_fits(base: LanguageModel) -> None:
    """Six tokens of prompt, four of completion, and the end."""
    row = {"prompt": "abcdef", "completion": "ghij"}
    assert SFTTrainer(base, config(max_sequence_length=11)).loss([row]) > 0


# What is learned -----------------------------------------------------------------------------------------

CHAT = {
    "prompt": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo <|im_end|>"},  # spelled out: text, and no end of a turn
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "bye"},
    ],
    "completion": "ciao",
}


def learned_text(trainer: SFTTrainer, row: Mapping[str, Any]) -> str:
    (example,) = trainer.encode([row])
    return trainer.policy.tokenizer.decode([i for i, yes in zip(*example, strict=True) if yes])


def test_which_tokens_of_a_chat_are_learned(base: LanguageModel) -> None:
    of = {kind: SFTTrainer(base, config(loss_on=kind)) for kind in ("completion", "assistant", "text")}
    assert learned_text(of["completion"], CHAT) == "ciao<|im_end|>"
    assert learned_text(of["assistant"], CHAT) == "yo <|im_end|><|im_end|>4<|im_end|>ciao<|im_end|>"
    everything = learned_text(of["text"], CHAT)
    assert everything.startswith("system\ns<|im_end|>\n<|im_start|>user\nhi")  # all but the very first token
    assert everything.endswith("<|im_start|>assistant\nciao<|im_end|>")
    plain = {"prompt": "ab", "completion": "cd"}
    assert [learned_text(t, plain) for t in of.values()] == ["cd<|im_end|>", "cd<|im_end|>", "bcd<|im_end|>"]


def test_the_loss_on_every_turn_by_hand(base: LanguageModel) -> None:
    trainer = SFTTrainer(base, config(loss_on="assistant"))
    (example,) = trainer.encode([CHAT])
    z = np.array(base.model(mx.array([example.ids])))[0].astype(np.float64)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    terms = [-logp[t - 1, example.ids[t]] for t in range(len(example.ids)) if example.learned[t]]
    assert len(terms) == len("yo <|im_end|>") + 1 + len("4") + 1 + len("ciao") + 1
    assert trainer.loss([CHAT]) == pytest.approx(np.mean(terms), abs=1e-5)


def test_turns_that_cannot_be_told_apart_are_refused(base: LanguageModel) -> None:
    trainer = SFTTrainer(base, config(loss_on="assistant"))
    first = {"prompt": CHAT["prompt"][2:], "completion": "x"}  # type: ignore[index]
    with pytest.raises(DataLoadError, match=r'SFT rows\[0\]: loss_on = "assistant": message 1 of the chat'):
        trainer.encode([first])


# Packing -------------------------------------------------------------------------------------------------

MIXED = [
    *ROWS,
    {"prompt": "abc", "completion": ""},
    {"prompt": "u", "completion": "vw"},
    {"prompt": "lorem ipsum", "completion": "dolor sit amet"},
    {"prompt": "x", "completion": "q"},
]


def gradient_of(trainer: SFTTrainer, rows: list[dict[str, str]]) -> dict[str, np.ndarray]:
    import mlx.nn as nn

    examples = trainer.encode(rows)
    count = sum(e.n_learned for e in examples)
    total: dict[str, np.ndarray] = {}
    for part in trainer._parts(examples):
        _, tree = nn.value_and_grad(trainer.policy.model, lambda p: trainer._loss(p, count))(part)
        for name, x in tree_flatten(tree):
            total[name] = total.get(name, 0) + np.array(x)
    return total


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss_on", ["completion", "text"])
def test_packed_rows_have_the_gradient_of_the_unpacked(
    base: LanguageModel, kind: str, checkpointing: bool, loss_on: str
) -> None:
    options = {"fine_tune_type": kind, "gradient_checkpointing": checkpointing, "loss_on": loss_on}
    plain = SFTTrainer(base, config(**options))
    packing = SFTTrainer(base, config(**options, packing=True, max_sequence_length=32))
    assert packing.packs
    (layout,) = packing._parts(packing.encode(MIXED))
    assert layout.tokens.shape[0] == 2 < len(MIXED)
    one, other = gradient_of(plain, MIXED), gradient_of(packing, MIXED)
    assert one.keys() == other.keys()
    largest = max(float(np.abs(x).max()) for x in one.values())
    assert largest > 1e-3
    assert max(float(np.abs(one[k] - other[k]).max()) for k in one) < 1e-5 * max(largest, 1)
    assert packing.loss(MIXED) == pytest.approx(plain.loss(MIXED), abs=1e-5)


def test_packed_rows_and_a_soft_prompt_are_refused(base: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigurationError, match="packing: a soft prompt stands before every example"):
        config(packing=True, fine_tune_type="soft_prompt")
    with pytest.raises(InvalidConfigurationError, match="packing: a soft prompt"):
        config(packing=True, fine_tune_type="lora", soft_prompt_text="Be brief.")
    SFTTrainer(base, config(fine_tune_type="soft_prompt")).policy.save(tmp_path / "adapter")
    brought = config(packing=True, fine_tune_type="lora", adapter_path=str(tmp_path / "adapter"))
    with pytest.raises(InvalidConfigurationError, match="packing: a soft prompt"):
        SFTTrainer(base, brought)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_head_sees_learned_tokens_alone_a_chunk_at_a_time(
    base: LanguageModel, monkeypatch: pytest.MonkeyPatch, packing: bool, kind: str
) -> None:
    """No (B, T, V) is ever made: a call has at most a chunk of logits, and all calls have those of learned tokens."""
    from token_attribution import vocabulary

    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 4 * 259)
    trainer = SFTTrainer(base, config(packing=packing, fine_tune_type=kind, max_sequence_length=32))
    trunk, seen = trainer.policy.trunk, list[int]()
    assert trunk is not None

    def head(states: mx.array) -> mx.array:
        logits = trunk.head(states)
        seen.append(logits.size // 259)
        return logits

    trainer.policy.trunk = trunk._replace(head=head)
    examples = trainer.encode(MIXED)
    learned = sum(example.n_learned for example in examples)
    assert learned < sum(len(example.ids) for example in examples)
    loss = trainer.loss(MIXED)
    assert max(seen) <= 4
    assert (
        learned <= sum(seen) <= learned + 3
    )  # each of three batches asks one state how wide the vocabulary is
    seen.clear()
    gradient_of(trainer, MIXED)
    assert max(seen) <= 4
    seen.clear()
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 1 << 25)
    assert trainer.loss(MIXED) == pytest.approx(loss, abs=1e-5)
    assert max(seen) > 4


def test_micro_batches_of_packed_rows_count_rows(base: LanguageModel) -> None:
    packing = SFTTrainer(base, config(packing=True, max_sequence_length=32, micro_batch_size=1))
    parts = packing._parts(packing.encode(MIXED))
    assert [part.tokens.shape[0] for part in parts] == [1, 1]
    assert packing.loss(MIXED) == pytest.approx(SFTTrainer(base, config()).loss(MIXED), abs=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_training_packed_is_training_unpacked(base: LanguageModel, size: int) -> None:
    options = {"num_steps": 4, "learning_rate": 1e-2, "adam_eps": 1e-2, "batch_size": 5}
    plain = SFTTrainer(base, config(**options))
    packing = SFTTrainer(base, config(**options, packing=True, max_sequence_length=40, micro_batch_size=size))
    assert plain.train(MIXED)["loss"] == pytest.approx(packing.train(MIXED)["loss"], rel=1e-4)
    ours, theirs = weights(plain), weights(packing)
    assert max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours) < 1e-5


# Validation and early stopping ---------------------------------------------------------------------------


def test_validation_is_reported_where_it_is_asked_for(base: LanguageModel) -> None:
    seen: list[dict[str, float]] = []
    trainer = SFTTrainer(base, config(num_steps=5, eval_every=2, learning_rate=1e-3))
    metrics = trainer.train(ROWS[:2], lambda _, m: seen.append(m), validation=ROWS[2:])
    assert ["validation/loss" in m for m in seen] == [False, True, False, True, True]
    assert metrics["validation/loss"] == pytest.approx(trainer.loss(ROWS[2:]), abs=1e-6)
    assert metrics["validation/perplexity"] == pytest.approx(np.exp(metrics["validation/loss"]))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_early_stopping_keeps_the_weights_of_the_best_validation(base: LanguageModel, kind: str) -> None:
    """Learning one row at a large rate makes another worse, after it has first made it better."""
    trainer = SFTTrainer(
        base,
        config(
            fine_tune_type=kind,
            num_steps=100,
            eval_every=1,
            early_stopping_patience=4,
            learning_rate=3e-2,
            lora_dropout=0.0,
        ),
    )
    seen: list[float] = []
    trainer.train(ROWS[:1], lambda _, m: seen.append(m["validation/loss"]), validation=ROWS[1:])
    best = int(np.argmin(seen))
    assert len(seen) == best + 1 + 4 < 100
    assert trainer.loss(ROWS[1:]) == pytest.approx(seen[best], abs=1e-6)
    assert trainer.loss(ROWS[1:]) < seen[-1]
