"""The reward for when no reward is given: no empty, repetitive or cut-off answers.

It knows nothing about the task and needs no reference answer, so it cannot make a model right. It
pushes against the three ways in which a small model most visibly fails, and gives a first run a curve
to look at. Replace it by a reward of your own as soon as there is one.

    score = distinct · long_enough · ended                                  in [0, 1]

    distinct      share of the 3-grams that are different from one another
    long_enough   min(1, sqrt(c / 16)), c = number of characters that are not white space
    ended         1 if the model ended the answer itself, 1/2 if it was cut off at the length limit

The units of the 3-grams are words. Scripts without spaces (and answers of fewer than three words) are
compared by characters instead: whenever there are fewer than three words or they are longer than 16
characters on average. Upper and lower case are the same.

Why the ramp, and why this one: without it the best answer is a single character, which is never
repetitive and ends at once. A ramp in tokens or words would depend on the tokenizer or the script;
characters do not. The root is mild: a correct one-word answer keeps most of its score (``Paris`` 0.56),
one character gets 0.25, and from sixteen characters on (a short sentence) length earns nothing more.
Neither does it cost anything, up to the limit: what is said once may be long, and loops are caught by
``distinct``, where a phrase that is said k times scores about 1/k.

Known to fool it: random words, and a template with a counter ("item 1 … item 2 …"), because 3-grams
across the counter differ. Judging those needs a model, or a reward that knows the task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rewards.registry import register
from rewards.text_utils import distinct_share, text_of

NGRAM = 3
FULL_LENGTH = 16  # characters, without white space
LONGEST_WORD = 16  # characters on average; above it the text is taken to have no spaces between words


@register("default", "well_formed")
def well_formed(
    completions: Sequence[Any], terminated: Sequence[bool] | None = None, **columns: Any
) -> list[float]:
    """Score each completion by the formula above; without ``terminated`` all count as ended."""
    if terminated is None:
        terminated = [True] * len(completions)
    return [
        well_formed_score(text_of(text), terminated=bool(ended))
        for text, ended in zip(completions, terminated, strict=True)
    ]


def well_formed_score(text: str, *, terminated: bool = True) -> float:
    """The score of one answer, in time linear in its length.

    >>> well_formed_score("The sky is blue because air scatters blue light most.")
    1.0
    >>> well_formed_score("and so on " * 10)         # 3 different 3-grams out of 28
    0.10714285714285714
    >>> well_formed_score("x")
    0.25
    """
    words = text.casefold().split()
    characters = sum(map(len, words))
    if not characters:
        return 0.0
    by_words = len(words) >= NGRAM and characters <= LONGEST_WORD * len(words)
    units: Sequence[str] = words if by_words else " ".join(words)
    long_enough = min(1.0, math.sqrt(characters / FULL_LENGTH))
    return distinct_share(units, NGRAM) * long_enough * (1.0 if terminated else 0.5)
