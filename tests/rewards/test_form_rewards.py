"""Form and length, by hand: format, format_structure, xmlcount, thinking and answer quality, lengths."""

from __future__ import annotations

from typing import Any

import pytest

from config.errors import InvalidConfigurationError, RewardError
from rewards.registry import resolve
from rewards.row_reward import Row


def score(
    reward_: str, completion_: str, config_: dict[str, Any] | None = None, **columns: Any
) -> float | None:
    reward: Any = resolve({"name": reward_, "config": config_ or {}})
    said: float | None = reward.judge(Row("", completion_, columns)).score
    return said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", -0.5),
        ("text", -0.5),
        ("<think>a</think><answer>b</answer>", 0.5),
        ("x <THINK> a </think>\n\n<Answer>b</answer> y", 0.5),
        ("<think> \n </think><answer>b</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a</think> then <answer>b</answer>", -0.5),
        ("<answer>b</answer><think>a</think>", -0.5),
        ("<think>a<answer>b</answer>", -0.5),
        ("<think>a</think>x</think><answer>b</answer>", 0.5),  # the thinking is a</think>x
    ],
)
def test_format(text: str, expected: float) -> None:
    assert score("format", text) == expected


@pytest.mark.parametrize(
    ("text", "soft", "strict"),
    [
        ("<reasoning>a</reasoning>\n<answer>b</answer>", 0.5, 0.5),
        (" \n<reasoning></reasoning><answer></answer>\n", 0.5, 0.5),
        ("so <reasoning>a</reasoning><answer>b</answer>", 0.5, 0.0),
        ("<reasoning>a</reasoning><answer>b</answer> so", 0.5, 0.0),
        ("<Reasoning>a</reasoning><answer>b</answer>", 0.0, 0.0),
        ("<reasoning>a</reasoning>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_soft_and_strict(text: str, soft: float, strict: float) -> None:
    assert score("soft_format", text) == soft
    assert score("strict_format", text) == strict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("<reasoning>a</reasoning>", 0.25),
        ("</reasoning><reasoning>", 0.0),  # the wrong way round
        ("<answer>a</answer>", 0.25),
        ("<reasoning>a</reasoning><answer>b</answer>", 0.5),
        ("<reasoning>a</reasoning><answer>b</answer>" + "x" * 600, 0.5 - 0.6),
        ("<answer>a</answer>12345</answer>123", 0.25 - 0.003),  # after the last one
    ],
)
def test_xmlcount(text: str, expected: float) -> None:
    assert score("xmlcount", text) == pytest.approx(expected)


ANSWER = "The answer is 4."  # 16 characters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("123456789", 0.0),  # below 10
        ("no tags at all, short", 0.0),
        ("no tags at all, but more than thirty characters", 0.1),
        ("<think>" + "x" * 50, 0.3),  # never closed
        ("<think>a</think><think>b</think>" + ANSWER, 0.2),
        ("<think>a</think></think>" + ANSWER, 0.2),
        ("only an end</think>" + ANSWER, 0.2),
        ("</think>the wrong way<think>", 0.2),
        ("<think>" + "x" * 19 + "</think>" + ANSWER, 0.6),  # the answer is long enough
        ("<think>" + "x" * 20 + "</think>short", 0.6),  # the thinking is
        ("<think>x</think>short", 0.3),
        ("<think>" + "x" * 20 + "</think>" + ANSWER, 0.5),  # at min: 0.5 + 0
        ("<think>" + "x" * 60 + "</think>" + ANSWER, 0.5 + 0.5 * 40 / 80),
        ("<think>" + "x" * 100 + "</think>" + ANSWER, 1.0),
        ("<think>" + "x" * 250 + "</think>" + ANSWER, 1.0),
        ("<think>" + "x" * 375 + "</think>" + ANSWER, 1 - (125 / 250) * 0.5 * 2),
        ("<think>" + "x" * 900 + "</think>" + ANSWER, 0.0),
        ("<THINK>" + "x" * 100 + "</Think>" + ANSWER, 1.0),
    ],
)
def test_format_structure(text: str, expected: float) -> None:
    assert score("format_structure", text) == pytest.approx(expected)
    assert score("tag_structure", text) == pytest.approx(expected)


def test_format_structure_as_documented_elsewhere() -> None:
    config = {
        "min_think_length": 10,
        "min_answer_length": 2,
        "think_length_target_min": 40,
        "think_length_target_max": 90,
    }
    text = "<think>" + "x" * 25 + "</think>42"
    assert score("format_structure", text, config) == pytest.approx(0.5 + 0.5 * 15 / 30)
    with pytest.raises(InvalidConfigurationError, match="expected in rising order, found 20, 10, 250"):
        resolve({"name": "format_structure", "config": {"think_length_target_min": 10}})


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("", 0.0),
        ("x" * 9, 0.0),
        ("x" * 15, 15 / 30),
        ("x" * 30, 1.0),
        ("x" * 50, 1.0),  # 1.15, limited
        ("x" * 88, 1 - 0.5 * 8 / 80),
        ("x" * 100, 1 - 0.5 * 20 / 80 - 0.5 * 100 / 90),
        ("x" * 100_000, 0.0),
        ("- a list of the steps", 21 / 30 + 0.1),
        ("2.5 is not a list item", 22 / 30),
        ("as an ai, I just guess", 22 / 30 - 0.15),
        ("[INST] xxxxxxxx", 0.6 * 15 / 30),  # control text
        ("<s> [INST] xxxxxxxx", 0.2 * 19 / 30),
        ("<|im_end|> xxxxxxxx", 0.6 * 19 / 30),  # one piece of it, one penalty
    ],
)
def test_thinking_quality(thinking: str, expected: float) -> None:
    said = score("thinking_quality", f"<think>{thinking}</think>four")
    assert said == pytest.approx(min(max(expected, 0.0), 1.0))


