"""A reward of your own, worked through: copy this file, change ``judge``, pass an instance to the trainer.

    trainer = PPOTrainer(config, reward_model=CustomRewardModel())

Any callable ``f(prompts, completions, **columns) -> list[float]`` will do; a class is worth it when the
reward has settings or something to load once. Fields of your prompts' rows arrive as keyword lists, one
entry per completion, next to ``prompt_ids``, ``completion_ids`` and ``terminated``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.text_utils import text_of


class CustomRewardModel:
    """Prefers answers of about ``target_words`` different words that end by themselves.

    score = min(u, t) / t - max(u - t, 0) / t - ``cut_off_penalty`` if the answer was cut off,
    where u counts different words and t is the target. So 0 for nothing, 1 at the target, falling beyond.
    """

    def __init__(self, target_words: int = 20, cut_off_penalty: float = 0.5) -> None:
        if target_words < 1:
            raise ValueError(f"target_words: at least 1 is expected, found {target_words}")
        self.target_words = target_words
        self.cut_off_penalty = cut_off_penalty

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        terminated: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One score per completion."""
        ended = terminated if terminated is not None else [True] * len(completions)
        return [self.judge(text_of(text), end) for text, end in zip(completions, ended, strict=True)]

    def judge(self, text: str, ended: bool) -> float:
        """The score of one answer."""
        different = len(set(text.lower().split()))
        wanted = self.target_words
        score = (min(different, wanted) - max(different - wanted, 0)) / wanted
        return score if ended else score - self.cut_off_penalty
