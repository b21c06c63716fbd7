"""Supervised fine-tuning: raise the probability of demonstrated answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from base_setup.lora_setup import fuse_adapters
from base_setup.tokenizer_setup import answer_end_id, encode
from config.errors import DataLoadError
from config.supervised_config import SFTConfig
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel
from token_attribution.extractor import pad_sequences
from training.model_trainer import ModelTrainer, StepReport
from training.supervised import OnStep, shuffled_batches, split, step_metrics


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
        self.end = answer_end_id(base.tokenizer)

    def encode(self, rows: Sequence[Mapping[str, str]]) -> list[Example]:
        """Rows with ``prompt`` and ``completion`` as tokens.

        Raises:
            DataLoadError: naming the row, for a missing field or a row longer than ``max_sequence_length``.
        """
        if not rows:
            raise DataLoadError("SFT rows: the list is empty; at least one prompt and completion is needed")
        examples = []
        for i, row in enumerate(rows):
            if not isinstance(row.get("prompt"), str) or not isinstance(row.get("completion"), str):
                raise DataLoadError(
                    f'SFT rows[{i}]: "prompt" and "completion" must be strings, found {row!r:.80}'
                )
            prompt = encode(self.policy.tokenizer, row["prompt"], special=True)
            completion = [*encode(self.policy.tokenizer, row["completion"]), self.end]
            length, limit = len(prompt) + len(completion), self.config.max_sequence_length
            if not prompt or length > limit:
                reason = (
                    "the prompt is empty"
                    if not prompt
                    else f"{length} tokens, max_sequence_length is {limit}"
                )
                raise DataLoadError(f"SFT rows[{i}]: {reason}")
            examples.append(Example(prompt, completion))
        return examples

    def train(self, rows: Sequence[Mapping[str, str]], on_step: OnStep | None = None) -> dict[str, float]:
        """Train for ``num_steps`` steps; returns the last step's metrics."""
        config, examples = self.config, self.encode(rows)
        trainer = ModelTrainer(self.policy.model, config, total_steps=config.num_steps)
        metrics: dict[str, float] = {}
        batches = shuffled_batches(examples, config.batch_size, config.num_steps, config.seed)
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

    def loss(self, rows: Sequence[Mapping[str, str]]) -> float:
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
