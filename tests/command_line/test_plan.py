"""What a plan says, by arithmetic; that it needs no weight; and what its memory is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from command_line.plan import supervised_memory
from config.model_config import ModelConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from models.sft_model import build_embedded, load_language_model
from tests.command_line.conftest import TINY, write_rows
from training.reward_trainer import RewardTrainer
from training.sft_trainer import SFTTrainer


@pytest.fixture
def bare_model(workplace: Path) -> Path:
    """A model folder without any weight: config.json and a tokenizer."""
    model = build_embedded(ModelConfig(**TINY), 0)
    folder = workplace / "bare"
    model.tokenizer.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(model.config))
    return folder


def test_a_dry_run_needs_no_weight_and_leaves_nothing(
    workplace: Path, bare_model: Path, command: Callable[..., Any]
) -> None:
    """6 prompts in batches of 4 are 2 steps an epoch; 3 epochs × 4 prompts × 2 completions × 5 tokens."""
    before = sorted(workplace.rglob("*"))
    words = ("--model-name", "bare", "--train-path", "prompts.jsonl", "--dry-run", "--batch-size", "4")
    done = command(
        *("train", *words, "--algorithm", "grpo", "--group-size", "2", "--num-epochs", "3"),
        *("--max-new-tokens", "5", "--minibatch-size", "4", "--val-path", "pairs.jsonl"),
    )
    assert done.code == 0, done.err
    assert "  run      grpo on bare, adapters of rank 16 train, seed 0\n" in done.out
    assert (
        "6 prompts of 3 tokens, 12 for validation, of which 6 have a prompt that is trained on, too"
        in done.out
    )
    assert "3 epochs × 2 = 6 steps of 4 prompts × 2 completions, 2 updates each" in done.out
    assert f"at most {6 * 4 * 2 * 5} sampled" in done.out
    assert (
        "4 prompts × 2 completions, 3 + 5 tokens" in done.out
    )  # the memory is that of the data's own lengths
    for name, stage in (("sft", "pairs"), ("reward-model", "preferences")):
        done = command(name, *words[:2], "--train-path", f"{stage}.jsonl", *words[4:], "--num-steps", "6")
        assert done.code == 0, done.err
        assert "6 steps of 4 rows, 2 passes over the rows" in done.out
    assert sorted(workplace.rglob("*")) == before
    refused = command("train", *words[:4], "--output-dir", "runs/x")
    assert refused.code == 1
    assert "could not be loaded" in refused.err


def test_the_tokens_of_rows_are_counted(workplace: Path, command: Callable[..., Any]) -> None:
    """A byte a token: "10 " + "12 14" + the end token are 9; of a pair the longer answer counts."""
    words = ("--model-name", "embedded", "--dry-run", "--train-path")
    assert "12 rows of 9 tokens" in command("sft", *words, "pairs.jsonl").out
    write_rows(workplace / "two.jsonl", [{"prompt": "12", "chosen": "3", "rejected": "4567"}] * 2)
    assert "2 rows of 7 tokens" in command("reward-model", *words, "two.jsonl").out
    for stage, file in (("sft", "pairs.jsonl"), ("reward-model", "two.jsonl")):
        refused = command(stage, *words, file, "--max-sequence-length", "6")
        assert refused.code == 1
        assert f"{file}:1: " in refused.err
        assert "max_sequence_length is 6" in refused.err


def test_prompts_that_are_too_long_are_dropped_or_cut(workplace: Path, command: Callable[..., Any]) -> None:
    write_rows(workplace / "p.jsonl", [{"prompt": "1"}, {"prompt": "12345"}])
    words = (
        "train",
        "--model-name",
        "embedded",
        "--train-path",
        "p.jsonl",
        "--max-prompt-length",
        "4",
        "--dry-run",
    )
    assert "p.jsonl:2: 5 tokens" in command(*words).err
    assert "prompts of 1 to 4 tokens" in command(*words, "--prompt-overflow", "keep_end").out
    assert "prompts of 1 tokens" in command(*words, "--prompt-overflow", "drop").out


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("cls", [SFTConfig, RewardModelConfig])
def test_the_memory_of_supervised_stages_is_near_what_mlx_counts(cls: Any, kind: str) -> None:
    """Within a factor of 2 either way."""
    shape = ModelConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_layers=4, intermediate_size=384
    )
    config = cls(model_name="embedded", embedded_model=shape, batch_size=4, num_steps=1, fine_tune_type=kind)
    start = mx.get_active_memory()
    base = load_language_model(config)
    answers = ("completion",) if cls is SFTConfig else ("chosen", "rejected")
    rows = [{"prompt": "a" * 64, **{name: name[0] * 63 for name in answers}}] * 4
    trainer: Any = SFTTrainer(base, config) if cls is SFTConfig else RewardTrainer(base, config)
    mx.reset_peak_memory()
    trainer.train(rows)
    measured = mx.get_peak_memory() - start
    assert 1 / 2 < supervised_memory(config, 128).peak / measured < 2


def test_a_plan_counts_the_prompts_that_are_left(workplace: Path, command: Callable[..., Any]) -> None:
    """One of 4 is too long."""
    rows = [{"prompt": "1"}, {"prompt": "12345"}, {"prompt": "2"}, {"prompt": "3"}]
    write_rows(workplace / "p.jsonl", rows)
    words = ("train", "--model-name", "embedded", "--train-path", "p.jsonl", "--max-prompt-length", "4")
    done = command(*words, "--prompt-overflow", "drop", "--batch-size", "1", "--num-epochs", "2", "--dry-run")
    assert "data     3 prompts of 1 tokens" in done.out
    assert "2 epochs × 3 = 6 steps" in done.out
    assert "1 of 4 prompts have more than 4 tokens (max_prompt_length): they were left out" in done.out
    done = command(*words, "--prompt-overflow", "keep_end", "--dry-run")
    assert "data     4 prompts" in done.out
    assert "their last 4 were kept" in done.out


def test_a_prompt_that_no_template_takes_is_skipped_where_rows_may_be(
    workplace: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import command_line.checks as checks

    tokenizer = checks.byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    monkeypatch.setattr(checks, "byte_tokenizer", lambda: tokenizer)
    write_rows(workplace / "p.jsonl", [{"prompt": "1"}, {"prompt": [{"role": "user", "content": "2"}]}])
    words = ("train", "--model-name", "embedded", "--train-path", "p.jsonl", "--dry-run")
    assert command(*words).code == 1
    done = command(*words, "--on-bad-row", "skip")
    assert done.code == 0, done.err
    assert "data     1 prompts" in done.out
    assert "p.jsonl:2: " in done.out
