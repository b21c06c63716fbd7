"""How alike answer and reference are, by the words that they share, rare ones counting more.

TF-IDF comes from scikit-learn; where that is not installed the overlap of word sets takes its place, and a line says
so, once.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from typing import Any, ClassVar, Literal

from config.declaration import BelowOne, NonNegativeFloat, NonNegativeInt, declared, option
from rewards.jaccard import jaccard
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference, quoted
from rewards.tags import PRESETS, Tags
from rewards.text_utils import plain_tokens

_CONTRACTIONS = (
    (re.compile(r"n['’]t\b"), " not"),
    (re.compile(r"['’]re\b"), " are"),
    (re.compile(r"['’]ve\b"), " have"),
)


@register("semantic_similarity")
@declared
class SemanticSimilarity(RowReward):
    """Cosine of the TF-IDF vectors of answer and reference (what follows the thinking in each), or their overlap.

    Either of them shorter than ``min_length`` characters: 0. Cleaned texts (lower case, contractions spelled out,
    letters and digits only) of at least ``min_word_count`` words are compared by words and pairs of words without
    English stop words, fitted on the two; below ``fallback_similarity_threshold`` the best of word overlap, runs of
    2–4 characters and 1–3 words counts. Shorter texts are compared by runs of 2–4 characters.

    Times max(0.5, 1 − strength · (r − 1.5)) for an answer r > 1.5 times as long as the reference; with
    ``apply_length_penalty`` times max(0.5, 2 r) for r < 0.5.
    """

    reward_name: ClassVar[str] = "semantic_similarity"
    tags: Tags = option(default=PRESETS["think-only"], meaning="Tags: a preset's name, or the four tags.")
    method: Literal["tfidf", "overlap", "jaccard"] = option(
        default="tfidf", meaning="TF-IDF cosine, or the Jaccard index of the word sets (overlap = jaccard)."
    )
    min_length: NonNegativeInt = option(default=10, meaning="Characters below which a text scores 0.")
    min_word_count: NonNegativeInt = option(
        default=3, meaning="Words below which texts are compared by characters."
    )
    fallback_similarity_threshold: BelowOne = option(
        default=0.1, meaning="Cosine below which other ways of comparing are tried."
    )
    apply_length_penalty: bool = option(default=False, meaning="Answers of less than half the length lose.")
    apply_verbosity_penalty: bool = option(default=True, meaning="Answers of more than 1.5 times lose.")
    verbosity_penalty_strength: NonNegativeFloat = option(
        default=0.01, meaning="Lost per multiple of the reference's length beyond 1.5."
    )
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        answer, wanted = row.answer(self.tags), self.tags.after_thinking(reference)
        why: dict[str, object] = {"answer": quoted(answer), "reference": quoted(wanted)}
        if min(len(answer), len(wanted)) < max(self.min_length, 1):
            return Judgement(0.0, why | {"too short": f"below {self.min_length} characters"})
        similarity, how = self.similarity(cleaned(answer), cleaned(wanted))
        factor = self._length_factor(len(answer) / len(wanted))
        return Judgement(similarity * factor, why | {how: similarity, "factor for length": factor})

    def similarity(self, a: str, b: str) -> tuple[float, str]:
        """Similarity of two cleaned texts in [0, 1], and how it was found."""
        overlap = jaccard(a.split(), b.split()) if a and b else 0.0
        if self.method != "tfidf" or not _has_sklearn():
            return overlap, "word overlap"
        if min(len(a.split()), len(b.split())) < self.min_word_count:
            return _cosine(a, b, "char", (2, 4), None), "cosine of characters"
        cosine = _cosine(a, b, "word", (1, 2), "english")
        if cosine >= self.fallback_similarity_threshold:
            return cosine, "cosine of words"
        others = (overlap, _cosine(a, b, "char", (2, 4), None), _cosine(a, b, "word", (1, 3), None))
        return max(cosine, *others), "best of several"

    def _length_factor(self, ratio: float) -> float:
        if self.apply_verbosity_penalty and ratio > 1.5:
            return max(0.5, 1.0 - self.verbosity_penalty_strength * (ratio - 1.5))
        if self.apply_length_penalty and ratio < 0.5:
            return max(0.5, 2.0 * ratio)
        return 1.0


def cleaned(text: str) -> str:
    """Lower case, contractions spelled out, letters, marks and digits only, single spaces.

    >>> cleaned("They've said: DON'T!")
    'they have said do not'
    """
    text = text.lower()
    for pattern, spelled in _CONTRACTIONS:
        text = pattern.sub(spelled, text)
    return " ".join(plain_tokens(text))


def _cosine(a: str, b: str, analyzer: str, ngrams: tuple[int, int], stop_words: str | None) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer: Any = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, stop_words=stop_words)
    try:
        rows = vectorizer.fit_transform([a, b])  # sparse, (2, terms), each of length 1
    except ValueError:  # nothing but stop words
        return 0.0
    return min(max(float((rows[0] @ rows[1].T).sum()), 0.0), 1.0)


@functools.cache
def _has_sklearn() -> bool:
    found = importlib.util.find_spec("sklearn") is not None
    if not found:
        print(
            "semantic_similarity: scikit-learn is not installed, so texts are compared by the overlap of their "
            "words; pip install scikit-learn brings it",
            file=sys.stderr,
        )
    return found
