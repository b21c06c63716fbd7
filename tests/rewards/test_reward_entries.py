"""Rewards with parameters, by name or from files; rewards as classes with ``compute``; what is wrong with either."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.errors import InvalidConfigurationError, RewardError
from rewards import registry
from rewards.base_reward import BaseReward, ComputeReward
from rewards.composition import RewardSet
from rewards.context import RewardContext
from rewards.registry import RewardRegistry, names, register, resolve

#: The names by which rewards are known in the systems that this project takes after.
KNOWN_NAMES = (
    *("format", "format_structure", "tag_structure", "soft_format", "strict_format", "xmlcount", "math_eval"),
    *("correctness", "int", "jaccard", "semantic_similarity", "answer_quality", "thinking_quality"),
    *("steps_coverage", "choice_correctness", "mcq_accuracy", "response_length_penalty", "sequential_digits"),
)
#: As that system's document prints it.
DOCUMENTED = '''
# src/mlx_rl_trainer/rewards/custom/response_length_penalty.py

import logging
from typing import Dict, Any
import numpy as np

from mlx_rl_trainer.rewards.base_reward import BaseReward
from mlx_rl_trainer.rewards.registry import RewardRegistry
from mlx_rl_trainer.rewards.context import RewardContext
from mlx_rl_trainer.utils.text_utils import _count_words

logger = logging.getLogger(__name__)

@RewardRegistry.register("response_length_penalty")
class ResponseLengthPenalty(BaseReward):
    """
    Penalizes responses that exceed a maximum word count.

    Configuration:
        max_words: Maximum allowed words before penalty starts (default: 150)
        penalty_per_word: Penalty applied for each word over `max_words` (default: 0.005)
    """

    def __init__(self, config: Dict[str, Any]):
        super().__init__(config)
        self.max_words = config.get("max_words", 150)
        self.penalty_per_word = config.get("penalty_per_word", 0.005)
        logger.info(f"Initialized ResponseLengthPenalty with max_words: {self.max_words}")

    def compute(self, context: RewardContext) -> Dict[str, Any]:
        """
        Compute length penalty reward.

        Returns:
            Dict containing reward score (1.0 for under max_words, linearly decreasing for over).
        """
        try:
            self.validate_inputs(context)

            word_count = _count_words(context.generated_text)

            if word_count <= self.max_words:
                return {"reward": 1.0}  # No penalty
            else:
                excess_words = word_count - self.max_words
                penalty = excess_words * self.penalty_per_word
                # Reward goes from 1.0 down to 0.0 (or even negative if very long)
                return {"reward": float(max(0.0, 1.0 - penalty))}

        except Exception as e:
            logger.error(f"Response length penalty computation failed: {e}")
            return {"reward": 0.0}
'''


@pytest.fixture(autouse=True)
def _leave_no_traces() -> Iterator[None]:
    names()
    before, modules, path = dict(registry._registered), set(sys.modules), list(sys.path)
    yield
    registry._registered.clear()
    registry._registered.update(before)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("mlx_rl_trainer", "mine_", "documented_")):
            del sys.modules[name]


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_every_documented_name_is_a_reward(name: str) -> None:
    [score] = resolve(name)(
        prompts=["8"], completions=["<think>x</think>\nB"], answer=["B"], correct_letter=["B"]
    )
    assert score is None or isinstance(score, float)


def test_the_documented_entries_are_taken_as_they_are() -> None:
    structure = {
        "min_think_length": 10,
        "min_answer_length": 2,
        "think_length_target_min": 40,
        "think_length_target_max": 90,
    }
    thinking = {"target_length_min": 40, "target_length_max": 90, "excessive_length_threshold": 120}
    likeness = {
        "method": "tfidf",
        "min_length": 10,
        "apply_length_penalty": False,
        "apply_verbosity_penalty": False,
        "verbosity_penalty_strength": 0.01,
    }
    rewards = RewardSet.build(
        [
            {"name": "format_structure", "weight": 0.05, "config": structure},
            {"name": "thinking_quality", "weight": 0.2, "config": thinking},
            {"name": "answer_quality", "weight": 0.1, "config": {"max_penalty": 1.0, "phrase_penalty": 0.25}},
            {"name": "semantic_similarity", "weight": 0.65, "config": likeness},
        ],
        composition="weighted_mean_clip01",
    )
    text = "<think>" + "x" * 50 + "</think>red apple pie"
    scored = rewards.score(["p", "p"], [text, ""], answer=["red apple pie"] * 2)
    # All four are at their best: 50 characters lie in the best band, which is limited to 1.
    np.testing.assert_allclose(scored.total, [1.0, 0.0])


def test_entries_with_weights_and_parameters() -> None:
    rewards = RewardSet.build(
        [{"name": "word_count", "weight": 0.5, "config": {"min_words": 2}}, "default", {"name": "overlong"}]
    )
    assert rewards.names == ["word_count", "well_formed", "overlong"]
    assert rewards.weights == [0.5, 1.0, 1.0]
    scored = rewards.score(["", ""], ["one", "two words"], completion_ids=[[1], [1, 2]])
    np.testing.assert_array_equal(scored.components["word_count"], [0, 1])
    assert RewardSet.build({"name": "word_count", "config": {"min_words": 2}}).names == ["word_count"]
    assert RewardSet.build([{"name": "default"}], [2.0]).weights == [
        2.0
    ]  # no weight in the entry: one beside it


def test_parameters_of_functions_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mine_rewards.py"
    file.write_text(
        "def at_most(completions, limit=3):\n    return [float(len(t) <= limit) for t in completions]\n"
        "class Threshold:\n    def __init__(self, limit):\n        self.limit = limit\n"
        "    def __call__(self, completions):\n        return [float(len(t) <= self.limit) for t in completions]\n"
    )
    for what in ("at_most", "Threshold"):
        reward = resolve({"name": f"{file}:{what}", "config": {"limit": 1}})
        assert reward(completions=["a", "ab"]) == [1.0, 0.0]
    with pytest.raises(InvalidConfigurationError, match="'limt'; did you mean 'limit'"):
        resolve({"name": f"{file}:at_most", "config": {"limt": 1}})
    with pytest.raises(InvalidConfigurationError, match="cannot be made without arguments"):
        resolve(f"{file}:Threshold")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            {"name": "jaccard", "config": {"tagz": "think"}},
            "'jaccard' has no parameter 'tagz'; did you mean 'tags'",
        ),
        ({"name": "word_count", "config": {"min_words": -1}}, "reward 'word_count': min_words: .*found -1"),
        ({"name": "word_count", "config": {"min_words": True}}, "true/false where a number is expected"),
        ({"name": "word_count", "config": [1]}, "config of the reward 'word_count' is .*a mapping"),
        ({"name": "word_count", "wieght": 1}, "unknown key 'wieght'"),
        ({"nam": "word_count", "weight": 1, "config": {}}, "has no name"),
        ({"name": "default", "config": {"completions": 1}}, "'default' has no parameter 'completions'"),
        ({"name": "jacard"}, "There is no reward named 'jacard'; did you mean 'jaccard'"),
        ({"name": "judge"}, "reward 'judge': url: .*required"),
        ({"name": "word_count", "weight": "much"}, "weight of reward 'word_count' is 'much'"),
    ],
)
def test_a_wrong_entry_has_its_sentence(spec: Any, sentence: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence) as caught:
        RewardSet.build([spec])
    assert "\n" not in str(caught.value)


def test_weights_given_twice_are_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match="given twice"):
        RewardSet.build([{"name": "default", "weight": 1.0}], [1.0])


# Classes with compute -----------------------------------------------------------------------------------


def test_the_documented_class_runs_as_it_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "documented_reward.py"
    file.write_text(DOCUMENTED)
    config = {"max_words": 200, "penalty_per_word": 0.003}
    rewards = RewardSet.build([{"name": f"{file}:ResponseLengthPenalty", "weight": 0.3, "config": config}])
    scored = rewards.score(["p"] * 3, ["word " * 200, "word " * 300, "word " * 900])
    np.testing.assert_allclose(
        scored.components["ResponseLengthPenalty"], [1.0, 1 - 100 * 0.003, 0.0], rtol=1e-6
    )
    np.testing.assert_allclose(scored.total, [0.3, 0.3 * 0.7, 0.0], rtol=1e-6)
    # Its file has taken the name of ours over, as whoever brings it along means.
    assert type(resolve("response_length_penalty")).__name__ == "ResponseLengthPenalty"
    assert RewardRegistry.create("response_length_penalty", config)(completions=["word " * 300]) == [
        pytest.approx(0.7)
    ]


def test_the_context_says_all_that_the_row_says() -> None:
    seen: list[RewardContext] = []

    class Curious(BaseReward):
        def compute(self, context: RewardContext) -> dict[str, Any]:
            self.validate_inputs(context)
            seen.append(context)
            return {"reward": len(seen), "log": {"seen": len(seen)}}

    rewards = RewardSet([Curious({"a": 1})])
    rewards.state.global_step = 7
    scored = rewards.score(
        ["p", [{"role": "user", "content": "q"}]],
        ["a", [{"role": "assistant", "content": "b"}]],
        answer=["x", None],
        test_cases=[["assert f()"], None],
        meta=[{"level": 3}, '{"level": 4}'],
        terminated=[True, False],
        topic=["t", "u"],
    )
    assert [c.prompt_text for c in seen] == ["p", "q"]
    assert [c.generated_text for c in seen] == ["a", "b"]
    assert [c.reference_completion for c in seen] == ["x", None]
    assert [list(c.test_cases) for c in seen] == [["assert f()"], []]
    assert [dict(c.metadata) for c in seen] == [{"topic": "t", "level": 3}, {"topic": "u", "level": 4}]
    assert {c.update_step for c in seen} == {7}
    np.testing.assert_array_equal(scored.total, [1, 2])
    assert scored.extra == {"Curious log": [{"seen": 1}, {"seen": 2}]}
    with pytest.raises(AttributeError):
        seen[0].generated_text = "other"  # type: ignore[misc]


def test_compute_needs_no_base_class_and_may_return_a_number() -> None:
    class Plain:
        def compute(self, context: RewardContext) -> Any:
            return {"a": None, "b": 0.5}.get(context.generated_text, {"score": 1})

    assert isinstance(resolve(Plain), ComputeReward)
    assert RewardSet.build([Plain()]).names == ["Plain"]
    np.testing.assert_array_equal(RewardSet.build(Plain).score(["", ""], ["a", "b"]).total, [np.nan, 0.5])
    with pytest.raises(RewardError, match=r'mapping without "reward" for row 1 \(it has: score\)'):
        RewardSet.build(Plain).score(["", ""], ["b", "c"])


def test_inputs_are_validated() -> None:
    class Any_(BaseReward):
        def compute(self, context: RewardContext) -> dict[str, Any]:
            return {"reward": 0.0}

    reward = Any_()
    reward.validate_inputs(RewardContext("", "p"))
    with pytest.raises(ValueError, match=r"context\.generated_text is a NoneType"):
        reward.validate_inputs(RewardContext(None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a text is expected"):
        reward.validate_inputs({})  # type: ignore[arg-type]


def test_a_name_of_ours_is_taken_over_by_the_class_interface_alone() -> None:
    with pytest.raises(InvalidConfigurationError, match="already belongs"):
        register("jaccard")(lambda completions: [0.0])

    @RewardRegistry.register("jaccard")
    def mine(completions: list[str]) -> list[float]:
        return [9.0] * len(completions)

    assert resolve("jaccard") is mine
    assert "jaccard" in RewardRegistry.names()
    with pytest.raises(InvalidConfigurationError, match="already belongs"):

        @RewardRegistry.register("jaccard")
        def other(completions: list[str]) -> list[float]:
            return [1.0] * len(completions)


# TRL's conventions ------------------------------------------------------------------------------------


def test_conversations_and_services_as_trl_passes_them() -> None:
    def think_format(completions, log_extra, log_metric, trainer_state, **kwargs):  # type: ignore[no-untyped-def]
        contents = [completion[0]["content"] for completion in completions]
        log_extra("length", [len(content) for content in contents])
        log_metric("mean_length", sum(map(len, contents)) / len(contents))
        assert trainer_state.global_step == 3
        return [float(content.startswith("<think>")) for content in contents]

    rewards = RewardSet.build([think_format, "format"])
    rewards.state.global_step = 3
    turns = [
        [{"role": "assistant", "content": text}] for text in ("<think>a</think><answer>b</answer>", "no")
    ]
    scored = rewards.score([[{"role": "user", "content": "q"}]] * 2, turns)
    np.testing.assert_array_equal(scored.components["think_format"], [1, 0])
    np.testing.assert_array_equal(scored.components["format"], [0.5, -0.5])
    assert scored.extra == {"length": [34, 2]}
    assert scored.measured == {"mean_length": 18.0}
    assert scored.rows([1]).extra == {"length": [2]}


def test_what_an_entry_sets_no_column_replaces(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def up_to(completions, limit=5): return [float(limit)] * len(completions)\n"
        "def all_of(completions, limit=5, **columns): return [float(limit)] * len(completions)\n"
    )
    for name in ("up_to", "all_of"):
        rewards = RewardSet.build({"name": f"{file}:{name}", "config": {"limit": 3}})
        assert rewards.score(["p"], ["c"], limit=[7]).total.tolist() == [3.0]
