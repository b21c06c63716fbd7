"""The digit reward, by hand: who matches, who stops, who dilutes."""

from __future__ import annotations

import random

import pytest

from config.errors import InvalidConfigurationError
from rewards.registry import resolve
from rewards.sequential_digits import digit_reward, digit_score


def test_three_of_twelve_words_then_stop() -> None:
    text = "8 18 24 -9 26 28 30 32 34 36 38 40"
    assert len(text.split()) == 12
    assert digit_score("", text) == 3 / 12


@pytest.mark.parametrize(
    ("query", "response", "score"),
    [
        ("8", " 10 12 14 16 18", 5 / 5),
        ("8", " 10 12 14", 3 / 5),  # shorter than min_length: divided by 5
        ("8", " 10 12 14 16 18 20 22", 7 / 7),
        ("8", " 8 10 12 14 16", 0 / 5),  # the first must exceed the query
        ("8", " 10 10 12 14 16", 1 / 5),  # equal is not greater
        ("8", " 10 12 13 14 16 18", 2 / 6),  # 13 is no multiple of 2: stop
        ("8", " 10 hello 12 14 16 18", 5 / 6),  # a word is stepped over, and dilutes
        ("8", " 10, 12 14 16 18", 4 / 5),  # "10," is no integer
        ("8", " 10 12.0 14 16 18", 4 / 5),
        ("-8", " -6 -4 0 2 4", 5 / 5),
        ("8", " +10 012 14 16 18", 5 / 5),
        ("go on: 8 please", " 6 10 12", 0 / 5),  # the last integer of the query, wherever it stands
        ("2 50 8", " 10 12 14", 3 / 5),
        ("", "100 102 104", 3 / 5),  # nothing to compare the first with
        ("hello", "7 8 10", 0 / 5),  # free of comparison, not of being a multiple
        ("8", "  10\n12\t14  16 18 ", 5 / 5),
    ],
)
def test_scores_by_hand(query: str, response: str, score: float) -> None:
    assert digit_score(query, response) == score


@pytest.mark.parametrize("empty", ["", " ", "\n\t "])
def test_an_empty_response_scores_the_least(empty: str) -> None:
    assert digit_score("8", empty) == 0.0
    assert digit_score("8", empty, negated=True) == -1.0


def test_other_settings() -> None:
    assert digit_score("30", " 27 24 21 18 15", increasing=False, multiple=3) == 1.0
    assert digit_score("30", " 27 24 21 22 15", increasing=False, multiple=3) == 3 / 5
    assert digit_score("1", " 2 3 4", multiple=1, min_length=3) == 1.0
    assert digit_score("8", " 10 12 14", negated=True) == pytest.approx(3 / 5 - 1)
    with pytest.raises(InvalidConfigurationError, match="multiple: input should be greater than 0"):
        digit_reward(multiple=0)


def test_breaking_a_sequence_later_never_scores_less() -> None:
    rng = random.Random(0)
    for _ in range(200):
        length = rng.randint(1, 15)
        numbers = [10 + 2 * place for place in range(length)]
        scores = []
        for broken in range(length):
            words = [str(number) for number in numbers]
            words[broken] = "1"
            scores.append(digit_score("8", " ".join(words)))
        assert scores == sorted(scores)
        assert scores == [broken / max(length, 5) for broken in range(length)]


def test_the_registered_reward_is_increasing_multiples_of_two() -> None:
    reward = resolve("sequential_digits")
    assert reward.reward_name == "sequential_digits"
    prompts, completions = ["8", "8", "8"], [" 10 12 14 16 18", "", " 6"]
    assert reward(prompts=prompts, completions=completions, terminated=[True] * 3) == [1.0, 0.0, 0.0]


def test_a_made_reward_is_named_after_its_setting() -> None:
    reward = digit_reward(increasing=False, multiple=3, negated=True)
    assert reward.__name__ == "decreasing_mult_3_negated"
    assert reward(prompts=["30"], completions=[" 27 24 21 18 15"]) == [0.0]
