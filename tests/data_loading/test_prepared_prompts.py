"""Prompts from files in the loop: the same as from a list, too long ones fitted and counted, read beside training."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from config.data_config import DataConfig
from config.errors import DataLoadError
from config.ppo_config import PPOConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from data_loading.loading import load_pairs, load_preferences, load_prompts
from data_loading.prepared_prompts import PreparedPrompts, Reordered
from data_loading.rows import Rows
from models.sft_model import LanguageModel
from ppo_trainer.ppo_trainer import PPOTrainer
from training.reward_trainer import RewardTrainer
from training.sft_rows import Example
from training.sft_trainer import SFTTrainer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [{"prompt": "x" * n, "n": n} for n in range(1, 11)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def prepare(tiny: LanguageModel, rows: Any, limit: int = 99, **options: Any) -> PreparedPrompts:
    return PreparedPrompts(tiny.tokenizer, rows, max_prompt_length=limit, **options)


@pytest.mark.parametrize("overflow", ["keep_end", "drop"])
def test_a_file_and_a_list_are_prepared_alike(tiny: LanguageModel, path: Path, overflow: Any) -> None:
    rows = load_prompts(path)
    held, streamed = prepare(tiny, list(rows), 6, overflow=overflow), prepare(
        tiny, rows, 6, overflow=overflow
    )
    assert list(held) == list(streamed)
    assert str(held.fitting) == str(streamed.fitting) != ""
    assert held[2:4] == streamed[2:4]
    assert list(streamed.batches([2, 0, 1], 2, 1)) == [[held[2], held[0]], [held[1]]]
    assert list(held.batches([2, 0, 1], 2, 1)) == [[held[2], held[0]], [held[1]]]


def test_what_happens_to_long_prompts_by_hand(tiny: LanguageModel, path: Path) -> None:
    """Ten prompts of 1 to 10 tokens, of which four have more than six."""
    rows = load_prompts(path)
    cut, dropped = prepare(tiny, rows, 6, overflow="keep_end"), prepare(tiny, rows, 6, overflow="drop")
    assert [len(p.ids) for p in cut] == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6]
    assert [(p.index, len(p.ids)) for p in dropped] == [(i, i + 1) for i in range(6)]
    assert (
        str(cut.fitting)
        == "4 of 10 prompts have more than 6 tokens (max_prompt_length): their last 6 were kept"
    )
    assert str(dropped.fitting).endswith("they were left out")
    with pytest.raises(DataLoadError, match=rf"^{path}:7: 7 tokens, but max_prompt_length is 6; shorten"):
        prepare(tiny, rows, 6)
    assert tiny.tokenizer.decode(list(prepare(tiny, ["abcdef"], 2, overflow="keep_end")[0].ids)) == "ef"
    with pytest.raises(DataLoadError, match="none of 1 can be used: 1 of 1 prompts have more than 2 tokens"):
        prepare(tiny, ["abcdef"], 2, overflow="drop")


def test_prompts_that_the_template_refuses_are_skipped_when_asked(tiny: LanguageModel) -> None:
    rows: list[Any] = ["a", [{"content": "no role"}], "b", 3]
    prompts = prepare(tiny, rows, on_bad_row="skip")
    assert [p.text for p in prompts] == ["a", "b"]
    assert str(prompts.fitting).startswith(
        "2 of 4 prompts cannot be used and were left out; first: prompts[1]: the chat template"
    )


def test_a_reordered_sequence_fetches_nothing_by_itself(tiny: LanguageModel, path: Path) -> None:
    prompts = prepare(tiny, load_prompts(path))
    order = Reordered(prompts, [3, 1])
    assert [p.index for p in order] == [3, 1]
    assert [p.index for p in order[1:]] == [1]
    assert len(order) == 2


def options(**more: Any) -> dict[str, Any]:
    small = {
        "model_name": "embedded",
        "fine_tune_type": "full",
        "learning_rate": 1e-3,
        "batch_size": 4,
        "seed": 1,
    }
    return {**small, **more}


def trainer(tiny: LanguageModel, folder: Path, seen: list[Any], **more: Any) -> PPOTrainer:
    def reward(prompts: list[str], completions: list[str], n: list[int]) -> list[float]:
        seen.extend(zip(prompts, n, strict=True))
        return [float(len(text)) for text in completions]

    config = PPOConfig(
        **options(
            algorithm="grpo", group_size=2, max_new_tokens=2, output_dir=str(folder), verbose=False, **more
        )
    )
    return PPOTrainer(config, model=tiny, reward_model=reward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_from_a_file_is_training_from_its_list(
    tiny: LanguageModel, path: Path, tmp_path: Path, dynamic: bool
) -> None:
    histories, orders = [], []
    for number, depth in enumerate((0, 2, 2)):
        rows: Any = load_prompts(path)
        seen: list[Any] = []
        run = trainer(tiny, tmp_path / str(number), seen, prefetch_batches=depth, dynamic_sampling=dynamic)
        result = run.train(list(rows) if number == 2 else rows, num_epochs=2)
        histories.append([epoch["avg_reward"] for epoch in result["history"]])
        orders.append(seen)
        assert all(len(prompt) == n for prompt, n in seen)  # a row's columns are its own
    assert orders[0] == orders[1] == orders[2]
    assert histories[0] == histories[1] == histories[2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_rows_are_read_by_another_thread_and_a_run_that_fails_leaves_none(
    tiny: LanguageModel, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    rows = load_prompts(path)
    read = Rows.__getitem__

    def noting(self: Rows, index: Any) -> Any:
        readers.append(threading.current_thread().name)
        return read(self, index)

    run = trainer(tiny, tmp_path / "run", [])
    monkeypatch.setattr(Rows, "__getitem__", noting)

    class Stop:
        def on_step_end(self, step: int, metrics: Any) -> None:
            readers.clear()
            if step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(rows, num_epochs=3, callbacks=[Stop()])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    run.train(rows, num_epochs=1)
    assert any(name.startswith("read-ahead") for name in readers)


def test_rows_keep_the_order_of_the_file_without_shuffle_data(
    tiny: LanguageModel, path: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []
    trainer(tiny, tmp_path / "run", seen, shuffle_data=False).train(load_prompts(path), num_epochs=1)
    assert [n for _, n in seen[::2]] == list(range(1, 11))


def test_sft_learns_pairs_chats_texts_and_tokens(tiny: LanguageModel, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sft = SFTTrainer(tiny, SFTConfig(**options(num_steps=1, max_sequence_length=40)))
    tokenizer, end = tiny.tokenizer, tiny.tokenizer.eos_token_id
    templated, text = (
        sft.encode(load_pairs([{"messages": chat}]))[0],
        sft.encode(load_pairs([{"text": "abc"}]))[0],
    )

    def halves(example: Example) -> tuple[str, str]:
        """What is not learned, and what is, but for the end token."""
        assert example.ids[-1] == end
        start = example.learned.index(True)
        assert all(example.learned[start:])
        return tokenizer.decode(example.ids[:start]), tokenizer.decode(example.ids[start:-1])

    assert halves(templated)[0].endswith("assistant\n")
    assert halves(templated)[1] == "b"
    assert halves(text) == ("a", "bc")
    tokens = sft.encode([{"prompt_ids": [1, 2], "completion_ids": [3]}])[0]
    assert (tokens.ids, tokens.learned) == ([1, 2, 3, end], [False, False, True, True])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab"}\n\n{"text": "' + "x" * 40 + '"}\n')
    assert sft.train(load_pairs(path)[:1])["loss"] > 0
    with pytest.raises(DataLoadError, match=rf"^{path}:3: 41 tokens, max_sequence_length is 40"):
        sft.train(load_pairs(path))


def test_a_reward_model_learns_from_files(tiny: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "2 4", "reward": "1.0"}\n{"text": "2 3", "reward": "0.5"}\n')
    config = RewardModelConfig(**options(num_steps=1, list_size=2))
    assert RewardTrainer(tiny, config).train(load_preferences(path))["loss"] > 0
    chats = load_preferences([{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}])
    rankings = RewardTrainer(tiny, config).encode(chats)
    assert tiny.tokenizer.decode(rankings[0].answers[0].ids).endswith("assistant\nb<|im_end|>")


def test_options_of_a_config_reach_the_prompts(
    tiny: LanguageModel, path: Path, tmp_path: Path, capsys: Any
) -> None:
    seen: list[Any] = []
    run = trainer(tiny, tmp_path / "run", seen, max_prompt_length=6, prompt_overflow="drop")
    run.train(load_prompts(path), num_epochs=1)
    assert {n for _, n in seen} == set(range(1, 7))
    assert "4 of 10 prompts have more than 6 tokens" in capsys.readouterr().out
    config = DataConfig(prompt_format="chat")
    prompt = prepare(tiny, load_prompts(["hi"], config))[0]
    assert tiny.tokenizer.decode(list(prompt.ids)).count("<|im_start|>") == 2


def test_columns_of_any_shape_are_columns(tiny: LanguageModel) -> None:
    """Keys of several kinds cannot be put in order, and a list may hold itself; rewards may want them all the same."""
    itself: list[Any] = []
    itself.append(itself)
    for column in ({1: 2, "b": 3}, {(1, 2): 3}, itself):
        prompts = prepare(tiny, [{"prompt": "ab", "meta": column}])
        assert prompts[0].columns["meta"] is column
        assert prompts.fingerprint != prepare(tiny, [{"prompt": "ab", "other": column}]).fingerprint
