"""What rewards there are and what they say about a text, as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.errors import InvalidConfigurationError, RewardError
from rewards.registry import names
from rewards.show import list_rewards, show, try_reward


def test_every_name_is_in_the_list() -> None:
    listed = list_rewards()
    for name in names():
        assert name in listed
    assert "format_structure (also tag_structure)  [0, 1]" in listed
    assert listed.count("format_structure") == 1
    assert all(len(line) <= 120 for line in listed.splitlines())


@pytest.mark.parametrize("name", names())
def test_every_reward_can_be_shown(name: str) -> None:
    shown = show(name)
    assert "(no description)" not in shown
    assert "PydanticUndefined" not in shown
    assert "FieldInfo" not in shown


def test_what_is_shown_of_one() -> None:
    shown = show("tag_structure")
    assert shown.startswith("format_structure  [0, 1]\nalso: tag_structure\n")
    assert "min_think_length = 20  (int)\n      Shortest thinking that counts (min)." in shown
    assert "tags = think-only" in shown
    assert "url = (to be given)" in show("judge")
    assert "xmlcount  (-∞, 0.5]" in show("xmlcount")
    with pytest.raises(InvalidConfigurationError, match="did you mean 'jaccard'"):
        show("jacard")


def test_trying_shows_the_score_and_why() -> None:
    assert try_reward(
        "jaccard", "", "<think>x</think>\nthe cat", columns={"answer": "the cat sat"}
    ).splitlines() == [
        "jaccard = 0.666667",
        "  answer     'the cat'",
        "  reference  'the cat sat'",
        "  shared     2 of 3 words",
    ]
    said = try_reward("jaccard", "", "x", config={"tags": "think"})
    assert said.splitlines()[0] == "jaccard = (does not apply)"
    assert "no reference: a column such as answer, reference" in said
    assert try_reward("default", "", "x") == "well_formed = 0.25"
    assert try_reward("sequential_digits", "8", " 10 12 14", config={"min_length": 3}).startswith(
        "sequential_digits = 1\n"
    )
    with pytest.raises(InvalidConfigurationError, match="no parameter 'tag'"):
        try_reward("jaccard", "", "x", config={"tag": "think"})


def test_trying_rewards_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Graded:\n    def compute(self, context):\n"
        "        return {'reward': 0.5, 'log': {'reference': context.reference_completion}}\n"
        "def noted(completions, log_extra):\n    log_extra('length', [len(t) for t in completions])\n"
        "    return [None]\n"
    )
    said = try_reward(f"{file}:Graded", "p", "c", columns={"answer": "a"})
    assert said.splitlines()[1:] == ["  reference  a"]
    assert said.splitlines()[0].endswith(" = 0.5")
    assert try_reward(f"{file}:noted", "p", "four") == "noted = (does not apply)\n  length  4"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero at .*mine\.py:3"),
        ("return float('nan')", "returned nan for row 0"),
        ("return 'good'", "returned str 'good' for row 0"),
        ("return {'score': 1}", 'a mapping without "reward"'),
    ],
)
def test_trying_what_misbehaves_says_what_a_run_would_say(tmp_path: Path, body: str, sentence: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"class Mine:\n    def compute(self, context):\n        {body}\n")
    with pytest.raises(RewardError, match=sentence):
        try_reward(f"{file}:Mine", "", "x")


def test_trying_with_columns_that_a_reward_cannot_read() -> None:
    with pytest.raises(RewardError, match="'steps_coverage' raised TypeError"):
        try_reward("steps_coverage", "", "x", columns={"required_steps": 5})
    there_is_none = {"schema": {"$ref": "http://localhost/none"}}
    with pytest.raises(RewardError, match="Unresolvable"):
        try_reward("json_schema", "", "{}", there_is_none)
