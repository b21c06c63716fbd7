"""The digit data: the rule by which it is drawn, the files, the prompts, the command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from config.errors import DataLoadError, InvalidConfigurationError
from examples.digits_data import (
    digit_prompt_splits,
    digit_prompts,
    generate_sequences,
    main,
    scored_sequences,
    split_query,
    write_splits,
)
from rewards.sequential_digits import digit_score


def numbers_of(text: str) -> list[int]:
    return [int(word) for word in text.split(" ")]


@pytest.mark.parametrize("multiple", [1, 2, 3, 7, 20])
def test_increasing_sequences_without_noise(multiple: int) -> None:
    for text in generate_sequences(300, increasing=True, multiple_of=multiple, seed=multiple):
        numbers = numbers_of(text)
        assert 1 + 5 <= len(numbers) <= 1 + 15
        assert all(number % multiple == 0 for number in numbers)
        assert 1 <= numbers[0] <= 200 + multiple
        assert all(1 <= after - before <= 50 + multiple for before, after in pairwise(numbers))
        assert digit_score("", text, multiple=multiple) == 1.0


@pytest.mark.parametrize("multiple", [1, 2, 3, 7, 20])
def test_decreasing_sequences_without_noise(multiple: int) -> None:
    for text in generate_sequences(300, increasing=False, multiple_of=multiple, seed=multiple):
        numbers = numbers_of(text)
        assert 101 <= numbers[0] <= 1000 + multiple
        assert all(1 <= before - after < 10 + multiple for before, after in pairwise(numbers))
        assert digit_score("", text, increasing=False, multiple=multiple) == 1.0


def test_lengths_reach_both_ends_and_noise_breaks_sequences() -> None:
    lengths = {len(numbers_of(text)) - 1 for text in generate_sequences(500, min_length=2, max_length=6)}
    assert lengths == {2, 3, 4, 5, 6}
    arbitrary = [numbers_of(text)[1:] for text in generate_sequences(200, noise=1.0)]
    assert all(-100 <= number <= 100 for row in arbitrary for number in row)


def test_one_seed_is_one_set_of_sequences() -> None:
    assert generate_sequences(20, seed=3) == generate_sequences(20, seed=3)
    assert generate_sequences(20, seed=3) != generate_sequences(20, seed=4)


def test_scored_sequences_carry_the_reward_of_the_whole_line_as_text() -> None:
    rows = scored_sequences(200, multiple_of=2, noise=0.3, seed=1)
    assert all(set(row) == {"text", "reward"} for row in rows)
    assert all(row["reward"] == str(digit_score("", row["text"], multiple=2)) for row in rows)
    assert len({row["reward"] for row in rows}) > 5  # a reward model needs differences
    assert {row["reward"] for row in scored_sequences(50, multiple_of=2, noise=0.0)} == {"1.0"}


def test_the_files_have_the_format_and_share_no_sequence(tmp_path: Path) -> None:
    paths = write_splits(tmp_path / "new", num_samples=150, multiple_of=2, noise=0.0, seed=5)
    assert [path.name for path in paths.values()] == [
        "increasing_mult_2_train.jsonl",
        "increasing_mult_2_valid.jsonl",
        "increasing_mult_2_test.jsonl",
    ]
    texts: list[str] = []
    for path in paths.values():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == 150
        assert all(row["reward"] == "1.0" for row in rows)
        texts += [row["text"] for row in rows]
    assert len(set(texts)) == 3 * 150
    again = write_splits(tmp_path / "again", num_samples=150, multiple_of=2, noise=0.0, seed=5)
    assert [path.read_bytes() for path in again.values()] == [path.read_bytes() for path in paths.values()]


def test_more_samples_than_there_are_sequences_ends_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigurationError, match="different sequences turned up"):
        write_splits(tmp_path, num_samples=2000, multiple_of=200, noise=0.0, min_length=1, max_length=1)


def test_a_sequence_splits_into_prompt_and_completion() -> None:
    assert split_query("8 20 22") == ("8", " 20 22")
    assert split_query("8") == ("8", "")
    for text in generate_sequences(20, noise=0.5):
        query, completion = split_query(text)
        assert query + completion == text
        assert completion.startswith(" ")
    with pytest.raises(DataLoadError, match="is empty"):
        split_query("  ")


def test_prompts_are_different_even_numbers_and_the_held_out_are_unseen() -> None:
    prompts = digit_prompts(151, seed=2)
    assert sorted(map(int, prompts)) == list(range(0, 301, 2))
    train, held_out = digit_prompt_splits(100, 51, seed=2)
    assert (len(train), len(held_out)) == (100, 51)
    assert not set(train) & set(held_out)
    assert digit_prompts(10, seed=1) == digit_prompts(10, seed=1) != digit_prompts(10, seed=2)
    with pytest.raises(InvalidConfigurationError, match="151 different"):
        digit_prompts(152)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"multiple_of": 0}, "multiple_of must be at least 1"),
        ({"noise": 1.5}, "between 0 and 1"),
        ({"min_length": 6, "max_length": 5}, "are 6 and 5"),
        ({"min_length": 0}, "are 0 and 15"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        generate_sequences(1, **options)  # type: ignore[arg-type]


def test_the_command_writes_what_its_flags_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-d", "--multiple-of", "3", "-n", "4", "--noise", "0", "--seed", "9", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in printed] == [
        "decreasing_mult_3_train.jsonl",
        "decreasing_mult_3_valid.jsonl",
        "decreasing_mult_3_test.jsonl",
    ]
    assert all(len(Path(line).read_text().splitlines()) == 4 for line in printed)


@pytest.mark.parametrize("flags", [[], ["-i", "-d"], ["-i", "--noise", "2"]])
def test_wrong_flags_end_with_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err
