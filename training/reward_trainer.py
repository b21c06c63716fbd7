"""Learning a reward model from comparisons (Christiano et al. 2017, https://arxiv.org/abs/1706.03741)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from base_setup.tokenizer_setup import encode, end_token_ids
from config.errors import DataLoadError
from config.supervised_config import RewardModelConfig
from models.reward_model import RewardModel
from models.sft_model import LanguageModel
from token_attribution.extractor import pad_sequences
from training.model_trainer import ModelTrainer
from training.preference_loss import bradley_terry_loss
from training.supervised import OnStep, shuffled_batches, split, step_metrics


class Pair(NamedTuple):
    """A question with a better and a worse answer, in tokens, each closed by the end token."""

    chosen: list[int]
    rejected: list[int]


class RewardTrainer:
    """Minimises the Bradley–Terry loss −log σ(r(chosen) − r(rejected)), both sides in one forward."""

    def __init__(self, base: LanguageModel, config: RewardModelConfig) -> None:
        self.config = config
        self.reward_model = RewardModel(base, config)
        self.end = min(end_token_ids(base.tokenizer))

    def encode(self, rows: Sequence[Mapping[str, str]]) -> list[Pair]:
        """Rows with ``prompt``, ``chosen`` and ``rejected`` as tokens; errors name the row."""
        if not rows:
            raise DataLoadError("preference rows: the list is empty; at least one pair is needed")
        return [self._encode(i, row) for i, row in enumerate(rows)]

    def _encode(self, index: int, row: Mapping[str, str]) -> Pair:
        for field in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(field), str):
                raise DataLoadError(
                    f'preference rows[{index}]: "{field}" must be a string, found {row!r:.80}'
                )
        tokenizer = self.reward_model.tokenizer
        prompt = encode(tokenizer, row["prompt"], special=True)
        sides = [[*prompt, *encode(tokenizer, row[side]), self.end] for side in ("chosen", "rejected")]
        longest, limit = max(map(len, sides)), self.config.max_sequence_length
        if longest > limit:
            raise DataLoadError(f"preference rows[{index}]: {longest} tokens, max_sequence_length is {limit}")
        return Pair(*sides)

    def train(self, rows: Sequence[Mapping[str, str]], on_step: OnStep | None = None) -> dict[str, float]:
        """Train for ``num_steps`` steps, then normalise scores on the training answers.

        Returns:
            The last step's metrics; ``accuracy`` is the share of the batch's pairs in the right order.
        """
        config, pairs = self.config, self.encode(rows)
        trainer = ModelTrainer(self.reward_model.module, config, total_steps=config.num_steps)
        metrics: dict[str, float] = {}
        self.reward_model.module.train()
        for number, batch in enumerate(
            shuffled_batches(pairs, config.batch_size, config.num_steps, config.seed), start=1
        ):
            rows_in_batch = len(batch)
            report = trainer.step(
                lambda part: self._loss(part, rows_in_batch), split(batch, config.micro_batch_size)
            )
            right = sum(int(extra["right"]) for extra in report.extras)
            metrics = step_metrics(report, accuracy=right / rows_in_batch)
            if on_step is not None:
                on_step(number, metrics)
        self.reward_model.module.eval()
        sample = pairs[:256]
        self.reward_model.normalise([side for pair in sample for side in pair])
        return metrics

    def _loss(self, batch: Sequence[Pair], count: int) -> tuple[mx.array, dict[str, Any]]:
        chosen, rejected = self._scores(batch)
        loss = bradley_terry_loss(chosen, rejected, centering=self.config.centering)
        return loss * (len(batch) / count), {"right": mx.sum(chosen > rejected)}

    def _scores(self, batch: Sequence[Pair]) -> tuple[mx.array, mx.array]:
        sides = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
        tokens, _ = pad_sequences([s[:1] for s in sides], [s[1:] for s in sides])
        scores = self.reward_model.raw_scores(tokens, mx.array([len(s) for s in sides]))
        return scores[: len(batch)], scores[len(batch) :]

    def accuracy(self, rows: Sequence[Mapping[str, str]]) -> float:
        """Share of pairs in the right order, ties counted half; for pairs that training has not seen."""
        points = 0.0
        for part in split(self.encode(rows), self.reward_model.batch_rows):
            chosen, rejected = self._scores(part)
            points += float(mx.sum(chosen > rejected) + 0.5 * mx.sum(chosen == rejected))
        return points / len(rows)
