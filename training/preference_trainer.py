"""Learning from preferences without sampling: DPO, IPO, SimPO, ORPO, CPO from pairs, KTO from single labelled answers.

The algorithms are rows of ``training.preference_algorithms``. The reference is the policy as it is before the first
step: with a fresh adapter that is the base model with its adapters off, over the same arrays. Its logprobs of a row
never change, so each is computed once, when a batch first needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from base_setup.lora_setup import fuse_adapters
from base_setup.tokenizer_setup import encode_pair
from config.errors import DataLoadError
from config.supervised_config import PreferenceConfig
from models.fingerprint import weights_fingerprint
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel
from token_attribution.extractor import pad_sequences
from training.comparisons import better_and_worse
from training.model_trainer import ModelTrainer
from training.preference_algorithms import (
    PREFERENCE_ALGORITHMS,
    Answers,
    kto,
    kto_baseline,
)
from training.preference_loss import preference_accuracy
from training.supervised import OnStep, ShuffledBatches, Task, learn, place_of, split, step_metrics
from training.training_state import origins_of

Row = Mapping[str, Any]
NAME = "preference rows"


class Answer(NamedTuple):
    """A prompt with one answer, in tokens, the end token included."""

    prompt: list[int]
    completion: list[int]


class Comparison(NamedTuple):
    """One row: answers to one prompt, the chosen first; or a single one with its label. ``key`` is its number."""

    key: int
    answers: tuple[Answer, ...]
    good: bool = True


class Prepared(NamedTuple):
    """What a step has computed of its batch before anything is differentiated."""

    references: dict[int, list[float]]
    baseline: float  # z0 of KTO


class ReferenceLogprobs(dict[int, list[float]]):
    """The reference's logprob of each answer of a row, by the row's number.

    A checkpoint keeps them: computed again beside other rows they could differ in the last bit.
    """

    def state_arrays(self) -> dict[str, mx.array]:
        """``rows`` (N,) int32 and ``logprobs`` (N, answers) float32; nothing where none is known."""
        if not self:
            return {}
        return {"rows": mx.array(list(self)), "logprobs": mx.array(list(self.values()))}

    def load_state_arrays(self, arrays: Mapping[str, mx.array]) -> None:
        """Know what :meth:`state_arrays` has."""
        self.clear()
        if arrays:
            rows, logprobs = np.array(arrays["rows"]).tolist(), np.array(arrays["logprobs"]).tolist()
            self.update(zip(rows, logprobs, strict=True))


class PreferenceTrainer:
    """Minimises the mean over rows of ``algorithm.loss``.

    Attributes:
        policy: what is trained. reference: the policy before the first step; None where the algorithm has none.
        options: what the algorithm reads, its own values where nobody set one.
    """

    def __init__(self, base: LanguageModel, config: PreferenceConfig) -> None:
        self.config = config
        self.algorithm = PREFERENCE_ALGORITHMS[config.algorithm]
        given = {
            "preference_beta": config.preference_beta,
            "label_smoothing": config.label_smoothing,
            "target_margin": config.target_margin,
            "nll_weight": config.nll_weight,
            "desirable_weight": config.desirable_weight,
            "undesirable_weight": config.undesirable_weight,
        }
        set_here = {name: value for name, value in given.items() if value is not None}
        self.options = {name: set_here.get(name, own) for name, own in self.algorithm.options.items()}
        self.policy = PolicyModel(base, config)
        fresh = self.policy.has_adapter and config.adapter_path is None
        self.reference = (
            self.policy.frozen_copy(with_adapter=not fresh) if self.algorithm.has_reference else None
        )

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.policy.model

    # -- Rows -----------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row]) -> list[Comparison]:
        """Rows with ``prompt``, ``chosen``, ``rejected``, or ``prompt``, ``completions``, ``rewards``, of which every
        two of different reward are a pair; for KTO also ``prompt``, ``completion`` and ``label`` (true for good) or
        ``reward`` (good above 0), a pair there being one good and one bad answer.

        Raises:
            DataLoadError: naming the row and what is wrong with it.
        """
        if not rows:
            raise DataLoadError(f"{NAME}: the list is empty; at least one is needed")
        found: list[Comparison] = []
        for i, row in enumerate(rows):
            place = place_of(rows, i, NAME)
            if "chosen" in row or "completions" in row:
                for sides in self._pairs(place, row):
                    if self.algorithm.learns_from_pairs:
                        found.append(Comparison(len(found), sides))
                    else:
                        found += [Comparison(len(found) + j, (one,), j == 0) for j, one in enumerate(sides)]
            elif self.algorithm.learns_from_pairs:
                raise DataLoadError(
                    f'{place}: {self.algorithm.name} learns from pairs and "chosen" is missing (fields: '
                    f'{", ".join(map(str, row))}); give chosen and rejected, or use algorithm = "kto" for single '
                    "answers"
                )
            else:
                found.append(
                    Comparison(len(found), (self._answer(place, row, "completion"),), _label(place, row))
                )
        if not self.algorithm.learns_from_pairs and len({tuple(c.answers[0].prompt) for c in found}) < 2:
            raise DataLoadError(
                f"{NAME}: {self.algorithm.name} measures its KL on each other's prompts, and there is one prompt only; "
                "at least two are needed"
            )
        return found

    def _pairs(self, place: str, row: Row) -> list[tuple[Answer, Answer]]:
        """A row's chosen and rejected answer; of a ranked list every two of different reward."""
        if "chosen" in row:
            return [(self._answer(place, row, "chosen"), self._answer(place, row, "rejected"))]
        texts, rewards = row["completions"], row.get("rewards")
        if not isinstance(texts, list) or not isinstance(rewards, list) or len(texts) != len(rewards):
            raise DataLoadError(f'{place}: "completions" and "rewards" must be lists of one length')
        answers = [self._answer(place, {**row, "answer": text}, "answer") for text in texts]
        return [(answers[i], answers[j]) for i, j in better_and_worse(rewards)]

    def _answer(self, place: str, row: Row, side: str) -> Answer:
        try:
            prompt, completion = encode_pair(self.policy.tokenizer, row, side)
        except DataLoadError as error:
            raise DataLoadError(f"{place}: {error}") from error
        length, limit = len(prompt) + len(completion), self.config.max_sequence_length
        if not prompt:
            raise DataLoadError(f"{place}: the prompt is empty")
        if length > limit:
            raise DataLoadError(f"{place}: {length} tokens, max_sequence_length is {limit}")
        return Answer(prompt, completion)

    # -- Training -------------------------------------------------------------------------------------

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
            The last step's metrics, and what became of the run (see ``training.supervised.learn``).
        """
        config, comparisons = self.config, self.encode(rows)
        held_out = None if validation is None else self.encode(validation)
        trainer = ModelTrainer(self.policy.model, config, total_steps=config.num_steps)
        references, of_held_out = ReferenceLogprobs(), ReferenceLogprobs()
        task = Task(
            stage="preference",
            trainer=trainer,
            batches=ShuffledBatches(comparisons, config.batch_size, config.seed, shuffle=config.shuffle_data),
            step=lambda batch: self._step(trainer, batch, references),
            save=self.policy.save,
            load=self.policy.load,
            origins=lambda: self._origins(comparisons, held_out),
            validate=None if held_out is None else lambda: self._judge(held_out, of_held_out),
            keepers={"references": references},
        )
        return learn(task, config, on_step=on_step, resume=resume)

    def _origins(
        self, comparisons: Sequence[Comparison], held_out: Sequence[Comparison] | None
    ) -> dict[str, str]:
        origins = origins_of(self.policy.base, comparisons, held_out)
        if self.reference is None:
            return origins
        return origins | {"reference": weights_fingerprint(self.reference.model)}

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        """Loss, accuracy and margin on rows, without training."""
        return self._judge(self.encode(rows), {})

    def _step(
        self, trainer: ModelTrainer, batch: Sequence[Comparison], references: dict[int, list[float]]
    ) -> dict[str, float]:
        self.policy.model.eval()  # what is not differentiated is computed without dropout
        prepared = self._prepare(batch, references)
        self.policy.model.train()
        parts = split(batch, self.config.micro_batch_size)
        report = trainer.step(lambda part: self._loss(part, prepared, len(batch)), parts)
        worth = np.concatenate([np.array(extra) for extra in report.extras])
        return step_metrics(report, **self._shown(batch, worth, prepared))

    def _judge(
        self, comparisons: Sequence[Comparison], references: dict[int, list[float]]
    ) -> dict[str, float]:
        losses, accuracy, margin, count = 0.0, 0.0, 0.0, 0
        batches = split(comparisons, max(self.config.batch_size, 2))
        if len(batches) > 1 and len(batches[-1]) == 1:  # KTO's z0 of one row would be its own answer's
            batches[-2:] = [[*batches[-2], *batches[-1]]]
        for batch in batches:
            prepared = self._prepare(batch, references)
            worths = []
            for part in split(batch, self.config.micro_batch_size):
                loss, worth = self._loss(part, prepared, 1)
                losses += float(loss)
                worths.append(np.array(worth))
            shown = self._shown(batch, np.concatenate(worths), prepared)
            accuracy += shown["accuracy"] * len(batch)
            margin += shown["margin"] * len(batch)
            count += len(batch)
        return {"loss": losses / count, "accuracy": accuracy / count, "margin": margin / count}

    def _prepare(self, batch: Sequence[Comparison], known: dict[int, list[float]]) -> Prepared:
        """Reference logprobs of the batch, computed where ``known`` lacks them, and KTO's z0."""
        if self.reference is None:
            return Prepared({row.key: [0.0] * len(row.answers) for row in batch}, 0.0)
        for part in split([row for row in batch if row.key not in known], self.config.micro_batch_size):
            sums = iter(
                np.array(self._sums(self.reference, [a for row in part for a in row.answers])).tolist()
            )
            known.update({row.key: [next(sums) for _ in row.answers] for row in part})
        baseline = 0.0 if self.algorithm.learns_from_pairs else self._baseline(batch)
        return Prepared(known, baseline)

    def _baseline(self, batch: Sequence[Comparison]) -> float:
        """z0: each prompt with the answer that the next row of the batch has."""
        answers = [row.answers[0] for row in batch]
        moved = [*answers[1:], *answers[:1]]
        mixed = [Answer(mine.prompt, other.completion) for mine, other in zip(answers, moved, strict=True)]
        sums: list[tuple[mx.array, mx.array]] = []
        for part in split(mixed, self.config.micro_batch_size):
            assert self.reference is not None
            sums.append((self._sums(self.policy, part), self._sums(self.reference, part)))
            mx.eval(sums[-1])
        ours, theirs = (mx.concatenate(list(side)) for side in zip(*sums, strict=True))
        return float(kto_baseline(ours, theirs))

    def _sums(self, model: Any, answers: Sequence[Answer]) -> mx.array:
        """Logprob of each answer, summed over its tokens: (B,)."""
        tokens, mask = pad_sequences([a.prompt for a in answers], [a.completion for a in answers])
        return mx.sum(model.logprobs(tokens, mask), axis=1)

    def _loss(self, part: Sequence[Comparison], prepared: Prepared, count: int) -> tuple[mx.array, mx.array]:
        """The part's share of the mean over ``count`` rows, and the worth of each answer (rows, answers)."""
        sides = len(part[0].answers)
        answers = [row.answers[side] for side in range(sides) for row in part]  # all sides in one forward
        sums = self._sums(self.policy, answers)
        found = [
            Answers(
                sums[side * len(part) : (side + 1) * len(part)],
                mx.array([prepared.references[row.key][side] for row in part]),
                mx.array([float(len(row.answers[side].completion)) for row in part]),
            )
            for side in range(sides)
        ]
        if self.algorithm.loss is not None:
            losses = self.algorithm.loss(found[0], found[1], self.options)
        else:
            good = mx.array([row.good for row in part])
            losses = kto(found[0], good, mx.array(prepared.baseline), self.options)
        worth = mx.stack(
            [mx.stop_gradient(self.algorithm.worth(side, self.options)) for side in found], axis=1
        )
        return mx.sum(losses) / count, worth

    def _shown(self, batch: Sequence[Comparison], worth: np.ndarray, prepared: Prepared) -> dict[str, float]:
        """Share of rows on the right side, and by how much the good answers lead; ``worth`` is (rows, answers)."""
        if self.algorithm.learns_from_pairs:
            right = float(preference_accuracy(mx.array(worth[:, 0]), mx.array(worth[:, 1])))
            return {"accuracy": right, "margin": float((worth[:, 0] - worth[:, 1]).mean())}
        lead = worth[:, 0] - self.options["preference_beta"] * prepared.baseline
        good = np.array([row.good for row in batch])
        signed = np.where(good, lead, -lead)  # for the answer if it is good, against it if it is bad
        points = (signed > 0) + 0.5 * (signed == 0)
        return {
            "accuracy": float(points.mean()),
            "margin": float(signed.mean()),
            "kl_baseline": prepared.baseline,
        }

    @property
    def language_model(self) -> LanguageModel:
        """The model as trained, adapters fused into its weights."""
        base = self.policy.base
        model = fuse_adapters(self.policy.frozen_copy().model)
        return LanguageModel(model, base.tokenizer, base.config, base.name)


def _label(place: str, row: Row) -> bool:
    """Whether a single answer is a good one."""
    if isinstance(row.get("label"), bool):
        return bool(row["label"])
    try:
        reward = math.nan if isinstance(row["reward"], bool) else float(row["reward"])
    except (KeyError, TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise DataLoadError(
            f'{place}: "label" must be true or false, or "reward" a finite number (good above 0), found '
            f'{row.get("label", row.get("reward"))!r:.60}'
        )
    return reward > 0
