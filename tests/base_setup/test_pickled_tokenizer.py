"""A pickled tiktoken encoding: its ids, and nothing of what a hostile file asks for."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx_lm
import pytest

import main
from base_setup.pickled_tokenizer import load_pickled_tokenizer
from base_setup.tokenizer_setup import encode, encode_prompt, end_token_ids
from config.errors import ModelLoadError
from config.ppo_config import PPOConfig
from config.training_config import TrainingConfig
from models.sft_model import load_language_model, save_language_model
from ppo_trainer.ppo_trainer import PPOTrainer

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s+(?!\S)|\s+"
)
RANKS = {bytes([byte]): byte for byte in range(256)} | {
    token: 256 + i
    for i, token in enumerate([b"he", b"ll", b" w", b"llo", b"or", b"hello", b" wor", "é".encode()])
}
STATE = {
    "name": "tiny",
    "pat_str": PATTERN,
    "mergeable_ranks": RANKS,
    "special_tokens": {"<|endoftext|>": 264, "<|user|>": 265},
}


class Encoding:
    """Pickled as tiktoken's own is: the class by its name, and a state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getstate__(self) -> Any:
        return self.state


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    module = ModuleType("tiktoken.core")
    module.Encoding = Encoding  # type: ignore[attr-defined]
    monkeypatch.setattr(Encoding, "__module__", "tiktoken.core")
    monkeypatch.setitem(sys.modules, "tiktoken", ModuleType("tiktoken"))
    monkeypatch.setitem(sys.modules, "tiktoken.core", module)

    def written(**changes: Any) -> Path:
        path = tmp_path / "tokenizer.pkl"
        path.write_bytes(pickle.dumps(Encoding({**STATE, **changes})))
        return path

    return written


def merged(word: bytes) -> list[int]:
    """Byte-pair encoding as tiktoken defines it: the two neighbours whose sum has the lowest rank, first of all."""
    parts = [bytes([byte]) for byte in word]
    while True:
        sums = [(RANKS.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
        if not sums or min(sums)[0] == 1 << 30:
            return [RANKS[part] for part in parts]
        _, i = min(sums)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_its_ids_are_those_of_its_ranks(write: Callable[..., Path]) -> None:
    tokenizer = load_pickled_tokenizer(write())
    words = ["hello", " world", " 12", "3", " hellor", "é", "llo", "!\n", "'ll"]
    expected = {word: merged(word.encode()) for word in words}
    assert expected["hello"] == [261]
    assert expected[" world"] == [262, ord("l"), ord("d")]
    for word in ("hello", " world", "é", "llo", "'ll"):
        assert encode(tokenizer, word) == expected[word], word
    text = "hello world, 123 hellors é!\n"
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, "123") == [ord("1"), ord("2"), ord("3")]
    assert len(tokenizer) == 266
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 264
    assert 264 not in encode(tokenizer, "<|endoftext|>")  # spelled out in a text it stays text
    messages = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "2?"}]
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == "Hi.\n\nUser: 2?\nAssistant: "


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_nothing_else_is_made_from_a_file(write: Callable[..., Path], tmp_path: Path) -> None:
    path, marker = tmp_path / "tokenizer.pkl", tmp_path / "marker"
    for hostile in (_Runs(marker), Encoding({**STATE, "name": _Runs(marker)}), print, Path("x")):
        path.write_bytes(pickle.dumps(hostile))
        with pytest.raises(ModelLoadError, match="and nothing else is read"):
            load_pickled_tokenizer(path)
        assert not marker.exists()
    for damaged in (b"", pickle.dumps(Encoding(STATE))[:-40], b"\x80\x04garbage"):
        path.write_bytes(damaged)
        with pytest.raises(ModelLoadError, match="a pickled tiktoken encoding is expected"):
            load_pickled_tokenizer(path)
    path.write_bytes(pickle.dumps(Encoding("gpt2")))
    with pytest.raises(ModelLoadError, match="with its ranks is expected, found one by name"):
        load_pickled_tokenizer(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ModelLoadError, match="found none"):
        load_pickled_tokenizer(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"special_tokens": {"<|user|>": 264}}, r"is expected among the special tokens, found <\|user\|>"),
        ({"special_tokens": {"<|endoftext|>": 3}}, "an id of its own for each token"),
        ({"mergeable_ranks": {b"a": 0}}, "lack the byte 0"),
        ({"pat_str": "("}, "cannot be rebuilt"),
        ({"pat_str": None}, "pat_str, mergeable_ranks and special_tokens are expected"),
    ],
)
def test_an_encoding_that_is_none_is_refused(
    write: Callable[..., Path], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelLoadError, match=sentence):
        load_pickled_tokenizer(write(**changes))


@pytest.fixture
def folder(write: Callable[..., Path], make_config: Callable[..., Any], tmp_path: Path) -> Path:
    """A model of 266 tokens whose only tokenizer is a pickled encoding."""
    base = load_language_model(make_config(new_special_tokens=[f"<{i}>" for i in range(7)]))
    save_language_model(base, tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    write().rename(tmp_path / "model" / "tokenizer.pkl")
    return tmp_path / "model"


def test_a_model_with_one_trains(folder: Path, make_config: Callable[..., Any], tmp_path: Path) -> None:
    config = make_config(
        PPOConfig,
        model_name=str(folder),
        algorithm="grpo",
        batch_size=1,
        group_size=4,
        max_new_tokens=4,
        learning_rate=1e-2,
        output_dir=str(tmp_path / "run"),
        verbose=False,
    )
    trainer = PPOTrainer(config, reward_model=lambda completions, **_: [float(len(c)) for c in completions])
    assert trainer.train(["hello world"], num_epochs=2)["objective/kl"] != 0


def test_an_answer_ends_where_the_config_says_here_and_where_it_is_saved(
    folder: Path, tmp_path: Path
) -> None:
    """``<|user|>``, 265, beside the tokenizer's own 264: as mlx-lm has it for every other tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 265}))
    base = load_language_model(TrainingConfig(model_name=str(folder)))
    assert end_token_ids(base.tokenizer) == {264, 265}
    save_language_model(base, tmp_path / "saved")
    assert set(mlx_lm.load(str(tmp_path / "saved"))[1].eos_token_ids) == {264, 265}


def test_every_command_takes_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, talked to and fused; the fused model has a tokenizer that mlx-lm reads by itself."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello world", "answer": "hello"}\n')
    run, fused = str(tmp_path / "run"), str(tmp_path / "fused")
    small = "--batch-size 1 --group-size 2 --num-steps 1 --max-new-tokens 4 --lora-r 4 --rewards jaccard"
    words = ["--model-name", str(folder), "--train-path", str(prompts), "--output-dir", run]
    assert main.main(["train", "--algorithm", "grpo", *words, *small.split()]) == 0
    capsys.readouterr()
    assert main.main(["generate", "--adapter-path", run, "-p", "hello", "-m", "4", "--temp", "0"]) == 0
    said = capsys.readouterr().out
    assert main.main(["fuse", "--adapter-path", run, "--save-path", fused]) == 0
    model, tokenizer = mlx_lm.load(fused)
    assert tokenizer.encode("hello") == [261]
    assert mlx_lm.generate(model, tokenizer, [261], max_tokens=4) + "\n" == said
