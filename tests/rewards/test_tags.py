"""Regions of tagged texts, against the regular expressions that they stand for."""

from __future__ import annotations

import random
import re

import pytest

from config.errors import InvalidConfigurationError
from rewards.registry import resolve
from rewards.row_reward import Row
from rewards.tags import PRESETS, TagSet, as_tag_set

TAGS = PRESETS["think"]
PIECES = ("<think>", "</think>", "<answer>", "</answer>", " ", "\n", "a", "B", "<THINK>", "</Answer>")


def texts(count: int) -> list[str]:
    """The structure with pieces put in, left out and exchanged."""
    rng, found = random.Random(3), []
    for _ in range(count):
        parts = ["<think>", "a", "</think>", " ", "<answer>", "b", "</answer>"]
        for _ in range(rng.randint(0, 4)):
            place = rng.randrange(len(parts) + 1)
            parts[place : place + rng.randint(0, 1)] = rng.choices(PIECES, k=rng.randint(0, 2))
        found.append("".join(parts))
    return found


@pytest.mark.parametrize("ignore_case", [True, False])
def test_the_structure_is_what_the_pattern_finds(ignore_case: bool) -> None:
    flags = re.DOTALL | (re.IGNORECASE if ignore_case else 0)
    pattern = re.compile(r"<think>\s*(.*?)\s*</think>\s*<answer>\s*(.*?)\s*</answer>", flags)
    found_some = 0
    for text in texts(4000):
        expected, found = pattern.search(text), TAGS.structure(text, ignore_case=ignore_case)
        assert (expected is None) == (found is None), text
        if expected is not None and found is not None:
            assert found == expected.groups(), text
            found_some += 1
    assert found_some > 50


def test_the_whole_structure_is_what_the_anchored_pattern_finds() -> None:
    pattern = re.compile(r"^\s*<think>.*?</think>\s*<answer>.*?</answer>\s*$", re.DOTALL)
    found_some = 0
    for text in texts(6000):
        expected = pattern.search(text) is not None
        assert expected == (TAGS.structure(text, ignore_case=False, whole=True) is not None), text
        found_some += expected
    assert found_some > 20


@pytest.mark.parametrize(
    ("text", "thinking", "after", "closed"),
    [
        ("", None, "", None),
        ("just this", None, "just this", None),
        ("<think> a </think> b ", "a", "b", "a"),
        ("<think>never closed", "never closed", "", None),  # that is no answer
        ("It is 3. <think>or 4", "or 4", "It is 3.", None),
        ("<think>never closed <answer>b</answer>", "never closed <answer>b</answer>", "b", None),
        ("no start</think>b", None, "b", None),
        ("</think><think>a", "a", "", None),
        ("<think>a</think>b</think>c", "a", "c", "a"),
        ("<think>a<think>b</think>c", "a<think>b", "c", "a<think>b"),
        ("<think>a</think><answer>b</answer> tail", "a", "b", "a"),
        ("<answer>1</answer><answer>2</answer>", None, "2", None),
        ("<THINK>a</Think>b", "a", "b", "a"),
        ("İ<think>a</think>b", "a", "b", "a"),  # whose lower case is two characters
    ],
)
def test_regions_by_hand(text: str, thinking: str | None, after: str, closed: str | None) -> None:
    assert TAGS.thinking(text) == thinking
    assert TAGS.after_thinking(text) == after
    assert TAGS.closed_thinking(text) == closed


def test_the_first_or_the_last_end_of_thinking() -> None:
    tags = PRESETS["think-only"]
    assert tags.after_thinking("<think>a</think>b</think>c") == "c"
    assert tags.after_thinking("<think>a</think>b</think>c", first=True) == "b</think>c"


def test_nesting() -> None:
    assert TAGS.nested("<think>a<think>b</think></think>")
    assert not TAGS.nested("<think>a</think><think>b</think>")


def test_a_prompt_that_opens_the_thinking() -> None:
    row = Row("2 + 2?\n<think>\n", "it is 4</think><answer>4</answer>")
    assert resolve("format").judge(row).score == 0.5  # type: ignore[attr-defined]
    assert resolve("format").judge(Row("2 + 2?", row.completion)).score == -0.5  # type: ignore[attr-defined]


def test_thinking_that_is_never_closed_is_no_answer_even_if_the_prompt_opened_it() -> None:
    opened, unfinished = "2 + 2?\n<think>", "so it is 4"
    for name in ("exact_match", "normalised_match", "math_verify", "rouge", "choice_correctness"):
        config = {"contains": True} if name == "normalised_match" else {}
        reward, answer = resolve({"name": name, "config": config}), "A" if "choice" in name else "4"
        text = unfinished.replace("4", answer)
        assert reward(prompts=[opened], completions=[text], answer=[answer]) == [0.0], name
        [given] = reward(prompts=[opened], completions=[f"hm</think>{answer}"], answer=[answer])
        assert given == 1.0, name


def test_what_names_a_tag_set() -> None:
    assert as_tag_set("reasoning") == TagSet("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    own = as_tag_set({"think_start": "[T]", "think_end": "[/T]", "answer_start": "", "answer_end": ""})
    assert own.after_thinking("[T]a[/T]b") == "b"
    for wrong in (
        "thnk",
        {"think_start": "", "think_end": "<a>"},
        {"think_start": "<a>"},
        {"think_start": "a", "think_end": "a"},
        3,
    ):
        with pytest.raises(InvalidConfigurationError, match="tags: "):
            resolve({"name": "format", "config": {"tags": wrong}})
    with pytest.raises(ValueError, match="both of them or neither"):
        TagSet("<a>", "</a>", "<b>")
