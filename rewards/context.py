"""What a reward written as a class is told about one completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RewardContext:
    """One completion, its prompt, and what its data set says about it.

    Attributes:
        generated_text: the completion.
        prompt_text: the prompt; of chat messages, their contents.
        reference_completion: the right answer, or None.
        test_cases: of a programming task; empty for others.
        metadata: every other column of the row, the fields of its ``meta`` among them.
        update_step: the step of the run, 0 outside one.
    """

    generated_text: str
    prompt_text: str = ""
    reference_completion: str | None = None
    test_cases: Sequence[Any] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    update_step: int = 0
