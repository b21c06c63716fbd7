"""Learning a reward model from comparisons (Christiano et al. 2017, https://arxiv.org/abs/1706.03741).

Three kinds of rows. Pairs: ``{"prompt", "chosen", "rejected"}``, with a ``margin`` if one is known. Ranked lists:
``{"prompt", "completions", "rewards"}``, best first where there are no rewards. Scored answers: ``{"prompt",
"completion", "reward"}`` (the reward may be text, as in "0.75"); ``pairing`` says what each is compared with. In a list
every answer is compared with every other, which draws n·(n−1)/2 comparisons from n forward passes (Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, eq. 1). A pair is a list of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from base_setup.tokenizer_setup import encode_pair
from config.errors import DataLoadError
from config.supervised_config import RewardModelConfig
from models.reward_model import RewardModel, check_finite
from models.sft_model import LanguageModel
from token_attribution.extractor import pad_sequences
from training.comparisons import Answer, Comparisons, Partners, Ranking, lists_of, micro_batches
from training.model_trainer import ModelTrainer
from training.preference_loss import bradley_terry_loss, preference_accuracy
from training.reward_report import RewardReport, reward_report
from training.supervised import OnStep, ShuffledBatches, Task, learn, place_of, split, step_metrics
from training.training_state import origins_of

Row = Mapping[str, Any]
NAME = "preference rows"
NORMALISED_ON = 512  # answers of the training rows, for the mean and the spread of the scores


class RewardTrainer:
    """Minimises the Bradley–Terry loss −log σ(r(better) − r(worse) − margin), all sides in one forward.

    Attributes:
        reward_model: what is trained, and the result.
    """

    def __init__(self, base: LanguageModel, config: RewardModelConfig) -> None:
        self.config = config
        self.reward_model = RewardModel(base, config)

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.reward_model.module

    # -- Rows -----------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row]) -> list[Ranking]:
        """Rows as lists of answers, a scored answer being a list of one; every row of one call is of one kind.

        Raises:
            DataLoadError: naming the row and what is wrong with it.
        """
        return [ranking for ranking, _ in self._encoded(rows)]

    def _encoded(self, rows: Sequence[Row]) -> list[tuple[Ranking, list[int]]]:
        """Each row's answers, and how many tokens each has without its prompt."""
        if not rows:
            raise DataLoadError(f"{NAME}: the list is empty; at least one is needed")
        found, first = [], _kind(rows[0])
        for i, row in enumerate(rows):
            place = place_of(rows, i, NAME)
            if _kind(row) != first:
                raise DataLoadError(
                    f"{place}: a row of {_kind(row)} among rows of {first}; give one kind only"
                )
            answers = [
                (self._ids(place, {**row, "answer": text} if name is None else row, name or "answer"), reward)
                for name, text, reward in _answers(place, row)
            ]
            ranking = Ranking([Answer([*prompt, *ids], reward) for (prompt, ids), reward in answers])
            found.append((ranking, [len(ids) for (_, ids), _ in answers]))
        if len({a.reward for ranking, _ in found for a in ranking.answers}) < 2:
            raise DataLoadError(f"{NAME}: all rewards are equal, so there is nothing to compare")
        return found

    def _ids(self, place: str, row: Row, side: str) -> tuple[list[int], list[int]]:
        try:
            prompt, answer = encode_pair(self.reward_model.tokenizer, row, side)
        except DataLoadError as error:
            raise DataLoadError(f"{place}: {error}") from error
        length, limit = len(prompt) + len(answer), self.config.max_sequence_length
        if length > limit:
            raise DataLoadError(f"{place}: {length} tokens, max_sequence_length is {limit}")
        return prompt, answer

    # -- Training -------------------------------------------------------------------------------------

    def train(
        self,
        rows: Sequence[Row],
        on_step: OnStep | None = None,
        *,
        validation: Sequence[Row] | None = None,
        resume: bool | str | Path | None = None,
    ) -> dict[str, Any]:
        """Train for ``num_steps`` steps, or as many as are left after ``resume``, then normalise scores on the training
        answers.

        Returns:
            The last step's metrics, and what became of the run (see ``training.supervised.learn``); ``accuracy`` is the
            share of the step's comparisons in the right order.
        """
        config, rankings = self.config, self.encode(rows)
        held_out = None if validation is None else self._encoded(validation)
        trainer = ModelTrainer(self.reward_model.module, config, total_steps=config.num_steps)
        task = Task(
            stage="reward-model",
            trainer=trainer,
            batches=self._batches(rankings),
            step=lambda batch: self._step(trainer, batch),
            save=self.reward_model.save,
            load=self.reward_model.restore,
            origins=lambda: origins_of(self.reward_model.base, rankings, held_out),
            validate=None if held_out is None else lambda: _shown(self._report(held_out)),
        )
        metrics = learn(task, config, on_step=on_step, resume=resume)
        if "stopped" not in metrics:
            answers = [answer.ids for ranking in rankings[:NORMALISED_ON] for answer in ranking.answers]
            self.reward_model.normalise(answers[:NORMALISED_ON])
        return metrics

    def _batches(self, rankings: Sequence[Ranking]) -> Callable[[int], list[Ranking]]:
        """Batches of lists. Scored answers meet others in every epoch; pairs and ranked lists stay together."""
        config = self.config
        batches = ShuffledBatches(rankings, config.batch_size, config.seed, shuffle=config.shuffle_data)
        if any(len(ranking.answers) > 1 for ranking in rankings):
            return batches
        partners = Partners([ranking.answers[0] for ranking in rankings])

        def compared(number: int) -> list[Ranking]:
            generator = np.random.default_rng([config.seed, 1, number])
            return self._compared([ranking.answers[0] for ranking in batches(number)], generator, partners)

        return compared

    def _compared(
        self, answers: list[Answer], generator: np.random.Generator, partners: Partners | None = None
    ) -> list[Ranking]:
        """Scored answers in lists as ``pairing`` says, beside ``partners`` (None: one another)."""
        partners = partners or Partners(answers)
        if self.config.pairing == "lists":
            if len({answer.reward for answer in answers}) < 2:  # nothing to compare among themselves
                answers = [*answers, partners.other(answers[0], generator)]
            return lists_of(answers, self.config.list_size)
        draw = partners.nearest if self.config.pairing == "nearest" else partners.other
        return [Ranking([answer, draw(answer, generator)]) for answer in answers]

    def _step(self, trainer: ModelTrainer, batch: Sequence[Ranking]) -> dict[str, float]:
        parts = micro_batches(batch, self.config.micro_batch_size)
        count = max(sum(len(part.pairs) for part in parts), 1)
        report = trainer.step(lambda part: self._loss(part, count), parts)
        return step_metrics(report, accuracy=sum(float(share) for share in report.extras))

    def _loss(self, part: Comparisons, count: int) -> tuple[mx.array, mx.array]:
        """The part's share of the loss and of the accuracy, both means over ``count`` comparisons."""
        ids = [answer.ids for answer in part.answers]
        tokens, _ = pad_sequences([one[:1] for one in ids], [one[1:] for one in ids])
        scores = self.reward_model.raw_scores(tokens, mx.array([len(one) for one in ids]))  # (A,)
        pairs = mx.array(part.pairs, dtype=mx.int32).reshape(-1, 2)  # (N, 2)
        better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
        scale = self.config.margin_scale
        loss = bradley_terry_loss(
            better,
            worse,
            margin=scale * mx.array(part.margins) if scale else None,
            centering=self.config.centering,
            denominator=count,
        )
        return loss, preference_accuracy(mx.stop_gradient(better), mx.stop_gradient(worse), denominator=count)

    # -- Judging --------------------------------------------------------------------------------------

    def accuracy(self, rows: Sequence[Row]) -> float:
        """Share of comparisons in the right order, ties counted half; for rows that training has not seen."""
        return self.report(rows).accuracy

    def report(self, rows: Sequence[Row]) -> RewardReport:
        """Accuracy, margins, calibration and what length has to do with it, on rows that training has not seen.

        Scored answers are compared as ``pairing`` says: in lists of ``list_size``, or each with one other, drawn
        alike in every report.
        """
        return self._report(self._encoded(rows))

    def _report(self, encoded: Sequence[tuple[Ranking, list[int]]]) -> RewardReport:
        lengths = {
            id(a): n for ranking, counts in encoded for a, n in zip(ranking.answers, counts, strict=True)
        }
        rankings = [ranking for ranking, _ in encoded]
        answers = [answer for ranking in rankings for answer in ranking.answers]
        place = {id(answer): i for i, answer in enumerate(answers)}
        if all(len(ranking.answers) == 1 for ranking in rankings):
            rankings = self._compared(answers, np.random.default_rng([self.config.seed, 2]))
        pairs = [
            (place[id(one.answers[i])], place[id(one.answers[j])])
            for one in rankings
            for i, j in one.comparisons(0)
        ]
        return reward_report(
            self._raw_scores([answer.ids for answer in answers]),
            np.array([lengths[id(answer)] for answer in answers]),
            np.array(pairs),
        )

    def _raw_scores(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        parts = []
        for batch in split(sequences, self.reward_model.batch_rows):
            tokens, _ = pad_sequences([s[:1] for s in batch], [s[1:] for s in batch])
            parts.append(np.array(self.reward_model.raw_scores(tokens, mx.array([len(s) for s in batch]))))
        scores = np.concatenate(parts)
        check_finite(scores)
        return scores


def _shown(report: RewardReport) -> dict[str, float]:
    return {"loss": report.loss, "accuracy": report.accuracy, "margin": report.margin_mean}


def _kind(row: Row) -> str:
    return "pairs" if "chosen" in row else "ranked lists" if "completions" in row else "scored answers"


def _answers(place: str, row: Row) -> list[tuple[str | None, Any, float]]:
    """A row's answers: the field that holds each, or None with the text itself; and its reward."""
    if "chosen" in row:
        margin = _number(place, row, "margin") if "margin" in row else 1.0
        if margin <= 0:
            raise DataLoadError(f"{place}: {margin_sentence(margin)}")
        return [("chosen", None, margin), ("rejected", None, 0.0)]
    if "completions" not in row:
        return [("completion", None, _number(place, row, "reward"))]
    texts = row["completions"]
    rewards = row.get("rewards", range(0, -len(texts), -1) if isinstance(texts, list) else None)
    lists = isinstance(texts, list) and isinstance(rewards, (list, tuple, range))
    if not lists or len(texts) < 2 or len(rewards) != len(texts):
        raise DataLoadError(
            f'{place}: "completions" must be a list of two answers or more, best first or with as many "rewards"'
        )
    found = [_number(place, {"rewards": reward}, "rewards") for reward in rewards]
    if len(set(found)) < 2:
        raise DataLoadError(f"{place}: all rewards of the list are equal, so there is nothing to compare")
    return [(None, text, reward) for text, reward in zip(texts, found, strict=True)]


def margin_sentence(margin: float) -> str:
    """Why a pair with this margin is refused."""
    return f'"margin" must be above 0, found {margin:g}; exchange the two answers, or leave the row out'


def _number(place: str, row: Row, name: str) -> float:
    try:
        number = float(row[name])
    except (KeyError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataLoadError(f'{place}: "{name}" must be a finite number, found {row.get(name)!r}')
    return number
