"""Supervised fine-tuning: raise the probability of demonstrated answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from base_setup.lora_setup import fuse_adapters
from base_setup.tokenizer_setup import encode_pair
from config.errors import DataLoadError
from config.supervised_config import SFTConfig
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel
from token_attribution.extractor import pad_sequences
from training.model_trainer import ModelTrainer, StepReport
from training.supervised import OnStep, place_of, shuffled_batches, split, step_metrics


class Example(NamedTuple):
    """A demonstration in tokens, the end token included in the completion."""

    prompt: list[int]
    completion: list[int]


class SFTTrainer:
    """Minimises −Σ log π(y_t | x, y_<t) / (number of completion tokens of the batch), prompts excluded.

    Attributes:
        policy: the model being trained; ``language_model`` is the result once training is done.
    """

    def __init__(self, base: LanguageModel, config: SFTConfig) -> None:
        self.config = config
        self.policy = PolicyModel(base, config)

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Rows with ``prompt`` (a text or a chat) and ``completion``, or with one ``text``, as tokens.

        Raises:
            DataLoadError: naming the row, for a missing field or a row longer than ``max_sequence_length``.
        """
        if not rows:
            raise DataLoadError("SFT rows: the list is empty; at least one prompt and completion is needed")
        examples = []
        for i, row in enumerate(rows):
            try:
                prompt, completion = encode_pair(self.policy.tokenizer, row)
            except DataLoadError as error:
                raise DataLoadError(f"{place_of(rows, i, 'SFT rows')}: {error}") from error
            length, limit = len(prompt) + len(completion), self.config.max_sequence_length
            if not prompt or length > limit:
                reason = (
                    "the prompt is empty"
                    if not prompt
                    else f"{length} tokens, max_sequence_length is {limit}"
                )
                raise DataLoadError(f"{place_of(rows, i, 'SFT rows')}: {reason}")
            examples.append(Example(prompt, completion))
        return examples

    def train(self, rows: Sequence[Mapping[str, Any]], on_step: OnStep | None = None) -> dict[str, float]:
        """Train for ``num_steps`` steps; returns the last step's metrics."""
        config, examples = self.config, self.encode(rows)
        trainer = ModelTrainer(self.policy.model, config, total_steps=config.num_steps)
        metrics: dict[str, float] = {}
        batches = shuffled_batches(
            examples, config.batch_size, config.num_steps, config.seed, shuffle=config.shuffle_data
        )
        self.policy.model.train()  # adapter dropout is for this stage
        mx.random.seed(config.seed)  # … and draws from MLX's global state
        for number, batch in enumerate(batches, start=1):
            metrics = step_metrics(self._step(trainer, batch))
            if on_step is not None:
                on_step(number, metrics)
        self.policy.model.eval()
        return metrics

    def _step(self, trainer: ModelTrainer, batch: Sequence[Example]) -> StepReport:
        count = sum(len(example.completion) for example in batch)
        micro_batches = split(batch, self.config.micro_batch_size)
        return trainer.step(lambda part: (self._loss(part, count), None), micro_batches)

    def loss(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """Mean negative logprob per completion token over ``rows``, in nats, without training."""
        examples = self.encode(rows)
        count = sum(len(e.completion) for e in examples)
        parts = split(examples, self.config.micro_batch_size or self.config.batch_size)
        return sum(float(self._loss(part, count)) for part in parts)

    def _loss(self, batch: Sequence[Example], count: int) -> mx.array:
        tokens, mask = pad_sequences([e.prompt for e in batch], [e.completion for e in batch])
        return -mx.sum(self.policy.logprobs(tokens, mask)) / count

    @property
    def language_model(self) -> LanguageModel:
        """The model as trained, adapters fused into its weights: a base for the next stage."""
        base = self.policy.base
        model = fuse_adapters(self.policy.frozen_copy().model)
        return LanguageModel(model, base.tokenizer, base.config, base.name)
