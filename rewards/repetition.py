"""A punishment for saying the same again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from config.declaration import NonNegativeFloat, PositiveInt, declared, option
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward
from rewards.text_utils import distinct_share, words


@register("repetition_penalty", "repetition", "distinct_ngrams")
@declared
class RepetitionPenalty(RowReward):
    """− max_penalty · (1 − different n-grams / all n-grams) of the lower-cased words, in [−max_penalty, 0].

    Fewer than n words have nothing to repeat and score 0, and so does the empty completion.
    """

    reward_name: ClassVar[str] = "repetition_penalty"
    range: ClassVar[tuple[float, float]] = (-1.0, 0.0)
    ngram_size: PositiveInt = option(default=3, meaning="Words of an n-gram (n).")
    max_penalty: NonNegativeFloat = option(default=1.0, meaning="What endless repetition costs.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        spoken: Sequence[str] = words(row.completion.lower())
        if len(spoken) < self.ngram_size:
            return Judgement(0.0, {"words": len(spoken)})
        share = distinct_share(spoken, self.ngram_size)
        return Judgement(
            -self.max_penalty * (1.0 - share), {"words": len(spoken), "different n-grams": share}
        )
