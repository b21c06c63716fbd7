"""The optimiser step. Every stage takes this one: a stage is a loss and a batch.

``step`` adds up the gradients of the micro-batches it is given. Losses are written so that the sum is the
gradient of the whole batch: each divides by the count of the WHOLE batch, known before the first
micro-batch. Then one clip, one AdamW update, and nothing at all where a number is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from base_setup.backend import set_memory_limits
from base_setup.parameters import named_arrays
from config.errors import CheckpointError, TrainingRuntimeError
from config.training_config import TrainingConfig
from token_attribution import host_math
from training.adamw import AdamW

Batch = TypeVar("Batch")
#: A loss: the batch's share of the scalar to minimise, and whatever arrays its caller wants back.
Loss = Callable[[Batch], tuple[mx.array, Any]]


class StepReport(NamedTuple):
    """What one optimiser step did."""

    loss: float
    grad_norm: float  # global L2 norm before clipping
    learning_rate: float
    skipped: bool  # loss or gradient was not finite: weights and optimiser are as they were
    extras: list[Any]  # what the loss returned beside its value, evaluated, one entry per micro-batch
    rejected: bool = False  # the caller did not want this step: likewise


def build_schedule(
    config: TrainingConfig, learning_rate: float, total_steps: int
) -> float | Callable[..., Any]:
    """The learning rate over optimiser steps: a linear warm-up from 0, then level, linear or cosine to ``lr_end``.

    Where ``learning_rate`` is not the config's own (the value network's), the end keeps its share of the peak.
    """
    warmup = config.warmup_steps or round(config.warmup_ratio * total_steps)
    remaining = config.lr_decay_steps or max(total_steps - warmup, 1)
    end = config.lr_end * learning_rate / config.learning_rate
    if config.lr_schedule == "linear":
        course: Callable[..., Any] = optim.linear_schedule(learning_rate, end, remaining)
    elif config.lr_schedule == "cosine":
        course = optim.cosine_decay(learning_rate, remaining, end)
    elif warmup:
        course = lambda _: mx.array(learning_rate)  # noqa: E731
    else:
        return learning_rate
    if warmup == 0:
        return course
    # MLX counts from 0: update k (from 0) would run at k/warmup of the peak, so the first would do nothing.
    rise = optim.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1))
    return optim.join_schedules([rise, course], [warmup])


class ModelTrainer:
    """AdamW on the trainable parameters of one module.

    Bias correction is on and weight decay is what the config says (MLX's own defaults are off and 0.01: the
    first step would be 3.16 times too long). Moments are kept in float32, or in 8 bits (``optimizer_bits``).
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        *,
        total_steps: int,
        learning_rate: float | None = None,
    ) -> None:
        self.module = module
        set_memory_limits()  # a no-op but on Metal
        self.max_grad_norm = config.max_grad_norm
        self.max_skipped = config.max_skipped_steps
        self.skipped_in_a_row = 0
        rate = build_schedule(config, learning_rate or config.learning_rate, total_steps)
        self._is_scheduled = callable(rate)
        self.optimizer = AdamW(
            learning_rate=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            bits=config.optimizer_bits,
        )
        self.optimizer.init(module.trainable_parameters())
        if not tree_flatten(module.trainable_parameters()):
            raise ValueError("the module has no trainable parameters")

    def step(
        self,
        loss: Loss[Batch],
        micro_batches: Iterable[Batch],
        accept: Callable[[list[Any]], bool] = lambda extras: True,
    ) -> StepReport:
        """One update from the summed gradients of ``micro_batches``, unless ``accept(extras)`` says no."""
        differentiate = nn.value_and_grad(self.module, loss)
        total, gradients, extras = mx.zeros(()), None, []
        for batch in micro_batches:
            (value, extra), gradient = differentiate(batch)
            gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
            del gradient  # or it would live on beside the sum, through the next micro-batch and the update
            total = total + value
            # Evaluated per micro-batch: only one graph of activations is alive at a time.
            mx.eval(total, gradients, extra)
            extras.append(extra)
        if gradients is None:
            raise ValueError("an optimiser step needs at least one micro-batch")
        flat = named_arrays(gradients)
        del gradients
        # Read before the update: one NaN gradient would make every weight NaN for ever.
        loss_value, norm_value = float(total), global_norm(flat.values())
        skipped = not (math.isfinite(loss_value) and math.isfinite(norm_value))
        rejected = not skipped and not accept(extras)
        if skipped:
            self._count_skip(loss_value, norm_value)
        elif not rejected:
            self.skipped_in_a_row = 0
            self._update(flat, norm_value)
        rate = float(self.optimizer.learning_rate)
        return StepReport(loss_value, norm_value, rate, skipped, extras, rejected)

    def state_arrays(self) -> dict[str, mx.array]:
        """The optimiser's state by dotted path: moments, count of steps, learning rate."""
        return named_arrays(self.optimizer.state)

    def load_state_arrays(self, arrays: Mapping[str, mx.array]) -> None:
        """Go on where :meth:`state_arrays` was taken, of a module with the same trainable parameters.

        A learning rate without a schedule stays this config's own.

        Raises:
            CheckpointError: naming the first array that is missing, unknown, or of another shape or dtype.
        """
        mine = self.state_arrays()
        for name in sorted(mine.keys() | arrays.keys()):
            here, there = _kind(mine.get(name)), _kind(arrays.get(name))
            if here != there:
                raise CheckpointError(
                    f"the optimiser's {name} is {there} in the checkpoint and {here} here; was another model or "
                    "adapter, or another optimizer_bits, trained there?"
                )
        kept = {} if self._is_scheduled else {"learning_rate": mine["learning_rate"]}
        arrays = {**arrays, **kept}
        self.optimizer.state = tree_map_with_path(lambda path, _: arrays[path], self.optimizer.state)
        mx.eval(self.optimizer.state)

    def _update(self, gradients: dict[str, mx.array], norm: float) -> None:
        """One AdamW step; it empties ``gradients``."""
        clip = self.max_grad_norm is not None and norm > self.max_grad_norm
        factor = self.max_grad_norm / (norm + 1e-6) if clip and self.max_grad_norm is not None else 1.0
        self.optimizer.update(self.module, gradients, factor)

    def _count_skip(self, loss: float, norm: float) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise TrainingRuntimeError(
                f"{self.skipped_in_a_row} updates in a row had a loss of {loss} and a gradient norm of {norm} "
                "and were skipped; lower learning_rate, or look for rewards of enormous size (max_skipped_steps)"
            )


def _kind(array: mx.array | None) -> str:
    return "missing" if array is None else f"{array.dtype} {tuple(array.shape)}".removeprefix("mlx.core.")


def global_norm(arrays: Iterable[mx.array]) -> float:
    """The L2 norm of all numbers together."""
    if host_math.usable():
        numbers = [x.astype(mx.float32) for x in arrays]
        return math.sqrt(sum(host_math.sum_of_squares(host_math.view(x)) for x in numbers))
    # Summed row by row: on CPU mx.sum adds one number after the other, and float32 loses 2 % of 10 million squares.
    squares = [mx.sum(mx.sum(mx.square(x), axis=-1)) for x in arrays]
    return math.sqrt(float(mx.sum(mx.stack(squares))))
