"""A reward for each step of an answer (Lightman et al. 2023, https://arxiv.org/abs/2305.20050): process rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from base_setup.tokenizer_setup import encode, encode_prompt, is_chat
from config.errors import CheckpointError, DataLoadError
from models.reward_model import SETTINGS, RewardModel, read_settings
from models.sft_model import LanguageModel
from rewards.text_utils import text_of
from token_attribution.extractor import pad_sequences

KIND = "process_reward_model"
StepReward = Literal["min", "product", "mean", "last"]
#: What an answer is worth whose steps are right with these probabilities.
STEP_REWARDS: Mapping[StepReward, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "mean": lambda steps: sum(steps) / len(steps),
    "last": lambda steps: steps[-1],
}


class ProcessRewardModel:
    """Scores the steps of answers; as a reward, what ``STEP_REWARDS`` makes one number of them.

    Attributes:
        reward_model: trunk and head. separator: what ends a step; the head is read at its last token.
        step_reward: a name of ``STEP_REWARDS``; Lightman et al. use the product and find the minimum as good.
    """

    reward_name = KIND

    def __init__(
        self, reward_model: RewardModel, separator: str = "\n", step_reward: StepReward = "min"
    ) -> None:
        self.reward_model = reward_model
        self.separator = separator
        self.step_reward = step_reward

    def encode(self, prompt: Any, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokens of prompt and steps, and where each step ends."""
        return encode_steps(self.reward_model.tokenizer, prompt, steps, self.separator)

    def scores_at(self, ids: Sequence[Sequence[int]], marks: Sequence[Sequence[int]]) -> mx.array:
        """What the head says at the marks of all rows, one after the other: (N,) float32, differentiable."""
        tokens, _ = pad_sequences([one[:1] for one in ids], [one[1:] for one in ids])
        states = self.reward_model.trunk.hidden(tokens)  # (B, T, D)
        width = tokens.shape[1]
        places = mx.array([row * width + mark for row, own in enumerate(marks) for mark in own])
        picked = states.reshape(-1, states.shape[-1])[places]  # (N, D)
        return self.reward_model.module.head(picked.astype(mx.float32))[:, 0]

    def step_scores(self, prompts: Sequence[Any], steps: Sequence[Sequence[str]]) -> list[list[float]]:
        """The probability that each step is right."""
        found: list[list[float]] = []
        rows, size = list(zip(prompts, steps, strict=True)), self.reward_model.batch_rows
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            encoded = [self.encode(prompt, own) for prompt, own in part]
            flat = iter(np.array(mx.sigmoid(self.scores_at(*zip(*encoded, strict=True)))).tolist())
            found += [[float(next(flat)) for _ in own] for _, own in part]
        return found

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """A reward in [0, 1]: each completion cut into steps at the separator; an empty one scores 0."""
        steps = [[s for s in text_of(c).split(self.separator) if s.strip()] for c in completions]
        filled = [i for i, own in enumerate(steps) if own]
        scores = [0.0] * len(steps)
        if filled:
            found = self.step_scores([prompts[i] for i in filled], [steps[i] for i in filled])
            for i, own in zip(filled, found, strict=True):
                scores[i] = float(STEP_REWARDS[self.step_reward](own))
        return scores

    def save(self, folder: str | Path) -> None:
        """Write what :meth:`load` reads; ``reward_config.json`` says what the folder is."""
        self.reward_model.save(folder, kind=KIND, separator=self.separator, step_reward=self.step_reward)

    @classmethod
    def load(cls, folder: str | Path, base: LanguageModel | None = None) -> ProcessRewardModel:
        """Read what :meth:`save` wrote; ``base`` spares loading the base model again.

        Raises:
            CheckpointError: in a sentence, where the folder is not one of a process reward model.
        """
        settings = read_settings(folder)
        separator: Any = settings.get("separator")
        step_reward: Any = settings.get("step_reward")
        if settings.get("kind") != KIND:
            raise CheckpointError(
                f"{folder}: a reward model for whole answers, not for steps; load it with RewardModel.load"
            )
        if not isinstance(separator, str) or not separator or step_reward not in STEP_REWARDS:
            raise CheckpointError(
                f"{Path(folder) / SETTINGS}: a separator and a step_reward ({', '.join(STEP_REWARDS)}) are expected, "
                f"found {separator!r:.40} and {step_reward!r:.40}"
            )
        return cls(RewardModel.restored(folder, settings, base), separator, step_reward)


def encode_steps(
    tokenizer: Any, prompt: Any, steps: Sequence[str], separator: str
) -> tuple[list[int], list[int]]:
    """Tokens of prompt and steps, and where each step ends. A step may come with its separator or without.

    Raises:
        DataLoadError: for a step with the separator inside. Answers are cut into steps there when they are scored, so
            the model would learn one step and see two.
    """
    ids = encode_prompt(tokenizer, prompt) if is_chat(prompt) else encode(tokenizer, prompt, special=True)
    ids, marks = list(ids), []
    for number, step in enumerate(steps, start=1):
        step = step.removesuffix(separator)
        if separator in step:
            raise DataLoadError(
                f"step {number} has step_separator {separator!r} inside, where answers are cut into steps when they "
                "are scored; make two steps of it, or choose another step_separator"
            )
        ids += encode(tokenizer, step + separator)
        marks.append(len(ids) - 1)
    return ids, marks


def is_process_reward_model(folder: str | Path) -> bool:
    """Whether the folder of a saved reward model is one that scores steps."""
    return bool(read_settings(folder).get("kind") == KIND)
