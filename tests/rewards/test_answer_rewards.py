"""What is compared with a right answer, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from config.errors import InvalidConfigurationError
from rewards.arithmetic import ArithmeticProblem, evaluate, number, reference_number
from rewards.multiple_choice import letters_in, options_of
from rewards.registry import resolve
from rewards.row_reward import Row
from rewards.semantic_similarity import cleaned


def score(
    reward_: str, completion_: str, config_: dict[str, Any] | None = None, prompt_: str = "", **columns: Any
) -> float | None:
    reward: Any = resolve({"name": reward_, "config": config_ or {}})
    said: float | None = reward.judge(Row(prompt_, completion_, columns)).score
    return said


NEEDS_A_REFERENCE = (
    "jaccard",
    "math_eval",
    "correctness",
    "choice_correctness",
    "mcq_accuracy",
    "semantic_similarity",
    "rouge",
    "exact_match",
    "normalised_match",
    "math_verify",
    "steps_coverage",
)


@pytest.mark.parametrize("name", NEEDS_A_REFERENCE)
@pytest.mark.parametrize("columns", [{}, {"answer": [None]}, {"answer": ["  "]}, {"other": ["x"]}])
def test_a_row_without_a_reference_is_left_out(name: str, columns: dict[str, Any]) -> None:
    assert resolve(name)(prompts=["p"], completions=["<think>a</think>\nb"], **columns) == [None]


def test_where_references_are_found() -> None:
    assert Row("", "", {"solution": "a", "completion": "b"}).reference() == "a"
    assert Row("", "", {"answer": "", "target": 7}).reference() == "7"
    assert Row("", "", {"meta": {"answer": "a"}}).reference() == "a"
    assert Row("", "", {"metadata": '{"gold": "g"}'}).reference("gold") == "g"
    assert Row("", "", {"answer": ["B", "C"]}).reference() == "B, C"
    assert Row("", "", {"answer": "a"}).reference("gold") is None


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("<think>x</think>\nthe cat", "The CAT, sat!", 2 / 3),
        ("<think>x</think>\nthe cat", "the cat", 1.0),
        ("<think>x</think> the cat", "the cat", 0.0),  # no line break: an empty answer
        ("the cat", "the cat", 0.0),
        ("<think>x</think>\nno</think>\nthe cat", "the cat", 1.0),  # the last one
        ("<think>x</think>\n<answer>the cat</answer>", "the cat", 1.0),
        ("<think>x</think>\n...", "?!", 1.0),  # both without words
        ("<think>x</think>\na_b", "a b", 1.0),
        ("<think>x</think>\nέξι 好", "Έξι 好 x", 2 / 3),
    ],
)
def test_jaccard(completion: str, reference: str, expected: float) -> None:
    assert score("jaccard", completion, answer=reference) == pytest.approx(expected)


def test_jaccard_anywhere() -> None:
    config = {"after_line_break": False}
    assert score("jaccard", "the cat", config, answer="the cat") == 1.0
    assert score("jaccard", "<think>dog</think> the cat", config, answer="the cat") == 1.0


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("7//2", 3),
        ("7%4", 3),
        ("2^10", 1024),
        ("2**-1", 0.5),
        ("-3 + +5", 2),
        ("abs(-3) + round(2.567, 1) + min(4, 2) + max(1, 2, 3)", 3 + 2.6 + 2 + 3),
        ("1,234 + 1", 1235),
        ("6 × 7 ÷ 2 − 1", 20),
        ("1e3", 1000),
    ],
)
def test_arithmetic(expression: str, value: float) -> None:
    assert evaluate(expression) == pytest.approx(value)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "x",
        "1/0",
        "9**9**9",
        "(-8)**(1/3)",
        "__import__('os')",
        "(1).real",
        "'a'*9",
        "[1]",
        "1 if 1 else 2",
        "True",
        "1j",
        "abs()",
        "round(1, 1e9)",
        "pow(2, 3)",
        "1e999",
        "(" * 900 + "1" + ")" * 900,
        "-" * 900 + "1",
        "1+" * 600 + "1",
        "1\0",
    ],
)
def test_what_is_no_arithmetic(expression: str) -> None:
    with pytest.raises(ArithmeticProblem):
        evaluate(expression)


def test_numbers_in_texts() -> None:
    assert number(" $1,234.50. ") == number("1234.5")
    assert number("72") == number("72.0") == number("+72")
    assert number("1,23") is number("72 apples") is number("") is number("٣" * 3 + "x") is None
    assert reference_number("3 eggs, 4 more\n#### 7 eggs") == 7
    assert reference_number("it is 1,000") == 1000
    assert reference_number("1 000") == 1000  # several numbers: digits joined
    assert reference_number("2.5e3") == 2500
    assert reference_number("none") is None


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("<answer>6*12</answer>", "#### 72", 1.0),
        ("<answer>144/2</answer>", "72", 1.0),
        ("<answer>72.005</answer>", "72", 1.0),  # within 1e-4
        ("<answer>72.01</answer>", "72", 0.0),
        ("<answer>0.0000001</answer>", "0", 1.0),  # within 1e-6
        ("<answer>seventy-two</answer>", "72", 0.0),
        ("72", "72", 0.0),  # no tags
        ("", "72", 0.0),
        ("<answer>1</answer><answer>72</answer>", "72", 1.0),
        ("<answer>72", "72", 1.0),  # never closed
    ],
)
def test_math_eval(completion: str, reference: str, expected: float) -> None:
    assert score("math_eval", completion, answer=reference) == expected


@pytest.mark.parametrize(
    ("completion", "reference", "right", "whole"),
    [
        ("<answer>72</answer>", "72", 2.0, 0.5),
        ("<answer> 72 </answer> so", "bla #### 72", 2.0, 0.5),
        ("<answer>72.0</answer>", "72", 2.0, 0.0),
        ("<answer>1,072</answer>", "1072", 2.0, 0.5),
        ("<answer>Paris</answer>", "Paris", 2.0, 0.0),
        ("<answer>paris</answer>", "Paris", 0.0, 0.0),
        ("<answer>7</answer>", "72", 0.0, 0.5),
        ("72", "72", 0.0, 0.0),
        ("<answer></answer>", "72", 0.0, 0.0),
        ("<answer>-3</answer>", "-3", 2.0, 0.5),
        ("<answer>٣</answer>", "3", 2.0, 0.0),
    ],
)
def test_correctness_and_int(completion: str, reference: str, right: float, whole: float) -> None:
    assert score("correctness", completion, answer=reference) == right
    assert score("int", completion) == whole


def test_exact_and_normalised() -> None:
    assert score("exact_match", "<think>x</think> Paris\n", answer="Paris") == 1.0
    assert score("exact_match", "paris", answer="Paris") == 0.0
    assert score("normalised_match", "A ｃａｔ!", answer="the cat") == 1.0  # full width
    assert score("normalised_match", "!!", answer="??") == 0.0
    assert score("normalised_match", "I say Paris, France", answer="paris") == 0.0
    contains = {"contains": True}
    assert score("normalised_match", "I say Paris, France", contains, answer="Paris France") == 1.0
    assert score("normalised_match", "Parisian", contains, answer="Paris") == 0.0


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("", ""),
        ("B", "B"),
        ("b", "B"),
        ("The answer is C.", "C"),
        ("the correct options are (A) and (D)", "AD"),
        ("CAT", ""),
        ("B is a good choice", "B"),
        ("a, c", "AC"),
        ("A/B", "AB"),
    ],
)
def test_letters(text: str, letters: str) -> None:
    assert letters_in(text) == set(letters)


def test_choice_correctness() -> None:
    assert score("choice_correctness", "<answer>A, C</answer>", answer="A,B") == pytest.approx(1 / 3)
    assert score("choice_correctness", "<think>A?</think>B", answer="B") == 1.0
    assert score("choice_correctness", "no idea", answer="B") == 0.0
    assert score("choice_correctness", "B", answer="seven") is None
    for said in ("I think it is B.", "I'm sure: B", "B, I would say"):  # the speaker is no option
        assert score("choice_correctness", said, answer="B") == 1.0
        assert score("mcq_accuracy", said, correct_letter="B") == 1.0
        assert score("mcq_accuracy", said, options=list("abcdefghij"), correct_letter="B") == 1.0
    for said in ("I", "The answer is I.", "I is correct", "I and nothing else", "I) this"):
        assert score("choice_correctness", said, answer="I") == 1.0


OPTIONS = ["Rome", "Paris", "Athens"]


@pytest.mark.parametrize(
    ("completion", "columns", "expected"),
    [
        ("B) Paris", {"meta": {"options": OPTIONS, "correct_letter": "B"}}, 1.0),
        ("<think>A) or B)</think>B", {"options": OPTIONS, "correct_letters": ["B"]}, 1.0),
        ("It must be Paris.", {"options": OPTIONS, "correct_index": 1}, 1.0),
        ("It must be Paris.", {"options": OPTIONS, "answer": "Paris"}, 1.0),
        ("I think B.", {"options": OPTIONS, "answer": "B"}, 1.0),  # "I" is no option
        ("A. Rome", {"options": OPTIONS, "answer": "B"}, 0.0),
        ("A and B.", {"options": OPTIONS, "correct_indices": [0, 1]}, 1.0),
        ("A.", {"options": OPTIONS, "correct_indices": [0, 1]}, 0.0),
        ("none of these", {"options": OPTIONS, "answer": "B"}, 0.0),
        ("B", {"is_mcq": False, "correct_letter": "B"}, None),
        ("B", {"answer": "Paris"}, None),  # no such question
    ],
)
def test_mcq_accuracy(completion: str, columns: dict[str, Any], expected: float | None) -> None:
    assert score("mcq_accuracy", completion, **columns) == expected


def test_options_in_the_prompt_and_partial_credit() -> None:
    prompt = "Capital of France?\nChoices:\nA) Rome\nB) Paris\nC. Athens\n"
    assert options_of(Row(prompt, "")) == {"A": "Rome", "B": "Paris", "C": "Athens"}
    assert score("mcq_accuracy", "Paris", prompt_=prompt, answer="Paris") == 1.0
    partial = {"strict_matching": False}
    assert score("mcq_accuracy", "A) B)", partial, prompt, correct_letters="B, C") == pytest.approx(1 / 3)


def test_cleaning() -> None:
    assert cleaned("We're  DON'T—they’ve!") == "we are do not they have"


@pytest.mark.parametrize(
    ("answer", "reference", "config", "expected"),
    [
        ("short", "a long reference text", {}, 0.0),
        ("a long enough answer", "short", {}, 0.0),
        ("red apple pie", "red apple pie", {}, 1.0),
        ("red apple pie", "red apple tart", {}, 3 / (3 + 2 * (1 + math.log(1.5)) ** 2)),
        ("red apple pie", "red apple tart", {"method": "overlap"}, 2 / 4),
        ("red apple pie", "blue whale song", {"method": "overlap"}, 0.0),
        # {red, pie} of {red, pie, xxx, pi}; 27 characters against 14
        (
            "red pie red pie red pie xxx",
            "red pie red pi",
            {"method": "overlap", "verbosity_penalty_strength": 0.1},
            (2 / 4) * (1 - 0.1 * (27 / 14 - 1.5)),
        ),
        (
            "red pie xx",
            "red pie red pie red pie",
            {"method": "overlap", "apply_length_penalty": True},
            (2 / 3) * (20 / 23),
        ),
    ],
)
def test_semantic_similarity(answer: str, reference: str, config: dict[str, Any], expected: float) -> None:
    assert score("semantic_similarity", answer, config, answer=reference) == pytest.approx(expected, abs=1e-6)


def test_texts_of_few_words_and_of_other_words_are_compared_by_characters() -> None:
    assert 0 < (score("semantic_similarity", "strawberries", answer="strawberry") or 0) < 1  # one word each
    other = score("semantic_similarity", "running quickly homewards", answer="runner quick homeward") or 0
    assert 0.1 < other < 1  # no word in common
    only_stop_words = score("semantic_similarity", "it is what it is", answer="it was what it was") or 0
    assert 0 < only_stop_words < 1


def test_without_scikit_learn_words_overlap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rewards import semantic_similarity

    semantic_similarity._has_sklearn.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for _ in range(2):
        assert score("semantic_similarity", "red apple pie", answer="red apple tart") == pytest.approx(2 / 4)
    assert capsys.readouterr().err.count("scikit-learn is not installed") == 1
    semantic_similarity._has_sklearn.cache_clear()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"variant": "rouge1"}, 2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6)),
        ({"variant": "rouge1", "measure": "precision"}, 3 / 4),
        ({"variant": "rouge1", "measure": "recall"}, 3 / 6),
        ({"variant": "rouge2", "measure": "precision"}, 1 / 3),  # "the cat" of three pairs
        ({"variant": "rougeL", "measure": "recall"}, 3 / 6),  # the cat on
        ({"variant": "rouge1", "measure": "recall", "max_words": 2}, 2 / 2),
    ],
)
def test_rouge(config: dict[str, Any], expected: float) -> None:
    said = score("rouge", "the cat slept on", config, answer="the cat sat on a mat")
    assert said == pytest.approx(expected)


def test_rouge_reads_other_scripts() -> None:
    said = score("rouge", "το σπίτι είναι μικρό", {"measure": "precision"}, answer="το σπίτι είναι μεγάλο")
    assert said == pytest.approx(3 / 4)
    assert score("rouge", "我爱北京", answer="我爱上海") == pytest.approx(0.5)
    assert score("rouge", "", answer="something") == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("1. Boil water\n2. Add tea", 1.0),
        ("- boil water \n* ADD TEA\n- wait", 2 / 3),
        ("We boil water. We add tea", 0.0),  # pieces, but not the required wording
        ("", 0.0),
        ("no steps", 0.0),
    ],
)
def test_steps_coverage(completion: str, expected: float) -> None:
    assert score("steps_coverage", completion, required_steps=["Boil water", "add tea"]) == pytest.approx(
        expected
    )


def test_steps_by_recall() -> None:
    recall = {"mode": "recall"}
    steps = {"meta": {"required_steps": ["boil the water", "add tea"]}}
    assert score("steps_coverage", "We boil some water. We then add tea", recall, **steps) == 1.0
    assert score("steps_coverage", "We boil some water. We wait here", recall, **steps) == 0.5


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"n": 1}', 1.0),
        ('<think>{}</think>```json\n{"n": 1}\n```\nThere.', 1.0),
        ('{"n": "1"}', 0.5),
        ("[]", 0.5),
        ("", 0.0),
        ('{"n": 1', 0.0),
        ('{"n": NaN}', 0.0),
        ("[" * 100_000, 0.0),
        ('{"n": ' + "9" * 5000 + "}", 0.0),
    ],
)
def test_json_against_a_schema(completion: str, expected: float) -> None:
    assert score("json_schema", completion, {"schema": SCHEMA}) == expected


def test_schemas_of_rows_and_schemas_that_are_none() -> None:
    assert score("json_validity", "[1]") == 1.0
    assert score("json_schema", "[1]", json_schema='{"maxItems": 0}') == 0.5
    with pytest.raises(InvalidConfigurationError, match=r"json_schema: the schema .* is none"):
        resolve({"name": "json_schema", "config": {"schema": {"type": "objekt"}}})


def test_regular_expressions() -> None:
    assert score("regex", "a1b", {"pattern": r"\d"}) == 1.0
    assert score("regex", "a1b", {"pattern": r"\d", "mode": "fullmatch"}) == 0.0
    assert score("regex", "A\nB", {"pattern": "a.b", "ignore_case": True}) == 1.0
    assert score("regex", "bad word", {"pattern": "bad", "score": -1}) == -1.0
    with pytest.raises(
        InvalidConfigurationError, match=r"pattern: not a regular expression \(.*\(found '\('\)"
    ):
        resolve({"name": "regex", "config": {"pattern": "("}})


def test_a_pattern_that_never_ends_is_given_up() -> None:
    reward: Any = resolve({"name": "regex", "config": {"pattern": r"(\w+\s?)+!$", "timeout": 0.05}})
    judged = reward.judge(Row("", "a" * 200 + "?"))
    assert judged.score == 0.0
