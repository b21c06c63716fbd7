"""Which rows: filters, drawing, splitting without leaks, and where a config says they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config.data_config import DataConfig
from config.errors import DataLoadError, InvalidConfigurationError
from config.training_config import TrainingConfig
from data_loading.loading import load_data, load_pairs, load_prompts
from data_loading.normalising import normalised, prompt_key
from examples.digits_data import write_splits


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(tmp_path: Path, count: int = 20) -> str:
    return write(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "i": i} for i in range(count)])


def test_prompts_are_one_up_to_case_space_and_spelling() -> None:
    same = [
        "What is\n2 + 2?",
        "  what IS 2 + 2? ",
        "What\u00a0is 2 + 2?",
        [{"role": "user", "content": "WHAT is 2 + 2?"}],
    ]
    assert len({normalised(prompt) for prompt in same}) == 1
    assert normalised("Straße ﬁ") == normalised("STRASSE fi")
    assert normalised("2+2") != normalised("2 + 2")
    system = {"role": "system", "content": "s"}
    assert normalised([system, {"role": "user", "content": "a"}]) == normalised("a")
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert normalised(two) != normalised("a b")
    assert prompt_key({"prompt": "A "}) == prompt_key({"prompt": "a"}) != prompt_key({"prompt": "b"})
    assert prompt_key({"text": "a"}) != prompt_key({"text": "b"})


def test_filters_look_into_every_text_of_a_row() -> None:
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "meta": {"x": ["See HTTP://y"]}},
        {"prompt": "http"},
        {"prompt": 3, "u": "http:"},
    ]
    kept = load_prompts(rows, DataConfig(filter_keywords=["http:"]))
    assert [row["prompt"] for row in kept] == ["a", "http"]
    assert (kept.report.filtered, kept.report.skipped) == (2, 0)  # what is left out need not be good
    with pytest.raises(DataLoadError, match="filter_keywords leaves none of 1 rows"):
        load_prompts(["abc"], DataConfig(filter_keywords=["B"]))


def test_max_samples_draws_by_the_seed_or_takes_the_first(tmp_path: Path) -> None:
    path = numbered(tmp_path)

    def drawn(**options: Any) -> list[int]:
        return [row["i"] for row in load_prompts(path, TrainingConfig(max_samples=5, **options))]

    assert drawn(shuffle_data=False) == [0, 1, 2, 3, 4]
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert len(set(drawn(seed=3))) == 5
    report = load_prompts(path, TrainingConfig(max_samples=5)).report
    assert (report.rows, report.used, report.not_drawn) == (20, 5, 15)
    assert "15 left out by max_samples" in str(report)


def test_a_share_is_set_aside_and_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    """Forty rows of ten prompts, spelled differently: whole prompts move."""
    rows = [
        {"prompt": f"{'  ' * (i % 3)}Prompt {i % 10}".upper() if i % 2 else f"prompt {i % 10}", "i": i}
        for i in range(40)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    config = TrainingConfig(train_path=path, validation_fraction=0.2, seed=4)
    train, validation, leaks = load_data(config, "prompts")
    assert validation is not None
    sides = [{normalised(row["prompt"]) for row in side} for side in (train, validation)]
    assert leaks == 0
    assert not sides[0] & sides[1]
    assert (len(train), len(validation)) == (32, 8)  # two prompts of four rows each
    assert sorted(row["i"] for side in (train, validation) for row in side) == list(range(40))
    assert (train.report.set_aside, train.report.used) == (8, 32)
    # Neither the order of the rows nor anything but the seed moves a prompt to the other side.
    write(tmp_path / "rows.jsonl", rows[::-1])
    assert {normalised(row["prompt"]) for row in load_data(config, "prompts").validation or ()} == sides[1]
    other = load_data(config.replace(seed=5), "prompts").validation or ()
    assert {normalised(row["prompt"]) for row in other} != sides[1]
    with pytest.raises(DataLoadError, match="validation_fraction: 1 different prompts cannot be split"):
        load_data(
            TrainingConfig(train_path=write(tmp_path / "one.jsonl", rows[:1]), validation_fraction=0.5),
            "prompts",
        )


def test_leaks_between_given_files_are_counted(tmp_path: Path) -> None:
    config = TrainingConfig(
        train_path=numbered(tmp_path),
        val_path=write(tmp_path / "val.jsonl", [{"prompt": "P3 "}, {"prompt": "new"}]),
    )
    assert load_data(config, "prompts").leaks == 1
    # A row that max_samples leaves out is not trained on.
    assert load_data(config.replace(max_samples=3, shuffle_data=False), "prompts").leaks == 0


def test_a_config_names_its_sources(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigurationError, match="train_path: nothing to train on"):
        load_data(DataConfig(), "prompts")
    write(tmp_path / "train.jsonl", [{"prompt": "a"}])
    write(tmp_path / "valid.jsonl", [{"prompt": "b"}])
    train, validation, _ = load_data(DataConfig(train_path=str(tmp_path)), "prompts")
    assert [row["prompt"] for row in (*train, *(validation or ()))] == ["a", "b"]
    assert load_data(DataConfig(train_path=str(tmp_path / "train.jsonl")), "prompts").validation is None
    named = DataConfig(dataset_name=str(tmp_path), dataset_val_split="validation")
    train, validation, _ = load_data(named, "prompts")
    assert [row["prompt"] for row in (*train, *(validation or ()))] == ["a", "b"]
    # A local file overrides the data set by name.
    local = DataConfig(dataset_name="nobody/nothing", train_path=str(tmp_path / "valid.jsonl"))
    assert [row["prompt"] for row in load_data(local, "prompts").train] == ["b"]


def test_the_digit_files_are_read_by_both_supervised_stages(tmp_path: Path) -> None:
    paths = write_splits(tmp_path, num_samples=5, multiple_of=2)
    config = DataConfig(train_path=str(paths["train"]), val_path=str(paths["valid"]))
    train, validation, leaks = load_data(config, "preferences")
    assert (len(train), len(validation or ()), leaks) == (5, 5, 0)
    assert all(0 <= row["reward"] <= 1 and row["prompt"] == "" for row in train)
    assert all(set(row) == {"text"} for row in load_pairs(paths["test"]))
