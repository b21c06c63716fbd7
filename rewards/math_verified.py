"""Mathematical answers compared as mathematics: ½ is 0.5, x²−1 is (x−1)(x+1), by Hugging Face's ``math-verify``."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from config.declaration import PositiveFloat, PositiveInt, declared, option
from config.errors import InvalidConfigurationError, RewardError
from rewards.line_workers import LineWorkers
from rewards.registry import register
from rewards.row_reward import Judgement, Row, RowReward, no_reference, not_applicable, quoted
from rewards.tags import PRESETS, Tags

WORKER = Path(__file__).with_name("math_worker.py")


@register("math_verify", "math_verified", "accuracy_reward")
@declared
class MathVerify(RowReward):
    r"""1 if the answer is mathematically equal to the reference, else 0: LaTeX, fractions, percent, intervals, sets.

    Read is the tagged answer, or what follows the thinking, of that the last ``max_characters``; of a reference with
    ``####`` what follows that. A reference without dollar signs is read as LaTeX first, so ``\sqrt{2}`` and ``(1, 2)``
    will do. A row whose reference is not understood is left out.

    Answers can be written that a computer algebra system works on for ever (``9^{9^{9^9}}``), so the work is done in
    child processes: one that takes longer than ``timeout`` for an answer is killed, and the answer is wrong. Rows that
    are not reached within ``batch_budget`` are left out. Needs ``pip install math-verify``.
    """

    reward_name: ClassVar[str] = "math_verify"
    tags: Tags = option(default=PRESETS["think"], meaning="Tags: a preset's name, or the four tags.")
    timeout: PositiveFloat = option(default=5.0, meaning="Seconds that one answer may take.")
    batch_budget: PositiveFloat = option(default=120.0, meaning="Seconds that a batch may take.")
    workers: PositiveInt | None = option(
        default=None, meaning="Child processes; none = one per core, at most 8."
    )
    max_characters: PositiveInt = option(default=2000, meaning="Characters of an answer that are read.")
    reference: str | None = option(default=None, meaning="Column of the right answer; none = the usual ones.")

    def prepare(self) -> None:
        """Refuse where the library is not there."""
        if importlib.util.find_spec("math_verify") is None:
            raise InvalidConfigurationError(
                "math_verify: the library math-verify is not installed; pip install math-verify brings it"
            )

    def judge(self, row: Row) -> Judgement:
        """Score one completion."""
        return self.judge_all([row])[0]

    def judge_all(self, rows: Sequence[Row]) -> list[Judgement]:
        """Score a batch, several rows at a time."""
        self.prepare()
        golds = [row.reference(self.reference) for row in rows]
        answers = [row.answer(self.tags)[-self.max_characters :] for row in rows]
        tasks = {
            (answer, gold.rpartition("####")[2].strip()): None
            for answer, gold in zip(answers, golds, strict=True)
            if gold is not None
        }
        seconds = max(
            1, round(self.timeout)
        )  # the library's own limit, which ends most before they are killed
        asked = [{"answer": answer, "gold": gold, "seconds": seconds} for answer, gold in tasks]
        count = self.workers or min(os.cpu_count() or 1, 8)
        said = _workers(count).ask(asked, self.timeout + 1.0, self.batch_budget) if asked else []
        results = dict(zip(tasks, said, strict=True))
        return [
            (
                no_reference(self.reference)
                if gold is None
                else _judgement(answer, gold, results[answer, gold.rpartition("####")[2].strip()], number)
            )
            for number, (answer, gold) in enumerate(zip(answers, golds, strict=True))
        ]


def _judgement(answer: str, gold: str, said: object, number: int) -> Judgement:
    why: dict[str, object] = {"answer": quoted(answer), "reference": quoted(gold)}
    if said == "budget":
        return not_applicable("the batch had no time left for it (batch_budget)")
    if said == "timeout":
        return Judgement(0.0, why | {"given up": "it took longer than the timeout"})
    if said == "lost":
        if _WORKS.get("ever"):
            return Judgement(0.0, why | {"given up": "its process died"})
        raise RewardError(
            f"math_verify: the process that checks answers ended at row {number}; is math-verify in order? Try: "
            f"{sys.executable} {WORKER}",
            row=number,
        )
    assert isinstance(said, dict)
    _WORKS["ever"] = True
    if said["equal"] is None:
        return not_applicable(f"the reference {quoted(gold)} is not understood")
    return Judgement(
        float(said["equal"]), why | {"read as": said.get("read") or said.get("problem") or "nothing"}
    )


_WORKS: dict[str, bool] = {}  # whether a child has answered in this process


@functools.cache
def _workers(count: int) -> LineWorkers:
    # -P: the folder of the script, which is this package, must not hide modules of the library.
    workers = LineWorkers([sys.executable, "-P", str(WORKER)], count)
    atexit.register(workers.close)
    return workers