def test_thinking_quality_counts_tags_and_units() -> None:
    assert score("thinking_quality", "x" * 50) == 0.0
    twice = "<think>" + "x" * 30 + "</think><think>y</think>"
    assert score("thinking_quality", twice) == pytest.approx(0.7)
    words = {"unit": "words", "target_length_min": 4}
    assert score("thinking_quality", "<think>three words here</think>", words) == pytest.approx(3 / 4)
    # 30 characters of 60 with the tags, 20 tokens in all: 10 tokens of thinking.
    text = "<think>" + "x" * 30 + "</think>" + "y" * 15
    tokens = {"unit": "tokens", "target_length_min": 20}
    assert score("thinking_quality", text, tokens, completion_ids=[0] * 20) == pytest.approx(10 / 20)
    with pytest.raises(RewardError, match="completion_ids are not given"):
        score("thinking_quality", text, tokens)


def test_thinking_length() -> None:
    text = "<think>" + "x" * 45 + "</think>" + "y" * 30  # 45 of 90 characters
    assert score("thinking_length", text, completion_ids=[0] * 200) == pytest.approx(
        0.1 * (50 / 100 - 1) - 0.05 * (100 - 80)
    )
    assert score("thinking_length", text, completion_ids=[0] * 20) == pytest.approx(0.1 * (2 - 1))
    assert score("thinking_length", text) is None
    assert score("thinking_length", "no thinking", completion_ids=[0]) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("abcd", None, 0.0),  # below 5
        ("It is four.", None, 1.0),
        ("Hello, I think I hope this helpst.", None, 1.0),  # inside a word it does not count
        ("It was an AI that said four", None, 1.0),
        ("As an AI  language\nmodel I say four", None, 1 - 2 * 0.2),  # "as an ai" and the longer one
        ("I hope this helps! i HOPE this helps!", None, 1 - 0.2),  # the same phrase once
        ("It is four <|im_end|>", None, 0.0),
        ("[INST] four", None, 0.0),
        ("It is four 🙂", None, 0.9),
        ("It is four 🙂", "four 🎉", 1.0),
        ("It is 4 © 2020 #1", None, 1.0),  # no emoji
    ],
)
def test_answer_quality(answer: str, reference: str | None, expected: float) -> None:
    text = f"<think>as an AI</think>{answer}"
    assert score("answer_quality", text, answer=reference) == pytest.approx(expected)


def test_answer_quality_reads_after_the_first_end_and_has_its_own_lists() -> None:
    text = "<think>a</think>I hope this helps</think>fine, thank you"
    assert score("answer_quality", text) == pytest.approx(0.8)
    config = {"phrases": ["thank you"], "phrase_penalty": 0.25, "banned": ["fine"], "max_penalty": 0.5}
    assert score("answer_quality", text, config) == 0.5
    assert score("answer_quality", text, {**config, "banned": []}) == 0.75


@pytest.mark.parametrize(
    ("reward", "config", "words", "expected"),
    [
        ("response_length_penalty", {}, 0, 1.0),
        ("response_length_penalty", {}, 150, 1.0),
        ("response_length_penalty", {}, 151, 0.995),
        ("response_length_penalty", {"max_words": 200, "penalty_per_word": 0.003}, 300, 0.7),
        ("response_length_penalty", {}, 1000, 0.0),
        ("length_target", {"target": 10}, 10, 1.0),
        ("length_target", {"target": 10}, 13, 0.7),
        ("length_target", {"target": 10}, 0, 0.0),
        ("length_target", {"target": 10}, 30, 0.0),
        ("length_target", {"target": 10, "tolerance": 2}, 12, 1.0),
        ("length_target", {"target": 10, "tolerance": 2}, 4, 1 - 4 / 8),
        ("word_count", {"min_words": 2, "max_words": 3}, 1, 0.0),
        ("word_count", {"min_words": 2, "max_words": 3}, 3, 1.0),
        ("word_count", {"min_words": 2, "max_words": 3}, 4, 0.0),
        ("overlong", {"max_length": 10, "buffer": 4, "unit": "words"}, 6, 0.0),
        ("overlong", {"max_length": 10, "buffer": 4, "unit": "words"}, 9, -0.75),
        ("overlong", {"max_length": 10, "buffer": 4, "unit": "words"}, 11, -1.0),
        ("repetition_penalty", {}, 0, 0.0),
        ("repetition_penalty", {}, 2, 0.0),
        ("repetition_penalty", {}, 4, -0.5),
        ("repetition_penalty", {"max_penalty": 2.0, "ngram_size": 1}, 4, -2 * 0.75),
    ],
)
def test_lengths(reward: str, config: dict[str, Any], words: int, expected: float) -> None:
    assert score(reward, "word " * words, config) == pytest.approx(expected)


def test_overlong_counts_tokens() -> None:
    config = {"max_length": 10, "buffer": 4}
    assert score("overlong", "x", config, completion_ids=[0] * 8) == pytest.approx(-0.5)
    assert score("overlong", "x", config) is None
    with pytest.raises(InvalidConfigurationError, match="buffer: 20 must not be above max_length"):
        resolve({"name": "overlong", "config": {"max_length": 10, "buffer": 20}})
