"""One seed, one result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from experience_buffer.buffer_manager import ExperienceBuffer
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.small_runs import (
    KINDS,
    PPO,
    PROMPTS,
    ascii_share,
    config,
    same,
    steps_of,
    weights,
)


@KINDS
def test_a_seed_determines_metrics_and_weights_bit_for_bit(tmp_path: Path, kind: dict[str, Any]) -> None:
    def run(folder: Path, seed: int) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        options = {**kind, "seed": seed, "minibatch_size": 3, "micro_batch_size": 2, "learning_rate": 1e-2}
        trainer = PPOTrainer(config(folder, batch_size=3, **options), reward_model=ascii_share)
        lines = steps_of(trainer.train(PROMPTS, num_epochs=2)["run_folder"])
        timed = re.compile("time/|tokens_per_second")
        return [{k: v for k, v in line.items() if not timed.match(k)} for line in lines], weights(trainer)

    one, again, other = run(tmp_path / "1", 5), run(tmp_path / "2", 5), run(tmp_path / "3", 6)
    assert one[0] == again[0]
    assert same(one[1], again[1])
    assert one[0] != other[0]
    assert not same(one[1], other[1])


def test_rows_meet_in_another_order_in_every_epoch_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real dealer, watched: minibatches are compared as sets, since within one rows are sorted by width."""
    epochs: list[list[frozenset[int]]] = []
    deal = ExperienceBuffer.minibatches

    def watched(self: ExperienceBuffer, *seed: int) -> Any:
        names = mx.broadcast_to(mx.arange(self.experience.size)[:, None], self.experience.mask.shape)
        named = ExperienceBuffer(
            self.experience._replace(advantages=names), minibatch_size=self.minibatch_size
        )
        epochs.append(
            [
                frozenset(row for part in minibatch.micro_batches for row in part.advantages[:, 0].tolist())
                for minibatch in deal(named, *seed)
            ]
        )
        return deal(self, *seed)

    monkeypatch.setattr(ExperienceBuffer, "minibatches", watched)
    options = {**PPO, "group_size": 4, "num_epochs_per_rollout": 3, "minibatch_size": 4}
    PPOTrainer(config(tmp_path, **options), reward_model=ascii_share).train(PROMPTS, num_epochs=2)
    assert len(epochs) == 2 * 3
    assert all(sorted(row for rows in epoch for row in rows) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
