"""Learning to judge each step of an answer from steps that are labelled right or wrong.

Rows: ``{"prompt", "steps": ["…", "…"], "labels": [true, false]}``. Each step is closed by ``step_separator``, and the
last token of that is the mark at which the head is read: σ(score) is the probability that the step is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from base_setup.tokenizer_setup import is_chat
from config.errors import DataLoadError
from config.supervised_config import ProcessRewardConfig
from models.process_reward_model import ProcessRewardModel
from models.reward_model import RewardModel
from models.sft_model import LanguageModel
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


class ProcessRewardTrainer:
    """Minimises the mean over steps of −y log σ(s) − (1 − y) log(1 − σ(s)).

    Attributes:
        model: what is trained, and the result.
    """

    def __init__(self, base: LanguageModel, config: ProcessRewardConfig) -> None:
        self.config = config
        reward_model = RewardModel(base, config)
        self.model = ProcessRewardModel(reward_model, config.step_separator, config.step_reward)

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.model.reward_model.module

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
        try:
            ids, marks = self.model.encode(prompt, steps)
        except DataLoadError as error:
            raise DataLoadError(f"{place}: {error}") from error
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
            save=self.model.save,
            load=reward_model.restore,
            origins=lambda: origins_of(reward_model.base, examples, held_out),
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
