"""A reward for each step of an answer (Lightman et al. 2023, https://arxiv.org/abs/2305.20050): process rewards.

Rows: ``{"prompt", "steps": ["…", "…"], "labels": [true, false]}``. Each step is closed by ``step_separator``, and the
last token of that is the mark at which the head is read: σ(score) is the probability that the step is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from base_setup.tokenizer_setup import encode, encode_prompt, is_chat
from config.errors import DataLoadError
from config.supervised_config import ProcessRewardConfig
from models.reward_model import RewardModel
from models.sft_model import LanguageModel
from rewards.text_utils import text_of
from token_attribution.extractor import pad_sequences
from training.model_trainer import ModelTrainer
from training.preference_loss import step_loss
from training.supervised import OnStep, ShuffledBatches, Task, learn, place_of, split, step_metrics
from training.training_state import origins_of

Row = Mapping[str, Any]
NAME = "process rows"


class Steps(NamedTuple):
    """A question with the steps of one answer, in tokens."""

    ids: list[int]
    marks: list[int]  # where in ``ids`` each step ends
    labels: list[float]  # in [0, 1]


class ProcessRewardModel:
    """Scores the steps of answers; as a reward, the least probable step of each (``aggregate``: or their product).

    Attributes:
        reward_model: trunk and head. separator: what ends a step.
    """

    reward_name = "process_reward_model"

    def __init__(
        self, reward_model: RewardModel, separator: str, aggregate: Literal["min", "product"] = "min"
    ) -> None:
        self.reward_model = reward_model
        self.separator = separator
        self.aggregate = aggregate

    def encode(self, prompt: Any, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokens of prompt and steps, and where each step ends."""
        tokenizer = self.reward_model.tokenizer
        ids = encode_prompt(tokenizer, prompt) if is_chat(prompt) else encode(tokenizer, prompt, special=True)
        ids, marks = list(ids), []
        for step in steps:
            ids += encode(tokenizer, step + self.separator)
            marks.append(len(ids) - 1)
        return ids, marks

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
        for part in split(list(zip(prompts, steps, strict=True)), self.reward_model.batch_rows):
            encoded = [self.encode(prompt, own) for prompt, own in part]
            flat = iter(np.array(mx.sigmoid(self.scores_at(*zip(*encoded, strict=True)))).tolist())
            found += [[float(next(flat)) for _ in own] for _, own in part]
        return found

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """A reward: each completion cut into steps at the separator; an empty one scores 0."""
        steps = [[s for s in text_of(c).split(self.separator) if s.strip()] for c in completions]
        filled = [i for i, own in enumerate(steps) if own]
        scores = [0.0] * len(steps)
        if filled:
            found = self.step_scores([prompts[i] for i in filled], [steps[i] for i in filled])
            for i, own in zip(filled, found, strict=True):
                scores[i] = min(own) if self.aggregate == "min" else float(np.prod(own))
        return scores

    def save(self, folder: str | Path) -> None:
        """Write what :meth:`load` reads; the separator is in the config."""
        self.reward_model.save(folder)

    @classmethod
    def load(
        cls, folder: str | Path, separator: str = "\n", base: LanguageModel | None = None
    ) -> ProcessRewardModel:
        """Read what :meth:`save` wrote."""
        return cls(RewardModel.load(folder, base), separator)


class ProcessRewardTrainer:
    """Minimises the mean over steps of −y log σ(s) − (1 − y) log(1 − σ(s)).

    Attributes:
        model: what is trained, and the result.
    """

    def __init__(self, base: LanguageModel, config: ProcessRewardConfig) -> None:
        self.config = config
        self.model = ProcessRewardModel(RewardModel(base, config), config.step_separator)

    def encode(self, rows: Sequence[Row]) -> list[Steps]:
        """Rows in tokens.

        Raises:
            DataLoadError: naming the row and what is wrong with it.
        """
        if not rows:
            raise DataLoadError(f"{NAME}: the list is empty; at least one is needed")
        return [self._steps(place_of(rows, i, NAME), row) for i, row in enumerate(rows)]

    def _steps(self, place: str, row: Row) -> Steps:
        prompt, steps, labels = (row.get(name) for name in ("prompt", "steps", "labels"))
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise DataLoadError(f'{place}: "prompt" must be a text or a chat, found {prompt!r:.60}')
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
            raise DataLoadError(f'{place}: "steps" must be a list of texts, found {steps!r:.60}')
        if not isinstance(labels, list) or len(labels) != len(steps):
            raise DataLoadError(f'{place}: "labels" must have one entry per step ({len(steps)})')
        for label in labels:
            if not isinstance(label, (int, float)) or not 0 <= label <= 1:
                raise DataLoadError(
                    f"{place}: a label is true, false or a number from 0 to 1, found {label!r:.60}"
                )
        ids, marks = self.model.encode(prompt, steps)
        if len(ids) > self.config.max_sequence_length:
            limit = self.config.max_sequence_length
            raise DataLoadError(f"{place}: {len(ids)} tokens, max_sequence_length is {limit}")
        return Steps(ids, marks, [float(label) for label in labels])

    def train(
        self,
        rows: Sequence[Row],
        on_step: OnStep | None = None,
        *,
        validation: Sequence[Row] | None = None,
        resume: bool | str | Path | None = None,
    ) -> dict[str, Any]:
        """Train for ``num_steps`` steps, or as many as are left after ``resume``.

        Returns:
            The last step's metrics, and what became of the run (see ``training.supervised.learn``); ``accuracy`` is the
            share of steps of answers on the right side of ½.
        """
        config, examples = self.config, self.encode(rows)
        held_out = None if validation is None else self.encode(validation)
        reward_model = self.model.reward_model
        trainer = ModelTrainer(reward_model.module, config, total_steps=config.num_steps)

        def step(batch: Sequence[Steps]) -> dict[str, float]:
            count = sum(len(one.marks) for one in batch)
            report = trainer.step(lambda part: self._loss(part, count), split(batch, config.micro_batch_size))
            return step_metrics(report, accuracy=sum(float(share) for share in report.extras))

        task = Task(
            stage="process-reward",
            trainer=trainer,
            batches=ShuffledBatches(examples, config.batch_size, config.seed, shuffle=config.shuffle_data),
            step=step,
            save=reward_model.save,
            load=reward_model.restore,
            origins=lambda: origins_of(reward_model.base.model, examples, held_out),
            validate=None if held_out is None else lambda: self._judge(held_out),
        )
        return learn(task, config, on_step=on_step, resume=resume)

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        """``loss`` and ``accuracy`` per step, without training."""
        return self._judge(self.encode(rows))

    def _judge(self, examples: Sequence[Steps]) -> dict[str, float]:
        count = sum(len(one.marks) for one in examples)
        parts = [self._loss(part, count) for part in split(examples, self.config.batch_size)]
        return {
            "loss": sum(float(loss) for loss, _ in parts),
            "accuracy": sum(float(share) for _, share in parts),
        }

    def _loss(self, part: Sequence[Steps], count: int) -> tuple[mx.array, mx.array]:
        scores = self.model.scores_at([one.ids for one in part], [one.marks for one in part])
        labels = mx.array([label for one in part for label in one.labels])
        right = (mx.stop_gradient(scores) > 0) == (labels > 0.5)
        return step_loss(scores, labels, denominator=count), mx.sum(right) / count
