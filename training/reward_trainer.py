"""Learning a reward model from comparisons (Christiano et al. 2017, https://arxiv.org/abs/1706.03741).

Two kinds of rows. Pairs: ``{"prompt", "chosen", "rejected"}``. Scored answers: ``{"prompt", "completion",
"reward"}`` (the reward may be text, as in "0.75"); these are compared in lists of ``list_size``, every answer
with every other of its list, which draws list_size·(list_size−1)/2 comparisons from list_size forward passes
(Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1). A pair is a list of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from base_setup.tokenizer_setup import encode_pair
from config.errors import DataLoadError
from config.supervised_config import RewardModelConfig
from models.reward_model import RewardModel
from models.sft_model import LanguageModel
from token_attribution.extractor import pad_sequences
from training.model_trainer import ModelTrainer
from training.preference_loss import bradley_terry_loss, preference_accuracy
from training.supervised import OnStep, place_of, shuffled_batches, split, step_metrics

Row = Mapping[str, Any]
NAME = "preference rows"


class Answer(NamedTuple):
    """A question with one answer, in tokens, closed by the end token; and how good it is."""

    ids: list[int]
    reward: float


class Ranking(NamedTuple):
    """Answers that are compared with each other."""

    answers: list[Answer]

    def comparisons(self, offset: int) -> list[tuple[int, int]]:
        """(better, worse) positions among all answers of a batch, of which this list starts at ``offset``."""
        rewards = [answer.reward for answer in self.answers]
        return [
            (offset + i, offset + j)
            for i, better in enumerate(rewards)
            for j, worse in enumerate(rewards)
            if better > worse
        ]


class RewardTrainer:
    """Minimises the Bradley–Terry loss −log σ(r(better) − r(worse)), all sides in one forward.

    Attributes:
        reward_model: what is trained, and the result.
    """

    def __init__(self, base: LanguageModel, config: RewardModelConfig) -> None:
        self.config = config
        self.reward_model = RewardModel(base, config)

    # -- Rows -----------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row]) -> list[Ranking]:
        """Rows as lists of answers; every row of one call must be of the same kind.

        Raises:
            DataLoadError: naming the row and what is wrong with it.
        """
        if not rows:
            raise DataLoadError("preference rows: the list is empty; at least one is needed")
        if "chosen" in rows[0]:
            return [self._pair(place_of(rows, i, NAME), row) for i, row in enumerate(rows)]
        if self.config.batch_size < 2:
            raise DataLoadError(
                f"preference rows: scored answers are compared within a batch, and batch_size is "
                f"{self.config.batch_size}; at least 2 is needed"
            )
        answers = [self._scored(place_of(rows, i, NAME), row) for i, row in enumerate(rows)]
        rankings = [Ranking(list(part)) for part in split(answers, self.config.list_size)]
        if len({answer.reward for answer in answers}) < 2:
            raise DataLoadError("preference rows: all rewards are equal, so there is nothing to compare")
        return rankings

    def _pair(self, place: str, row: Row) -> Ranking:
        sides = [self._ids(place, row, side) for side in ("chosen", "rejected")]
        return Ranking([Answer(sides[0], 1.0), Answer(sides[1], 0.0)])

    def _scored(self, place: str, row: Row) -> Answer:
        try:
            reward = float(row["reward"])
        except (KeyError, TypeError, ValueError):
            reward = math.nan
        if not math.isfinite(reward):
            raise DataLoadError(f'{place}: "reward" must be a finite number, found {row.get("reward")!r}')
        return Answer(self._ids(place, row, "completion"), reward)

    def _ids(self, place: str, row: Row, side: str) -> list[int]:
        try:
            prompt, answer = encode_pair(self.reward_model.tokenizer, row, side)
        except DataLoadError as error:
            raise DataLoadError(f"{place}: {error}") from error
        length, limit = len(prompt) + len(answer), self.config.max_sequence_length
        if length > limit:
            raise DataLoadError(f"{place}: {length} tokens, max_sequence_length is {limit}")
        return [*prompt, *answer]

    # -- Training -------------------------------------------------------------------------------------

    def train(self, rows: Sequence[Row], on_step: OnStep | None = None) -> dict[str, float]:
        """Train for ``num_steps`` steps, then normalise scores on the training answers.

        Returns:
            The last step's metrics; ``accuracy`` is the share of its comparisons in the right order.
        """
        config, rankings = self.config, self.encode(rows)
        trainer = ModelTrainer(self.reward_model.module, config, total_steps=config.num_steps)
        metrics: dict[str, float] = {}
        self.reward_model.module.train()  # adapter dropout is for this stage
        mx.random.seed(config.seed)  # … and draws from MLX's global state
        for number, batch in enumerate(self._batches(rankings, "chosen" in rows[0]), start=1):
            metrics = self._step(trainer, batch)
            if on_step is not None:
                on_step(number, metrics)
        self.reward_model.module.eval()
        self.reward_model.normalise(
            [answer.ids for ranking in rankings[:256] for answer in ranking.answers][:512]
        )
        return metrics

    def _batches(self, rankings: Sequence[Ranking], pairs: bool) -> Any:
        """Batches of rankings; scored answers meet others in every epoch, pairs stay together."""
        config = self.config
        if pairs:
            return shuffled_batches(
                rankings, config.batch_size, config.num_steps, config.seed, shuffle=config.shuffle_data
            )
        answers = [answer for ranking in rankings for answer in ranking.answers]
        batches = shuffled_batches(
            answers, config.batch_size, config.num_steps, config.seed, shuffle=config.shuffle_data
        )
        return ([Ranking(list(part)) for part in split(batch, config.list_size)] for batch in batches)

    def _step(self, trainer: ModelTrainer, batch: Sequence[Ranking]) -> dict[str, float]:
        count = max(sum(len(ranking.comparisons(0)) for ranking in batch), 1)
        report = trainer.step(
            lambda part: self._loss(part, count), split(batch, self.config.micro_batch_size)
        )
        return step_metrics(report, accuracy=sum(float(share) for share in report.extras))

    def _loss(self, batch: Sequence[Ranking], count: int) -> tuple[mx.array, mx.array]:
        """The batch's share of the loss and of the accuracy, both means over ``count`` comparisons."""
        better, worse = self._compare(batch)
        loss = bradley_terry_loss(better, worse, centering=self.config.centering, denominator=count)
        return loss, preference_accuracy(mx.stop_gradient(better), mx.stop_gradient(worse), denominator=count)

    def _compare(self, batch: Sequence[Ranking]) -> tuple[mx.array, mx.array]:
        """Scores of the better and the worse answer of each comparison: (N,) each."""
        answers = [answer.ids for ranking in batch for answer in ranking.answers]
        starts = np.cumsum([0, *(len(ranking.answers) for ranking in batch)]).tolist()
        pairs = [
            pair for start, ranking in zip(starts, batch, strict=False) for pair in ranking.comparisons(start)
        ]
        tokens, _ = pad_sequences([ids[:1] for ids in answers], [ids[1:] for ids in answers])
        scores = self.reward_model.raw_scores(tokens, mx.array([len(ids) for ids in answers]))  # (A,)
        picked = mx.array(pairs, dtype=mx.int32).reshape(-1, 2)  # (N, 2)
        return scores[picked[:, 0]], scores[picked[:, 1]]

    def accuracy(self, rows: Sequence[Row]) -> float:
        """Share of comparisons in the right order, ties counted half; for rows that training has not seen."""
        rankings = self.encode(rows)
        points = count = 0.0
        for part in split(rankings, max(1, self.reward_model.batch_rows // len(rankings[0].answers))):
            better, worse = self._compare(part)
            points += float(preference_accuracy(better, worse, denominator=1.0))
            count += better.size
        if count == 0:
            raise DataLoadError("preference rows: no list holds two different rewards; enlarge list_size")
        return points / count
