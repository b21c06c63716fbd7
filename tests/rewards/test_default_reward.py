"""The default reward: what it is meant to punish, and that no trivial answer is the best one."""

from __future__ import annotations

import math
import random

import pytest

from rewards.default_reward import well_formed, well_formed_score

SENTENCE = "The sky looks blue because air scatters short waves more than long ones."


def test_a_plain_sentence_scores_one_and_half_when_cut_off() -> None:
    assert well_formed_score(SENTENCE) == 1.0
    assert well_formed_score(SENTENCE, terminated=False) == 0.5


@pytest.mark.parametrize("empty", ["", "   ", "\n\n", "\u3000"])
def test_nothing_scores_zero(empty: str) -> None:
    assert well_formed_score(empty) == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("x", math.sqrt(1 / 16)),
        ("Paris", math.sqrt(5 / 16)),  # PAR ARI RIS: all different
        ("yes yes", 4 / 5 * math.sqrt(6 / 16)),  # by characters: yes es_ s_y _ye yes
        ("a a a a a a", 1 / 4 * math.sqrt(6 / 16)),  # one 3-gram, four times
        ("aaaaaaaaaaaaaaaa", 1 / 14),  # by characters, because it is a single word
        ("Go on. GO ON. go on. Go On.", 2 / 6),  # 8 words, 6 3-grams, 2 different; 20 characters
        ("我喜欢吃苹果", math.sqrt(6 / 16)),
        ("天气很好" * 5, 4 / 18),  # 20 characters in one word: 18 3-grams, 4 different
    ],
)
def test_scores_by_hand(text: str, score: float) -> None:
    assert well_formed_score(text) == pytest.approx(score)


def test_saying_a_phrase_k_times_scores_about_one_over_k() -> None:
    for k in (2, 4, 8, 16):
        repeated = " ".join([SENTENCE] * k)
        assert well_formed_score(repeated) == pytest.approx(1 / k, rel=0.2)


def test_no_one_character_answer_beats_a_sentence() -> None:
    best = max(well_formed_score(chr(code)) for code in range(33, 0x3000))
    assert best < well_formed_score(SENTENCE) / 2


def test_scores_stay_between_zero_and_one() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("ab \n\t,我é", k=rng.randint(0, 40)))
        for terminated in (True, False):
            assert 0.0 <= well_formed_score(text, terminated=terminated) <= 1.0


def test_as_a_reward_it_needs_no_prompts_and_assumes_that_answers_ended() -> None:
    assert well_formed(completions=[SENTENCE, ""]) == [1.0, 0.0]
    assert well_formed(completions=[SENTENCE, SENTENCE], terminated=[True, False]) == [1.0, 0.5]
