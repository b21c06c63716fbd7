"""Supervised fine-tuning: raise the probability of demonstrated answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from base_setup.lora_setup import fuse_adapters
from base_setup.soft_prompt import soft_prompt_of
from config.errors import DataLoadError, InvalidConfigurationError
from config.supervised_config import NO_PACKED_SOFT_PROMPT, SFTConfig
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel
from token_attribution.logprob_computer import read_states
from token_attribution.packed_rows import can_pack, packed_hidden
from token_attribution.sampled_states import picked_states
from training.model_trainer import ModelTrainer, StepReport
from training.sft_rows import Example, Layout, encode_example, packed, padded, stacked
from training.supervised import OnStep, ShuffledBatches, Task, learn, place_of, split, step_metrics
from training.training_state import origins_of

NAME = "SFT rows"


class SFTTrainer:
    """Minimises −Σ log π(y_t | x, y_<t) / (number of learned tokens of the batch); ``loss_on`` says which these are.

    The head's logits are made for learned tokens alone, a chunk at a time, and none is kept for the backward pass.

    Attributes:
        policy: the model being trained; ``language_model`` is the result once training is done.
        packs: whether examples share rows. notes: what there is to say about the config, in sentences.
    """

    def __init__(self, base: LanguageModel, config: SFTConfig) -> None:
        self.config = config
        self.policy = PolicyModel(base, config)
        if (
            config.packing and soft_prompt_of(self.policy.model) is not None
        ):  # a loaded adapter may have brought one
            raise InvalidConfigurationError(NO_PACKED_SOFT_PROMPT)
        self.packs = config.packing and can_pack(self.policy.model, self.policy.trunk)
        self.notes: list[str] = []
        if config.packing and not self.packs:
            self.notes.append(
                f"packing: sequences that share a row would see each other in this architecture "
                f"({type(self.policy.model).__module__}); each has a row of its own"
            )

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.policy.model

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Rows with ``prompt`` (a text or a chat) and ``completion``, or with one ``text``, as tokens.

        Raises:
            DataLoadError: naming the row, for a missing field or a row longer than ``max_sequence_length``.
        """
        if not rows:
            raise DataLoadError(f"{NAME}: the list is empty; at least one prompt and completion is needed")
        examples = []
        for i, row in enumerate(rows):
            try:
                example = encode_example(self.policy.tokenizer, row, self.config.loss_on)
            except DataLoadError as error:
                raise DataLoadError(f"{place_of(rows, i, NAME)}: {error}") from error
            length, limit = len(example.ids), self.config.max_sequence_length
            if length > limit:
                raise DataLoadError(
                    f"{place_of(rows, i, NAME)}: {length} tokens, max_sequence_length is {limit}"
                )
            examples.append(example)
        return examples

    def train(
        self,
        rows: Sequence[Mapping[str, Any]],
        on_step: OnStep | None = None,
        *,
        validation: Sequence[Mapping[str, Any]] | None = None,
        resume: bool | str | Path | None = None,
    ) -> dict[str, Any]:
        """Train for ``num_steps`` steps, or as many as are left after ``resume``.

        Returns:
            The last step's metrics, and what became of the run (see ``training.supervised.learn``).
        """
        config, examples = self.config, self.encode(rows)
        held_out = None if validation is None else self.encode(validation)
        trainer = ModelTrainer(self.policy.model, config, total_steps=config.num_steps)
        task = Task(
            stage="sft",
            trainer=trainer,
            batches=ShuffledBatches(examples, config.batch_size, config.seed, shuffle=config.shuffle_data),
            step=lambda batch: step_metrics(self._step(trainer, batch)),
            save=self.policy.save,
            load=self.policy.load,
            origins=lambda: origins_of(self.policy.base, examples, held_out),
            validate=None if held_out is None else lambda: self._judge(held_out),
        )
        return learn(task, config, on_step=on_step, resume=resume)

    def loss(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """Mean negative logprob per learned token over ``rows``, in nats, without training."""
        return self.evaluate(rows)["loss"]

    def evaluate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """``loss`` in nats per learned token over ``rows``, and ``perplexity``, its exponential."""
        return self._judge(self.encode(rows))

    def _judge(self, examples: Sequence[Example]) -> dict[str, float]:
        count = sum(example.n_learned for example in examples)
        loss = 0.0
        for batch in split(examples, self.config.batch_size):
            loss += sum(float(self._loss(part, count)) for part in self._parts(batch))
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def _step(self, trainer: ModelTrainer, batch: Sequence[Example]) -> StepReport:
        count = sum(example.n_learned for example in batch)
        return trainer.step(lambda part: (self._loss(part, count), None), self._parts(batch))

    def _parts(self, batch: Sequence[Example]) -> list[Layout]:
        """A batch as micro-batches of at most ``micro_batch_size`` rows, packed or not."""
        size = self.config.micro_batch_size
        if self.packs:
            rows = packed(batch, self.config.max_sequence_length)
            return [stacked(part) for part in split(rows, size)]
        return [padded(part) for part in split(batch, size)]

    def _loss(self, layout: Layout, count: int) -> mx.array:
        return -mx.sum(self.logprobs(layout)) / count

    def logprobs(self, layout: Layout) -> mx.array:
        """Logprobs of the learned tokens: (B, T), 0 elsewhere; or (N,) of packed rows, in their order."""
        tokens, mask, segments = layout
        if segments is None:
            return self.policy.logprobs(tokens, mask)
        trunk = self.policy.trunk
        assert trunk is not None
        states = packed_hidden(trunk, len(self.policy.model.layers), tokens[:, :-1], segments)
        return read_states(
            picked_states(states, mask), trunk, tokens, for_gradient=self.policy.model.training
        ).logprobs

    @property
    def language_model(self) -> LanguageModel:
        """The model as trained, adapters fused into its weights: a base for the next stage."""
        base = self.policy.base
        model = fuse_adapters(self.policy.frozen_copy().model)
        return LanguageModel(model, base.tokenizer, base.config, base.name)
