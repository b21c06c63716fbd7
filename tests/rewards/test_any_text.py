"""No text whatever makes a reward crash, leave its range, or take more than time linear in its length."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.math_eval import MathEval
from rewards.registry import names, registered
from rewards.row_reward import RowReward
from rewards.show import own_name

#: By name: what a reward needs to be made. ``judge`` asks a server, ``math_verify`` has tests of its own.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "regex_match": [{"pattern": r"(\d+)\s*=\s*(\d+)"}],
    "json_schema": [{}, {"schema": {"type": "object", "required": ["a"]}}],
    "jaccard": [{}, {"after_line_break": False}],
    "semantic_similarity": [{}, {"method": "overlap"}],
    "steps_coverage": [{}, {"mode": "recall"}],
    "mcq_accuracy": [{}, {"strict_matching": False}],
    "thinking_quality": [{}, {"unit": "tokens"}, {"unit": "words"}],
}
OURS: dict[str, Any] = {
    own_name(name): registered(name)
    for name in names()
    if isinstance(registered(name), type) and issubclass(registered(name), RowReward)  # type: ignore[arg-type]
}
CASES = [
    (name, config)
    for name in sorted(OURS.keys() - {"judge", "math_verify", "code_execution"})
    for config in CONFIGS.get(name, [{}])
]
PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "<reasoning>", "</reasoning>", "<|im_end|>", "\n", " ", "- ",
    "1. ", "A)", "B.", "```json\n", "```", "{", "}", "[", '"a":', "1", "##", "####", "as an ai", "²", "٣", "\0",
    "\ud800", "🙂", "İ", "ß", "é", "好", ",", ".", "^", "**", "(", ")", "e", "-", "_", "don't", "​",
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=12).map(lambda parts: "<think>x</think>\n" + "".join(parts)),
)


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda case: str(case))
@settings(
    max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(completion=TEXTS, reference=TEXTS, prompt=TEXTS)
def test_no_text_makes_it_crash_or_leave_its_range(
    name: str, config: dict[str, Any], completion: str, reference: str, prompt: str
) -> None:
    reward = OURS[name](**config)
    columns = {
        "answer": [reference],
        "required_steps": [[reference, "a b c"]],
        "meta": [{"options": [reference, "b"], "note": completion}],
        "completion_ids": [[0] * len(completion)],
    }
    [score] = reward(prompts=[prompt], completions=[completion], **columns)
    if score is not None:
        low, high = reward.range
        assert low <= score <= high
        assert not math.isnan(score)
    assert reward(prompts=[prompt], completions=[completion], **columns) == [score]  # and the same again


#: Repeated to any length they are what quadratic patterns and scans choke on.
HOSTILE = (
    "<think>", "</think>", "<think></think>", "<think></think> <answer>", "</think>\n", "<answer>", "</answer>",
    "</think> ", "<reasoning></reasoning>", "</reasoning> <answer> ", " ", "\n", "\n\n- ", "- a b c\n", "1. ", "a",
    "A ", "a b ", "9", "1,", "-", "- -", "(", "[", "{", '{"a":', '"', "```\n", "#", "i hope this ", "as an ", "n't",
    "'", "好", "e\u0301", "a-", "a'", "\u200d", "🙂", "<|", "A)", "option ", "^9", ";",
)  # fmt: skip


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda case: str(case))
def test_time_grows_no_faster_than_the_text(name: str, config: dict[str, Any]) -> None:
    """From 12,500 to 100,000 characters: eight times the work where it is linear, sixty-four where it is quadratic."""
    reward = OURS[name](**config)
    for piece in HOSTILE:
        long = seconds(reward, piece, 100_000)
        if long < 5:  # a quadratic one would be far beyond it, on any machine: 10^10 steps
            continue
        short = max(seconds(reward, piece, 12_500), 1e-3)
        assert long / short < 24, f"{name} on {piece!r}: {short:.3f} s, then {long:.3f} s"


def seconds(reward: Any, piece: str, length: int) -> float:
    text = (piece * (length // len(piece) + 1))[:length]
    columns = {
        "answer": ["the cat sat on a mat, A #### 7"],
        "required_steps": [["boil some water", "add tea"]],
    }
    begin = time.process_time()
    reward(prompts=[text], completions=[text], completion_ids=[[0] * 100], correct_letter=["A"], **columns)
    return time.process_time() - begin


def test_the_check_of_time_can_fail() -> None:
    class Quadratic(MathEval):
        def __call__(self, completions: Any = (), **columns: Any) -> list[float | None]:  # type: ignore[override]
            time_for = 0.3 * (len(completions[0]) / 100_000) ** 2
            end = time.process_time() + time_for
            while time.process_time() < end:
                pass
            return [0.0]

    assert seconds(Quadratic(), "a", 100_000) / seconds(Quadratic(), "a", 12_500) > 24
