"""The answer is an arithmetic expression whose value is compared with the reference's number."""

from __future__ import annotations

import math
from typing import ClassVar

from config.declaration import NonNegativeFloat, declared, option
from rewards.arithmetic import ArithmeticProblem, evaluate, reference_number
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference, not_applicable, quoted
from rewards.tags import PRESETS, Tags


@register("math_eval")
@declared
class MathEval(RowReward):
    """1 if the value of the expression in the answer tags is close to the reference's number, else 0.

        |value − reference| ≤ max(rel_tol · max(|value|, |reference|), abs_tol)

    The expression may have + − * / // % ** ^, brackets, abs, round, min and max. The reference's number is what
    follows ``####`` in it (or all of it), without anything but digits and ``. - e E``. Without answer tags, or with
    something else than arithmetic between them, 0.
    """

    reward_name: ClassVar[str] = "math_eval"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    rel_tol: NonNegativeFloat = option(default=1e-4, meaning="Relative tolerance.")
    abs_tol: NonNegativeFloat = option(default=1e-6, meaning="Absolute tolerance.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        reference = row.reference(self.reference)
        if reference is None:
            return no_reference(self.reference)
        wanted = reference_number(reference)
        if wanted is None:
            return not_applicable(f"the reference {quoted(reference)} has no number")
        tagged = self.tags.answer_start is not None
        answer = self.tags.tagged_answer(row.completion) if tagged else row.answer(self.tags)
        why: dict[str, object] = {"expression": quoted(answer), "reference": wanted}
        if answer is None:
            return Judgement(0.0, why)
        try:
            value = evaluate(answer)
        except ArithmeticProblem as problem:
            return Judgement(0.0, why | {"not arithmetic": str(problem)})
        close = math.isclose(value, wanted, rel_tol=self.rel_tol, abs_tol=self.abs_tol)
        return Judgement(float(close), why | {"value": value})
