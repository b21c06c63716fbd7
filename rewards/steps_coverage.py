"""Does the completion go through the steps that its row says it must?"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from config.declaration import Fraction, declared, option
from rewards.jaccard import jaccard
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, not_applicable
from rewards.text_utils import plain_tokens

_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+(\S.*)$", re.MULTILINE)
_PIECE = re.compile(r"[;.\n]")


@register("steps_coverage")
@declared
class StepsCoverage(RowReward):
    """Jaccard index of the completion's steps and the required ones, lower-cased and stripped; 0 if it has none.

    Its steps are the items of its lists; without a list, the pieces between ``;``, ``.`` and line breaks that have at
    least three words. ``mode = "recall"`` is the share of the required steps instead of which at least ``threshold``
    of the different words occur in one of the completion's steps: what a paraphrase can reach. Required steps come
    from the row's ``required_steps``, or that field of its ``meta``; a row without them is left out.
    """

    reward_name: ClassVar[str] = "steps_coverage"
    mode: Literal["jaccard", "recall"] = option(default="jaccard", meaning="How steps are compared.")
    threshold: Fraction = option(
        default=0.6, meaning="With recall: share of a required step's words that makes it covered."
    )

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        required = row.field("required_steps")
        if required is None:
            return not_applicable("the row has no required_steps")
        wanted = [required] if isinstance(required, str) else list(required)
        wanted = [str(step).strip().lower() for step in wanted if str(step).strip()]
        found = steps_in(row.completion)
        if not wanted or not found:
            return Judgement(0.0, {"steps found": len(found), "steps required": len(wanted)})
        if self.mode == "jaccard":
            shared = sorted(set(found) & set(wanted))
            return Judgement(
                jaccard(found, wanted), {"steps found": len(set(found)), "shared": shared or "none"}
            )
        bags = [set(plain_tokens(step)) for step in found]
        missing = [step for step in wanted if not self._covered(set(plain_tokens(step)), bags)]
        score = 1.0 - len(missing) / len(wanted)
        return Judgement(score, {"steps found": len(found), "missing": missing or "none"})

    def _covered(self, step: set[str], bags: list[set[str]]) -> bool:
        return any(len(step & bag) >= self.threshold * len(step) for bag in bags)


def steps_in(text: str) -> list[str]:
    """The steps of a text, lower-cased: items of its lists, else pieces of at least three words.

    >>> steps_in("First:\\n1. Boil water\\n2. Add tea")
    ['boil water', 'add tea']
    """
    items = _ITEM.findall(text)
    pieces = items or [piece for piece in _PIECE.split(text) if len(piece.split()) >= 3]
    return [piece.strip().lower() for piece in pieces]
