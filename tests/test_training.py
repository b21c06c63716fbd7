"""The whole trainer on models of a few thousand weights: what a step does, and what ends a run."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

import models.sft_model
import ppo_trainer.ppo_trainer
from config.errors import (
    CheckpointError,
    DataLoadError,
    InvalidConfigurationError,
    ModelLoadError,
    RewardError,
    ToolkitError,
    TrainingRuntimeError,
)
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from experience_buffer.buffer_manager import ExperienceBuffer
from experience_buffer.data_structures import Experience, Prompt, Rollout
from models.policy_model import PolicyModel
from models.reward_model import RewardModel
from models.sft_model import build_embedded
from models.value_model import ValueModel
from monitoring.metrics_file import read_metrics
from ppo_trainer.algorithms import Algorithm
from ppo_trainer.credit import Credit, Scored
from ppo_trainer.evaluator import score_rollouts
from ppo_trainer.ppo_trainer import PPOTrainer
from ppo_trainer.updater import Updater

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)
#: Of different lengths, so that every batch is padded.
PROMPTS = ["ab", "abc", "q", "hello there"]
PPO: dict[str, Any] = {"algorithm": "ppo"}
SHARED: dict[str, Any] = {"algorithm": "ppo", "value_network": "shared"}
GRPO: dict[str, Any] = {"algorithm": "grpo", "group_size": 4}
KINDS = pytest.mark.parametrize("kind", [PPO, SHARED, GRPO], ids=["ppo", "ppo-shared", "grpo"])
PPO_AND_GRPO = pytest.mark.parametrize("kind", [PPO, GRPO], ids=["ppo", "grpo"])


def config(folder: Path, **options: Any) -> PPOConfig:
    return PPOConfig(
        **{
            "model_name": "embedded",
            "embedded_model": SMALLEST,
            "output_dir": str(folder / "run"),
            "max_new_tokens": 5,
            "verbose": False,
            **options,
        }
    )


def ascii_share(completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of a completion's characters that are ASCII: about a half for a fresh model."""
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]


def even_share(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def constant(completions: Sequence[str], **columns: Any) -> list[float]:
    return [0.3] * len(completions)


def judged_by_length(prompts: Sequence[str], **columns: Any) -> list[float]:
    """Equal within a group, different between groups."""
    return [float(len(prompt)) for prompt in prompts]


def arrays(module: Any) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(module.parameters())}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)


def largest_difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(one[k] - other[k]).max()) for k in one)


def weights(trainer: PPOTrainer) -> dict[str, np.ndarray]:
    """Everything that could train: the policy, and the value network where there is one."""
    value = {} if trainer.value_model is None else arrays(trainer.value_model.module)
    return arrays(trainer.policy.model) | {f"value.{name}": x for name, x in value.items()}


def steps_of(folder: str | Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "kind" not in line]


def fixed_batch(trainer: PPOTrainer, group_size: int = 2, seed: int = 0) -> list[Rollout]:
    """Rollouts of every length from 1 to 2 G, of ids and with logprobs that have nothing to do with sampling."""
    random = np.random.default_rng(seed)
    rollouts = []
    for index, text in enumerate(["ab", "a longer one"]):
        prompt = Prompt(index, text, tuple(trainer.policy.tokenizer.encode(text)), {})
        for member in range(group_size):
            ids = tuple(random.integers(0, 200, size=1 + index * group_size + member).tolist())
            rollouts.append(Rollout(prompt, member, ids, (-5.0,) * len(ids), member % 2 == 0, f"{member}"))
    return rollouts


# What training moves, and what it must not ---------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_training_moves_the_policy_and_neither_the_base_nor_the_reference(
    tmp_path: Path, kind: dict[str, Any], fine_tune_type: str
) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, fine_tune_type=fine_tune_type, batch_size=2, **kind),
        reward_model=ascii_share,
    )
    base, reference, before = (
        arrays(trainer.policy.base.model),
        arrays(trainer.reference.model),
        weights(trainer),
    )
    tokens = mx.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    mask = mx.array([[False, True, True, True]] * 2)
    ref_logprobs = np.array(trainer.reference.logprobs(tokens, mask, 0.7))
    own_logprobs = np.array(trainer.policy.logprobs(tokens, mask, 0.7))
    np.testing.assert_array_equal(own_logprobs, ref_logprobs)

    trainer.train(PROMPTS, num_epochs=2)

    after = weights(trainer)
    trained = {name for name, x in tree_flatten(trainer.policy.model.trainable_parameters())}
    assert {name for name in before if not np.array_equal(before[name], after[name])} >= trained
    if fine_tune_type == "lora":
        assert trained
        assert all("lora" in name for name in trained)
    assert same(arrays(trainer.policy.base.model), base)
    assert same(arrays(trainer.reference.model), reference)
    assert np.array_equal(np.array(trainer.reference.logprobs(tokens, mask, 0.7)), ref_logprobs)
    assert np.abs(np.array(trainer.policy.logprobs(tokens, mask, 0.7)) - ref_logprobs).max() > 1e-3


@KINDS
@pytest.mark.parametrize("reward", [ascii_share, even_share])
def test_the_reward_rises(tmp_path: Path, kind: dict[str, Any], reward: Callable[..., list[float]]) -> None:
    options = {**kind, "group_size": 8, "gamma": 1.0, "kl_coef": 0.01, "fine_tune_type": "full"}
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **options), reward_model=reward)
    held_out = ["xy", "another"] * 16
    before = trainer.evaluate(held_out)["avg_reward"]
    epochs = 12 if kind["algorithm"] == "ppo" else 20
    curve = [epoch["avg_reward"] for epoch in trainer.train(PROMPTS, num_epochs=epochs)["history"]]
    assert np.mean(curve[-3:]) > np.mean(curve[:3]) + 0.1
    assert trainer.evaluate(held_out)["avg_reward"] > before + 0.1


@PPO_AND_GRPO
def test_a_kl_weight_brings_a_policy_that_went_astray_back_to_its_reference(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """With a constant reward the KL is all there is to learn from; with its sign wrong it would grow."""
    options = {**kind, "fine_tune_type": "full", "group_size": 8, "gamma": 1.0}
    free = PPOTrainer(config(tmp_path, learning_rate=1e-2, kl_coef=0.0, **options), reward_model=even_share)
    free.train(PROMPTS, num_epochs=8 if kind["algorithm"] == "ppo" else 16)
    leashed = PPOTrainer(
        config(tmp_path / "2", learning_rate=5e-3, kl_coef=1.0, **options),
        reward_model=constant,
        policy=free.policy,
        reference=free.reference,
    )
    astray = leashed.evaluate(PROMPTS * 16)["objective/kl"]
    leashed.train(PROMPTS, num_epochs=8)
    back = leashed.evaluate(PROMPTS * 16)["objective/kl"]
    assert astray > 0.3
    assert back < 0.7 * astray


# The first minibatch, the ratio, the KL ------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_update_ratio_and_kl_are_exact_and_afterwards_they_move(
    tmp_path: Path, kind: dict[str, Any], temperature: float
) -> None:
    options = {
        **kind,
        "temperature": temperature,
        "num_epochs_per_rollout": 1,
        "minibatch_size": 4,
        "group_size": 4,
        "micro_batch_size": 3,
    }
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **options), reward_model=ascii_share)
    lines = steps_of(trainer.train(PROMPTS, num_epochs=3)["run_folder"])
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[2]["kl"] > 1e-4  # k3, which is never negative
    assert lines[0]["num_updates"] == 4
    for line in lines:
        assert line["first_minibatch/ratio_max"] == 1.0
        assert line["first_minibatch/approxkl"] == 0.0
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["val/ratio_max"] > 1.001  # from the second minibatch on


def test_the_kl_of_the_first_step_is_exactly_zero(tmp_path: Path) -> None:
    """Same weights, same rows in the same order: not even a rounding error apart."""
    trainer = PPOTrainer(config(tmp_path, temperature=0.7, **PPO), reward_model=ascii_share)
    line = steps_of(trainer.train(PROMPTS, num_epochs=1)["run_folder"])[0]
    assert line["objective/kl"] == 0.0
    assert line["objective/non_score_reward"] == pytest.approx(0.0, abs=1e-7)


def test_one_update_per_batch_needs_no_old_logprobs_and_its_ratio_is_one(tmp_path: Path) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, temperature=0.7, **GRPO), reward_model=ascii_share
    )
    made: list[Experience] = []
    update = trainer.update
    trainer.update = lambda experience: made.append(experience) or update(experience)  # type: ignore[method-assign, func-returns-value]
    lines = steps_of(trainer.train(PROMPTS, num_epochs=3)["run_folder"])
    assert all(experience.old_logprobs is None for experience in made)
    for line in lines:
        assert (line["val/ratio_min"], line["val/ratio_max"], line["policy/approxkl_avg"]) == (1.0, 1.0, 0.0)
        assert line["num_updates"] == 1
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[0]["kl"] < 1e-9
    assert lines[2]["kl"] > 1e-4


@PPO_AND_GRPO
def test_the_second_epoch_is_measured_against_the_policy_that_sampled(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """All rows twice through the optimiser: the ratio of the second pass is that of the updated policy."""
    options = {**kind, "fine_tune_type": "full", "learning_rate": 1e-2, "temperature": 0.7}
    twice = PPOTrainer(config(tmp_path / "2", num_epochs_per_rollout=2, **options), reward_model=even_share)
    once = PPOTrainer(config(tmp_path / "1", num_epochs_per_rollout=1, **options), reward_model=even_share)
    twice.step = once.step = 1
    experience, _ = twice.make_experience(fixed_batch(twice))
    once.update(experience)  # from the same weights, so the same first update
    updated = np.array(once.policy.logprobs(experience.tokens, experience.mask, 0.7))
    ratio = np.exp(updated - np.array(experience.old_logprobs))[np.array(experience.mask)]
    metrics = twice.update(experience)
    assert abs(ratio - 1).max() > 0.01
    assert metrics["val/ratio_max"] == pytest.approx(max(1.0, float(ratio.max())), rel=1e-4)
    assert metrics["val/ratio_min"] == pytest.approx(min(1.0, float(ratio.min())), rel=1e-4)
    assert metrics["val/ratio"] == pytest.approx((1 + float(ratio.mean())) / 2, rel=1e-4)


@KINDS
def test_the_verbs_work_by_hand_on_rollouts_from_elsewhere(tmp_path: Path, kind: dict[str, Any]) -> None:
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **kind), reward_model=even_share)
    before = arrays(trainer.policy.model)
    metrics = trainer.update(trainer.make_experience(fixed_batch(trainer))[0])
    assert metrics["num_updates"] == trainer.config.num_epochs_per_rollout
    assert not same(arrays(trainer.policy.model), before)


def test_target_kl_ends_the_epochs_of_a_batch_early(tmp_path: Path) -> None:
    options = {**PPO, "num_epochs_per_rollout": 6, "learning_rate": 3e-2, "fine_tune_type": "full"}
    free = PPOTrainer(config(tmp_path / "free", **options), reward_model=ascii_share)
    held = PPOTrainer(config(tmp_path / "held", target_kl=0.01, **options), reward_model=ascii_share)
    updates = [
        steps_of(trainer.train(PROMPTS, num_epochs=1)["run_folder"])[0]["num_updates"]
        for trainer in (free, held)
    ]
    assert updates[0] == 6
    assert 2 <= updates[1] < 6


# One seed, one result ------------------------------------------------------------------------------------


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


# Gradients -----------------------------------------------------------------------------------------------
#
# AdamW's first step from a gradient g is lr · g / (|g| + eps), moments being unbiased. With lr = eps = 1 the
# weights move by u = -g / (|g| + 1), so that g = -u / (1 - |u|): gradients can be read off an update.

READABLE = {
    "learning_rate": 1.0,
    "adam_eps": 1.0,
    "max_grad_norm": None,
    "fine_tune_type": "full",
    "num_epochs_per_rollout": 1,
}


def gradients(trainer: PPOTrainer, experience: Experience) -> dict[str, np.ndarray]:
    """Of policy and value network together, for one update with all rows; the trainer stays as it was."""
    before = weights(trainer)
    modules = [trainer.policy.model] if trainer.value_model is None else []
    if trainer.value_model is not None:
        modules = [trainer.policy.model, trainer.value_model.module]
    kept = [module.parameters() for module in modules]
    updater = Updater(
        trainer.policy,
        trainer.value_model,
        trainer.algorithm,
        trainer.kl_controller,
        trainer.config,
        total_steps=1,
    )
    updater.update(experience, step=1)
    after = weights(trainer)
    for module, parameters in zip(modules, kept, strict=True):
        module.update(parameters)
    assert same(weights(trainer), before)
    moved = {name: after[name] - before[name] for name in before}
    return {name: -u / (1 - np.abs(u)) for name, u in moved.items()}


def off_policy(trainer: PPOTrainer, rollouts: Sequence[Rollout]) -> Experience:
    """Experience in which the ratio is not 1 and the KL not 0: as after some updates."""
    experience, _ = trainer.make_experience(rollouts)
    random = np.random.default_rng(1)

    def shifted(x: mx.array | None, size: float) -> mx.array | None:
        if x is None:
            return None
        return mx.where(
            experience.mask, x + mx.array(random.normal(size=x.shape) * size, dtype=mx.float32), 0
        )

    return experience._replace(
        old_logprobs=shifted(experience.old_logprobs, 0.1),
        ref_logprobs=shifted(experience.ref_logprobs, 0.5),
        values=shifted(experience.values, 0.1),
    )


@KINDS
@pytest.mark.parametrize("on_policy", [True, False])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(
    tmp_path: Path, kind: dict[str, Any], on_policy: bool
) -> None:
    """Rows of 1 to 8 tokens: a mean of means would weigh the short ones more."""
    found = []
    for micro in (None, 1, 2, 3):
        options = {**kind, **READABLE, "micro_batch_size": micro}
        trainer = PPOTrainer(config(tmp_path / str(micro), kl_coef=0.3, **options), reward_model=even_share)
        rollouts = fixed_batch(trainer, group_size=4)
        made = trainer.make_experience(rollouts)[0] if on_policy else off_policy(trainer, rollouts)
        found.append(gradients(trainer, made))
    assert max(float(np.abs(g).max()) for g in found[0].values()) > 1e-3
    for other in found[1:]:
        assert largest_difference(found[0], other) < 1e-6


@KINDS
def test_two_epochs_end_at_the_same_weights_whatever_the_micro_batch(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    results: list[dict[str, np.ndarray]] = []
    fresh: dict[str, np.ndarray] = {}
    for micro in (None, 1, 2):
        options = {**kind, "num_epochs_per_rollout": 2, "fine_tune_type": "full", "micro_batch_size": micro}
        # A large epsilon keeps Adam from blowing rounding errors up where a gradient is almost 0.
        trainer = PPOTrainer(
            config(tmp_path / str(micro), learning_rate=0.1, adam_eps=1e-2, minibatch_size=5, **options),
            reward_model=even_share,
        )
        fresh = weights(trainer)
        trainer.step = 1
        trainer.update(trainer.make_experience(fixed_batch(trainer, group_size=4))[0])
        results.append(weights(trainer))
    assert largest_difference(results[0], fresh) > 1e-2
    assert largest_difference(results[0], results[1]) < 1e-5
    assert largest_difference(results[0], results[2]) < 1e-5


@KINDS
def test_padding_and_what_stands_in_it_change_no_gradient(tmp_path: Path, kind: dict[str, Any]) -> None:
    trainer = PPOTrainer(config(tmp_path, kl_coef=0.3, **kind, **READABLE), reward_model=even_share)
    clean = off_policy(trainer, fixed_batch(trainer, group_size=4))._replace(old_logprobs=None)
    rows, columns = clean.mask.shape
    random = np.random.default_rng(0)
    real = mx.arange(columns + 1)[None] <= mx.max(
        clean.mask * mx.arange(1, columns + 1), axis=1, keepdims=True
    )
    noise = mx.array(random.integers(0, 250, size=(rows, columns + 4)), dtype=mx.int32)
    tokens = mx.concatenate([mx.where(real, clean.tokens, noise[:, : columns + 1]), noise[:, :3]], axis=1)
    wider = [mx.concatenate([clean.mask, mx.zeros((rows, 3), dtype=mx.bool_)], axis=1)]
    for array in clean[2:]:
        garbage = mx.full((rows, 3), 77.0)
        inner = None if array is None else mx.where(clean.mask, array, -55.0)
        wider.append(None if inner is None else mx.concatenate([inner, garbage], axis=1))
    dirty = Experience(tokens, *wider)
    assert largest_difference(gradients(trainer, clean), gradients(trainer, dirty)) < 1e-6


@KINDS
def test_a_masked_token_has_a_gradient_of_exactly_zero(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Where the mask is True nowhere, nothing moves, however large the numbers are that stand there."""
    trainer = PPOTrainer(config(tmp_path, kl_coef=0.3, **kind, **READABLE), reward_model=even_share)
    made = off_policy(trainer, fixed_batch(trainer, group_size=4))
    nothing = made._replace(mask=mx.zeros_like(made.mask), advantages=mx.full(made.mask.shape, 1e4))
    assert all(not g.any() for g in gradients(trainer, nothing).values())


def test_the_kl_in_the_loss_has_the_gradient_of_the_reverse_kl(tmp_path: Path) -> None:
    """d(ratio · k3) = (k3 + 1 - exp(ref - lp)) d lp = (lp - ref) d lp on policy: that of (lp - ref)² / 2."""
    trainer = PPOTrainer(config(tmp_path, kl_coef=0.3, **GRPO, **READABLE), reward_model=constant)
    made = off_policy(trainer, fixed_batch(trainer, group_size=4))._replace(old_logprobs=None)
    assert made.ref_logprobs is not None
    lengths = mx.sum(made.mask, axis=1)

    def reverse_kl() -> mx.array:
        d = trainer.policy.logprobs(made.tokens, made.mask) - made.ref_logprobs
        return 0.3 * mx.mean(mx.sum(mx.where(made.mask, d * d / 2, 0), axis=1) / lengths)

    expected = nn.value_and_grad(trainer.policy.model, reverse_kl)()[1]
    found = gradients(trainer, made)
    assert max(float(np.abs(g).max()) for g in found.values()) > 1e-2
    assert largest_difference(found, {name: np.array(g) for name, g in tree_flatten(expected)}) < 1e-5


@pytest.mark.parametrize("kind", [PPO, GRPO], ids=["ppo", "grpo"])
@pytest.mark.parametrize(("low", "high"), [(0.3, None), (0.1, None), (0.1, 0.3)])
def test_a_ratio_outside_its_clip_range_teaches_nothing_where_it_has_gone_the_right_way(
    tmp_path: Path, kind: dict[str, Any], low: float, high: float | None
) -> None:
    """Ratios of 1.2 with positive advantages: within 1.3 they teach, beyond 1.1 they do not. KL and critic aside."""
    trainer = PPOTrainer(
        config(tmp_path, kl_coef=0, clip_epsilon=low, clip_epsilon_high=high, **kind, **READABLE),
        reward_model=even_share,
    )
    made, _ = trainer.make_experience(fixed_batch(trainer, group_size=4))
    now = trainer.policy.logprobs(made.tokens, made.mask)
    rising = made._replace(advantages=1.0 * made.mask, old_logprobs=now - math.log(1.2))
    # Dealt as the second of two minibatches: the first is on policy and has no advantage to learn from.
    updater = Updater(
        trainer.policy, None, trainer.algorithm, trainer.kl_controller, trainer.config, total_steps=1
    )
    nothing = made._replace(advantages=mx.zeros_like(made.advantages))
    before = arrays(trainer.policy.model)
    deal = [part for whole in (nothing, rising) for part in ExperienceBuffer(whole).minibatches(0)]

    class Dealt:
        def minibatches(self, *seed: int) -> Any:
            return iter(deal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppo_trainer.updater.ExperienceBuffer", lambda *_, **__: Dealt())
        metrics = updater.update(made, step=1)
    clipped = (low if high is None else high) < 0.2
    assert metrics["val/ratio_max"] == pytest.approx(1.2, abs=1e-4)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(0.5 if clipped else 0.0)
    assert same(arrays(trainer.policy.model), before) == clipped


@pytest.mark.parametrize("kind", [PPO, SHARED], ids=["ppo", "ppo-shared"])
def test_a_value_is_that_of_the_state_before_its_token_in_rollouts_and_in_updates(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """V_t is what the network says of the tokens up to t, and the first loss is the mean of (V - R)² / 2."""
    trainer = PPOTrainer(config(tmp_path, **kind, num_epochs_per_rollout=1), reward_model=even_share)
    assert trainer.value_model is not None
    trainer.value_model.module.head.weight = mx.random.normal((1, 32), key=mx.random.key(0))
    experience, _ = trainer.make_experience(fixed_batch(trainer, group_size=3))
    mask, values = np.array(experience.mask), np.array(experience.values)
    for row, t in np.argwhere(mask):
        state = experience.tokens[int(row) : int(row) + 1, : int(t) + 1]
        assert values[row, t] == pytest.approx(float(trainer.value_model.forward(state)[0, -1]), abs=1e-4)
    assert values[mask].std() > 0.1
    loss = 0.5 * np.mean((values - np.array(experience.returns))[mask] ** 2)
    assert trainer.update(experience)["loss/value_avg"] == pytest.approx(loss, rel=1e-4)


def test_the_value_loss_weighs_vf_coef_where_the_trunk_is_shared(tmp_path: Path) -> None:
    """Only the value loss reaches the head, so its gradient is vf_coef times that of the value loss alone."""
    found = []
    for vf_coef in (0.1, 0.4):
        trainer = PPOTrainer(
            config(tmp_path / str(vf_coef), vf_coef=vf_coef, **SHARED, **READABLE), reward_model=even_share
        )
        experience, _ = trainer.make_experience(fixed_batch(trainer, group_size=4))
        found.append(gradients(trainer, experience)["value.head.weight"])
    np.testing.assert_allclose(found[1], 4 * found[0], rtol=1e-3, atol=1e-6)
    assert np.abs(found[0]).max() > 1e-4


def test_the_value_network_learns_at_its_own_rate(tmp_path: Path) -> None:
    """Adam's first step is the learning rate long, whatever the gradient."""
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-3, value_learning_rate=0.02, num_epochs_per_rollout=1, **PPO),
        reward_model=even_share,
    )
    before = weights(trainer)
    trainer.train(PROMPTS, num_epochs=1)
    moved = {name: np.abs(x - before[name]).max() for name, x in weights(trainer).items()}
    assert moved["value.head.bias"] == pytest.approx(0.02, rel=1e-3)
    assert max(x for name, x in moved.items() if not name.startswith("value.")) == pytest.approx(
        1e-3, rel=1e-2
    )


# Scores, groups, rows ------------------------------------------------------------------------------------


def test_each_row_is_credited_with_its_own_score_against_its_own_group(tmp_path: Path) -> None:
    """Scores 0 1 2 6 | 5 5 5 9 by hand: (s - mean) / (Bessel std + 1e-4), the same on each of a row's tokens."""

    def by_order(completions: Sequence[str], **columns: Any) -> list[float]:
        return [0, 1, 2, 6, 5, 5, 5, 9]

    trainer = PPOTrainer(config(tmp_path, **GRPO), reward_model=by_order)
    rollouts = fixed_batch(trainer, group_size=4)
    experience, metrics = trainer.make_experience(rollouts)
    groups = np.array([[0.0, 1, 2, 6], [5, 5, 5, 9]])
    expected = (groups - groups.mean(axis=1, keepdims=True)) / (
        groups.std(axis=1, ddof=1, keepdims=True) + 1e-4
    )
    for row, (rollout, advantage) in enumerate(zip(rollouts, expected.ravel(), strict=True)):
        start, n = len(rollout.prompt.ids) - 1, len(rollout.completion_ids)
        found = np.array(experience.advantages[row])
        np.testing.assert_allclose(found[start : start + n], advantage, atol=1e-5)
        assert not found[:start].any()
        assert not found[start + n :].any()
        assert np.array(experience.tokens[row])[start + 1 : start + 1 + n].tolist() == list(
            rollout.completion_ids
        )
    assert metrics["reward"] == pytest.approx(groups.mean())


def test_with_neither_discount_nor_kl_every_token_returns_the_score_of_its_row(tmp_path: Path) -> None:
    """gamma = lam = 1 and kl_coef = 0: R_t = A_t + V_t is the score, whatever V is."""
    trainer = PPOTrainer(config(tmp_path, gamma=1, lam=1, kl_coef=0, **PPO), reward_model=even_share)
    assert trainer.value_model is not None
    trainer.value_model.module.head.bias = mx.array([0.7])
    rollouts = fixed_batch(trainer, group_size=3)
    experience, _ = trainer.make_experience(rollouts)
    for row, score in enumerate(score_rollouts(trainer.rewards, rollouts).total):
        mask = np.array(experience.mask[row])
        assert mask.sum() == len(rollouts[row].completion_ids)
        np.testing.assert_allclose(np.array(experience.returns[row])[mask], score, atol=1e-5)
        np.testing.assert_allclose(np.array(experience.values[row])[mask], 0.7, atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(0.5, 1.0), (1.0, 0.0), (0.9, 0.5)])
def test_discount_and_trace_decay_are_those_of_the_config(tmp_path: Path, gamma: float, lam: float) -> None:
    """V = c everywhere, score s at the end: R_last = s, and R_t = gamma ((1 - lam) c + lam R_{t+1}) before it."""
    c = 0.7
    trainer = PPOTrainer(config(tmp_path, gamma=gamma, lam=lam, kl_coef=0, **PPO), reward_model=even_share)
    assert trainer.value_model is not None
    trainer.value_model.module.head.bias = mx.array([c])
    rollouts = fixed_batch(trainer, group_size=3)
    experience, _ = trainer.make_experience(rollouts)
    for row, score in enumerate(score_rollouts(trainer.rewards, rollouts).total):
        expected = [float(score)]
        for _ in rollouts[row].completion_ids[1:]:
            expected.insert(0, gamma * ((1 - lam) * c + lam * expected[0]))
        returns = np.array(experience.returns[row])[np.array(experience.mask[row])]
        np.testing.assert_allclose(returns, expected, atol=1e-5)


def test_the_kl_penalty_of_each_token_is_in_its_reward(tmp_path: Path) -> None:
    """lam = gamma = 1 and V = 0: R_t is the score minus the coefficient of now times the log-ratios from t on."""
    trainer = PPOTrainer(
        config(tmp_path, gamma=1, lam=1, kl_coef=0.5, learning_rate=1e-2, fine_tune_type="full", **PPO),
        reward_model=even_share,
    )
    trainer.train(PROMPTS, num_epochs=2)
    assert trainer.value_model is not None
    trainer.value_model.module.head.update({"weight": mx.zeros((1, 32)), "bias": mx.zeros((1,))})
    trainer.kl_controller.value = 0.8  # as a controller may have left it
    rollouts = fixed_batch(trainer)
    experience, metrics = trainer.make_experience(rollouts)
    logratio = np.array(
        trainer.policy.logprobs(experience.tokens, experience.mask)
        - trainer.reference.logprobs(experience.tokens, experience.mask)
    )
    assert np.abs(logratio).max() > 1e-3
    for row, score in enumerate(score_rollouts(trainer.rewards, rollouts).total):
        mask = np.array(experience.mask[row])
        expected = score - 0.8 * logratio[row][mask][::-1].cumsum()[::-1]
        np.testing.assert_allclose(np.array(experience.returns[row])[mask], expected, atol=1e-5)
    assert metrics["objective/kl"] == pytest.approx(logratio.sum() / len(rollouts), abs=1e-5)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.8 * metrics["objective/kl"], abs=1e-5)


def test_equal_rewards_in_every_group_teach_grpo_exactly_nothing(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, kl_coef=0, **GRPO, **READABLE), reward_model=judged_by_length)
    rollouts = fixed_batch(trainer, group_size=4)
    experience, metrics = trainer.make_experience(rollouts)
    assert all(not g.any() for g in gradients(trainer, experience).values())
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["reward_std"] > 1


@KINDS
def test_a_row_that_no_reward_applies_to_changes_nothing(tmp_path: Path, kind: dict[str, Any]) -> None:
    """The gradient with such a row in the batch is the gradient without it: it enters no sum and no count."""

    def skipping(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[Any]:
        scores = even_share(completion_ids)
        return [None if text == "3" else score for text, score in zip(completions, scores, strict=True)]

    trainer = PPOTrainer(config(tmp_path, **kind, **READABLE), reward_model=skipping)
    rollouts = fixed_batch(trainer, group_size=4)
    assert [rollout.text for rollout in rollouts] == ["0", "1", "2", "3"] * 2
    scored = [rollout for rollout in rollouts if rollout.text != "3"]
    with_them, without = (gradients(trainer, trainer.make_experience(r)[0]) for r in (rollouts, scored))
    assert max(float(np.abs(g).max()) for g in without.values()) > 1e-3
    assert largest_difference(with_them, without) < 1e-6


def test_unscored_rows_enter_no_metric_of_the_scored_ones(tmp_path: Path) -> None:
    """Scores 2 and 4 and four rows without one, before the first update: the mean is 3 and the KL part is 0."""

    def two_of_six(completions: Sequence[str], **columns: Any) -> list[Any]:
        return [2.0, None, None, 4.0, None, None]

    trainer = PPOTrainer(config(tmp_path, **PPO), reward_model=two_of_six)
    _, metrics = trainer.make_experience(fixed_batch(trainer, group_size=3))
    assert metrics["reward"] == metrics["objective/scores"] == 3.0
    assert metrics["objective/rlhf_reward"] == pytest.approx(3.0)
    assert metrics["objective/non_score_reward"] == pytest.approx(0.0)


@KINDS
def test_a_batch_without_any_score_is_survived_and_moves_nothing(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    """In the first step, and later on too: momentum is no reason to move without having seen anything."""
    calls = 0

    def none_in_steps_1_and_3(completions: Sequence[str], completion_ids: Any, **_: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        return [None] * len(completions) if calls in (1, 3) else even_share(completion_ids)

    after: list[dict[str, np.ndarray]] = []

    class Watch:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
            after.append(weights(trainer))

    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, kl_coef=0.1, **kind), reward_model=none_in_steps_1_and_3
    )
    before = weights(trainer)
    result = trainer.train(PROMPTS, num_epochs=3, callbacks=[Watch()])
    assert same(before, after[0])
    assert not same(after[0], after[1])
    assert same(after[1], after[2])
    assert math.isfinite(result["history"][1]["avg_reward"])
    assert all(np.isfinite(x).all() for x in after[2].values())


def test_an_epochs_mean_reward_is_that_of_the_rows_that_have_one(tmp_path: Path) -> None:
    calls = 0

    def none_at_first(completions: Sequence[str], **columns: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        return [None if calls == 1 else 2.0] * len(completions)

    trainer = PPOTrainer(config(tmp_path, batch_size=2, **PPO), reward_model=none_at_first)
    assert trainer.train(PROMPTS, num_epochs=1)["avg_reward"] == 2.0


def test_the_missing_end_penalty_lowers_the_scores_of_cut_off_rows_and_of_no_others(tmp_path: Path) -> None:
    trainer = PPOTrainer(
        config(tmp_path, missing_end_penalty=0.6, kl_coef=0, gamma=1, lam=1, **PPO), reward_model=even_share
    )
    rollouts = fixed_batch(trainer, group_size=3)
    experience, metrics = trainer.make_experience(rollouts)
    scores = score_rollouts(trainer.rewards, rollouts).total
    expected = [s if r.terminated else s - 0.6 for s, r in zip(scores, rollouts, strict=True)]
    assert {r.terminated for r in rollouts} == {True, False}
    for row, score in enumerate(expected):
        mask = np.array(experience.mask[row])
        np.testing.assert_allclose(np.array(experience.returns[row])[mask], score, atol=1e-5)
    assert metrics["objective/scores"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert metrics["reward"] == pytest.approx(scores.mean(), abs=1e-6)


# Schedules over a run ------------------------------------------------------------------------------------


@PPO_AND_GRPO
@pytest.mark.parametrize("target", [1e-3, 1e3])
def test_the_kl_coefficient_follows_the_kl(tmp_path: Path, kind: dict[str, Any], target: float) -> None:
    """After a batch of n: times 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon; n is 16 and horizon 100."""
    options = {**kind, "learning_rate": 2e-2, "fine_tune_type": "full", "kl_coef": 0.2, "group_size": 4}
    trainer = PPOTrainer(
        config(tmp_path, kl_target=target, kl_horizon=100, **options), reward_model=even_share
    )
    lines = steps_of(trainer.train(PROMPTS, num_epochs=6)["run_folder"])
    assert lines[0]["kl_coef"] == 0.2  # the first batch is judged with what was asked for
    for line, following in itertools.pairwise(lines):
        error = min(max(line["objective/kl"] / target - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(line["kl_coef"] * (1 + error * 16 / 100), rel=1e-5)
    assert (lines[-1]["kl_coef"] > lines[1]["kl_coef"]) == (target < 1)
    fixed = PPOTrainer(config(tmp_path / "2", **options), reward_model=even_share)
    assert {s["kl_coef"] for s in steps_of(fixed.train(PROMPTS, num_epochs=2)["run_folder"])} == {0.2}


@PPO_AND_GRPO
def test_the_kl_that_is_steered_by_is_that_of_whole_sequences(tmp_path: Path, kind: dict[str, Any]) -> None:
    """The second batch's KL depends on the first coefficient alone; with 1/1.1 of it as target the error is 0.1."""
    options = {**kind, "learning_rate": 0.1, "fine_tune_type": "full", "kl_coef": 0.2, "group_size": 4}
    fixed = PPOTrainer(config(tmp_path / "1", **options), reward_model=even_share)
    kl = steps_of(fixed.train(PROMPTS, num_epochs=2)["run_folder"])[1]["objective/kl"]
    assert kl > 0
    steered = PPOTrainer(
        config(tmp_path / "2", kl_target=kl / 1.1, kl_horizon=100, **options), reward_model=even_share
    )
    lines = steps_of(steered.train(PROMPTS, num_epochs=3)["run_folder"])
    assert lines[2]["kl_coef"] == pytest.approx(lines[1]["kl_coef"] * (1 + 0.1 * 16 / 100), rel=1e-4)


def test_in_the_value_warm_up_the_critic_learns_and_the_policy_stays(tmp_path: Path) -> None:
    trainer = PPOTrainer(
        config(tmp_path, value_warmup_steps=2, learning_rate=1e-2, **PPO), reward_model=ascii_share
    )
    assert trainer.value_model is not None
    seen = []

    class Watch:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
            assert trainer.value_model is not None
            seen.append(
                (arrays(trainer.policy.model), arrays(trainer.value_model.module), metrics["num_updates"])
            )

    before = (arrays(trainer.policy.model), arrays(trainer.value_model.module))
    trainer.train(PROMPTS, num_epochs=3, callbacks=[Watch()])
    policies, critics = [before[0], *(s[0] for s in seen)], [before[1], *(s[1] for s in seen)]
    assert [same(a, b) for a, b in itertools.pairwise(policies)] == [True, True, False]
    assert [same(a, b) for a, b in itertools.pairwise(critics)] == [False, False, False]
    assert [s[2] for s in seen] == [0, 0, 4]


# The documented samples, word for word -------------------------------------------------------------------

BASIC = """
from ppo_trainer.ppo_trainer import PPOTrainer
from config.ppo_config import PPOConfig

# Initialize configuration
config = PPOConfig(
    model_name="Qwen/Qwen3-0.6B-Base",
    max_new_tokens=50,
    batch_size=4,
    learning_rate=1e-5,
    kl_coef=0.1
)

# Create trainer
trainer = PPOTrainer(config)

# Train the model
trainer.train(
    prompts=["Your prompt here"],
    num_epochs=10
)
"""

ADVANCED = """
from ppo_trainer.ppo_trainer import PPOTrainer
from config.ppo_config import PPOConfig
from models.custom_reward_model import CustomRewardModel

# Custom configuration
config = PPOConfig(
    model_name="Qwen/Qwen3-0.6B-Base",
    max_new_tokens=100,
    batch_size=8,
    learning_rate=5e-6,
    kl_coef=0.2,
    gamma=0.99,
    lam=0.95,
    clip_epsilon=0.2
)

# Custom reward model
reward_model = CustomRewardModel()

# Initialize trainer with custom components
trainer = PPOTrainer(
    config=config,
    reward_model=reward_model
)

# Training with custom callbacks
def on_epoch_end(epoch, metrics):
    print(f"Epoch {epoch}: Reward = {metrics['avg_reward']:.4f}")

trainer.train(
    prompts=prompts,
    num_epochs=20,
    callbacks=[on_epoch_end]
)
"""


def run_sample(text: str, **names: Any) -> tuple[dict[str, Any], list[str]]:
    assert '"Qwen/Qwen3-0.6B-Base"' in text
    space: dict[str, Any] = dict(names)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text.replace("Qwen/Qwen3-0.6B-Base", "embedded"), "sample", "exec"), space)
    return space, printed.getvalue().splitlines()


def test_the_basic_sample_runs_and_says_in_one_line_what_it_is_judged_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space, lines = run_sample(BASIC)
    assert space["trainer"].step == 10
    judged = [line for line in lines if line.startswith("reward: none given")]
    assert len(judged) == 1
    assert len(lines) == 2 + 10  # how much trains, and one per epoch
    assert all(re.match(rf"epoch {i}/10  reward \d", line) for i, line in enumerate(lines[2:], start=1))
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "final" / "adapters.safetensors").is_file()


@pytest.mark.slow
def test_the_advanced_sample_runs_and_calls_back_after_each_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space, lines = run_sample(ADVANCED, prompts=["One prompt", "and another"])
    assert space["trainer"].step == 20
    assert not [line for line in lines if line.startswith("reward: none")]
    called = [line for line in lines if re.fullmatch(r"Epoch \d+: Reward = -?\d\.\d{4}", line)]
    assert [line.split(":")[0] for line in called] == [f"Epoch {i}" for i in range(20)]


# Saving and loading --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_a_saved_model_loaded_into_a_fresh_trainer_evaluates_the_same(
    tmp_path: Path, kind: dict[str, Any], fine_tune_type: str
) -> None:
    def fresh(name: str) -> PPOTrainer:
        options = {**kind, "fine_tune_type": fine_tune_type, "learning_rate": 2e-2}
        return PPOTrainer(config(tmp_path / name, **options), reward_model=even_share)

    trained, other = fresh("1"), fresh("2")
    trained.train(PROMPTS, num_epochs=4)
    expected = trained.evaluate(PROMPTS)
    assert other.evaluate(PROMPTS) != expected
    trained.save_model(tmp_path / "saved")
    other.load_model(tmp_path / "saved")
    assert other.evaluate(PROMPTS) == expected
    assert same(weights(other), weights(trained))
    assert expected["objective/kl"] != 0.0  # the reference is still the model before training


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_what_train_leaves_is_an_adapter_that_mlx_lm_loads(tmp_path: Path, fine_tune_type: str) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=2e-2, fine_tune_type=fine_tune_type, **PPO), reward_model=even_share
    )
    final = Path(trainer.train(PROMPTS, num_epochs=2)["run_folder"]) / "final"
    model, tokenizer = mlx_lm.load(str(final / "base"), adapter_path=str(final))[:2]
    tokens = mx.array([trainer.policy.tokenizer.encode("hello there")])
    assert tokenizer.encode("hello there") == tokens[0].tolist()
    np.testing.assert_allclose(
        np.array(model(tokens)), np.array(trainer.policy.forward(tokens).logits), atol=1e-6
    )
    plain = mlx_lm.load(str(final / "base"))[0]
    assert np.array_equal(np.array(plain(tokens)), np.array(trainer.policy.base.model(tokens)))
    assert not np.allclose(np.array(plain(tokens)), np.array(model(tokens)), atol=1e-3)


def test_a_saved_adapter_continues_as_a_new_run_with_itself_as_reference(tmp_path: Path) -> None:
    first = PPOTrainer(config(tmp_path / "1", learning_rate=2e-2, **PPO), reward_model=even_share)
    first.train(PROMPTS, num_epochs=2)
    first.save_model(tmp_path / "saved")
    second = PPOTrainer(
        config(tmp_path / "2", adapter_path=str(tmp_path / "saved"), **PPO), reward_model=even_share
    )
    assert second.evaluate(PROMPTS)["objective/kl"] == 0.0
    assert second.evaluate(PROMPTS)["samples"] == first.evaluate(PROMPTS)["samples"]


@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        ({"fine_tune_type": "full"}, {}),
        ({}, {"fine_tune_type": "full"}),
        ({"lora_r": 8}, {}),
        ({"lora_alpha": 64}, {}),  # the same arrays, but another scale: another model
        ({"embedded_model": ModelConfig.tiny()}, {}),
    ],
    ids=["full-into-lora", "lora-into-full", "rank", "alpha", "architecture"],
)
def test_a_saved_model_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, saved: dict[str, Any], mine: dict[str, Any]
) -> None:
    PPOTrainer(config(tmp_path / "1", **GRPO, **saved), reward_model=constant).save_model(tmp_path / "saved")
    trainer = PPOTrainer(config(tmp_path / "2", **GRPO, **mine), reward_model=constant)
    before = weights(trainer)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        trainer.load_model(tmp_path / "saved")
    assert same(weights(trainer), before)


def test_loading_from_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path), reward_model=constant)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        trainer.load_model(tmp_path / "nowhere")


def test_the_run_folder_says_what_was_run(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, seed=3, log_samples_every=1, **GRPO), reward_model=even_share)
    run = Path(trainer.train(PROMPTS, num_epochs=2)["run_folder"])
    assert run == tmp_path / "run"
    written = json.loads((run / "config.json").read_text())
    assert PPOConfig(**written["config"]) == trainer.config
    assert written["algorithm"] == "grpo"
    assert written["rewards"] == {"even_share": 1.0}
    assert written["config"]["num_epochs_per_rollout"] == 1  # as the row has it, not as the class declares it
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * trainer.config.max_logged_samples
    assert {s["step"] for s in samples} == {1, 2}
    kinds = [line.get("kind") for line in read_metrics(run / "metrics.jsonl")]
    assert kinds == [None, "epoch", None, "epoch", "end"]


# Bad input -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test that reaches for a model: what can be refused before must be."""

    def loaded(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(ppo_trainer.ppo_trainer, "load_language_model", loaded)
    monkeypatch.setattr(models.sft_model, "build_embedded", loaded)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "keywords", "error", "sentence"),
    [
        ({"algorithm": "ppp"}, {}, InvalidConfigurationError, 'there is no "ppp"; did you mean "ppo"'),
        ({"algorithm": "grpo", "group_size": 1}, {}, InvalidConfigurationError, "group_size: grpo"),
        ({"reward_weights": [1.0, 2.0]}, {}, InvalidConfigurationError, "2 reward weights were given for 1"),
        ({}, {"reward_model": "well_formd"}, InvalidConfigurationError, "well_formed"),
        ({}, {"reward_model": 3}, InvalidConfigurationError, "3"),
        ({}, {"reward_model": []}, InvalidConfigurationError, "[Nn]o reward"),
        ({}, {"callbacks": [3]}, TypeError, "callbacks: 3 is neither"),
        ({"kl_target": 6.0, "kl_horizon": 3, "batch_size": 16}, {}, InvalidConfigurationError, "kl_horizon"),
    ],
)
def test_a_mistake_is_found_before_a_weight_is_loaded(
    tmp_path: Path, options: dict[str, Any], keywords: dict[str, Any], error: type, sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        PPOTrainer(config(tmp_path, **options), **{"reward_model": constant, **keywords})


@pytest.mark.usefixtures("no_weights")
def test_a_folder_that_cannot_be_used_is_found_before_a_weight_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for model in ("embedded", "no/such-model"):
        with pytest.raises(CheckpointError, match=r'output_dir: ".*file/run" cannot be written to'):
            PPOTrainer(config(tmp_path / "file", model_name=model), reward_model=constant)
    used = tmp_path / "run"
    used.mkdir()
    (used / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="already holds a run"):
        PPOTrainer(config(tmp_path), reward_model=constant)
    assert (used / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_that_is_not_there_is_found_before_a_weight_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: adapter_config\.json is missing"):
        PPOTrainer(config(tmp_path, adapter_path=str(tmp_path / "nowhere")), reward_model=constant)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no such folder", 'model_name: there is no folder "no such folder"'),
        ("{tmp}", "has no config.json"),
        ("{tmp}/file", "is a file"),
    ],
)
def test_an_unknown_model_is_refused_in_a_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelLoadError, match=sentence):
        PPOTrainer(config(tmp_path, model_name=name.format(tmp=tmp_path)), reward_model=constant)


@pytest.mark.parametrize(
    ("prompts", "epochs", "error", "sentence"),
    [
        ([], 1, DataLoadError, "prompts: the list is empty"),
        ("one string", 1, DataLoadError, r"prompts: a list of prompts is expected.*write \[prompt\]"),
        (["fine", "x" * 600], 1, DataLoadError, r"prompts\[1\]: 600 tokens, but max_prompt_length is 512"),
        (["fine", ""], 1, DataLoadError, r"prompts\[1\]: the prompt is empty"),
        ([{"text": "x"}], 1, DataLoadError, r'prompts\[0\]: "prompt" is missing \(fields: text\)'),
        ([3], 1, DataLoadError, r"prompts\[0\]: a string or a list of chat messages is expected, found int"),
        (["fine"], 0, InvalidConfigurationError, "num_epochs: at least 1 is expected, found 0"),
        (["fine"], -3, InvalidConfigurationError, "num_epochs: at least 1 is expected, found -3"),
        (["fine"], 1.5, InvalidConfigurationError, "num_epochs: .*found 1.5"),
        ([{"prompt": "fine", "completions": "x"}], 1, DataLoadError, r"prompts\[0\]: .*completions"),
        (None, 1, DataLoadError, "prompts: a list of prompts is expected, found NoneType"),
        ({"prompt": "fine"}, 1, DataLoadError, "prompts: a list of prompts is expected, found dict"),
        (iter(["fine"]), 1, DataLoadError, "prompts: a list of prompts is expected, found list_iterator"),
        (["half a character: \ud800"], 1, DataLoadError, r"prompts\[0\]"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_before_anything_is_written(
    tmp_path: Path, prompts: Any, epochs: Any, error: type, sentence: str
) -> None:
    trainer = PPOTrainer(config(tmp_path), reward_model=constant)
    with pytest.raises(error, match=sentence):
        trainer.train(prompts, num_epochs=epochs)
    assert list((tmp_path / "run").iterdir()) == []


class Broken:
    """A reward that works until its third call."""

    reward_name = "mine"

    def __init__(self, then: Callable[[int], Any]) -> None:
        self.then = then
        self.calls = 0

    def __call__(self, completions: Sequence[str], completion_ids: Any, **columns: Any) -> Any:
        self.calls += 1
        return even_share(completion_ids) if self.calls < 3 else self.then(len(completions))


def divide_by_zero(rows: int) -> Any:
    return 1 / (rows - rows)


@PPO_AND_GRPO
@pytest.mark.parametrize(
    ("then", "sentence"),
    [
        (lambda rows: [1.0] * (rows - 1), "'mine' returned .* values for .* completions"),
        (lambda rows: [1.0] * (rows - 1) + [math.nan], "'mine' returned nan for row"),
        (lambda rows: ["good"] * rows, "'mine' returned str 'good' for row 0"),
        (lambda rows: None, "'mine' returned None for the whole batch"),
        (divide_by_zero, "'mine' raised ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_in_the_third_step_loses_nothing_of_the_first_two(
    tmp_path: Path, kind: dict[str, Any], then: Callable[[int], Any], sentence: str
) -> None:
    trainer = PPOTrainer(
        config(tmp_path, learning_rate=1e-2, batch_size=2, **kind), reward_model=Broken(then)
    )
    with pytest.raises(RewardError, match=sentence) as caught:
        trainer.train(PROMPTS, num_epochs=5)
    interrupted = tmp_path / "run" / "interrupted"
    assert str(interrupted) in str(caught.value)
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2]
    other = PPOTrainer(config(tmp_path / "2", **kind), reward_model=constant)
    other.load_model(interrupted)
    assert same(weights(other), weights(trainer))
    mlx_lm.load(str(interrupted / "base"), adapter_path=str(interrupted))


def test_the_sentence_counts_the_steps_that_were_learned_from(tmp_path: Path) -> None:
    """The third batch was sampled and never learned from: two steps are in the saved weights."""
    trainer = PPOTrainer(config(tmp_path, **PPO), reward_model=Broken(divide_by_zero))
    with pytest.raises(RewardError, match=r"after step 2\b"):
        trainer.train(PROMPTS, num_epochs=5)


def test_a_reward_that_fails_at_once_is_one_sentence(tmp_path: Path) -> None:
    def broken(completions: Sequence[str], **columns: Any) -> list[float]:
        return []

    trainer = PPOTrainer(config(tmp_path), reward_model=broken)
    before = weights(trainer)
    with pytest.raises(RewardError, match="'broken' returned 0 values"):
        trainer.train(PROMPTS)
    assert steps_of(tmp_path / "run") == [] if (tmp_path / "run" / "metrics.jsonl").exists() else True
    assert same(weights(trainer), before)


def test_an_interrupted_run_is_saved_and_stays_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(rows: int) -> Any:
        raise KeyboardInterrupt

    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2, **PPO), reward_model=Broken(interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(PROMPTS, num_epochs=5)
    interrupted = tmp_path / "run" / "interrupted"
    assert str(interrupted) in capsys.readouterr().out
    other = PPOTrainer(config(tmp_path / "2", **PPO), reward_model=constant)
    other.load_model(interrupted)
    assert same(weights(other), weights(trainer))


def test_a_callback_that_raises_ends_the_run_with_its_own_exception_and_the_weights_saved(
    tmp_path: Path,
) -> None:
    def broken(epoch: int, metrics: Mapping[str, Any]) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        PPOTrainer(config(tmp_path), reward_model=constant).train(PROMPTS, callbacks=[broken])
    assert (tmp_path / "run" / "interrupted" / "adapters.safetensors").is_file()


def test_when_the_weights_cannot_be_saved_either_the_first_mistake_is_still_told(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, **GRPO), reward_model=Broken(divide_by_zero))
    (tmp_path / "run" / "interrupted").write_text("in the way")
    with pytest.raises(ToolkitError, match="ZeroDivisionError"):
        trainer.train(PROMPTS, num_epochs=5)


# Taking part ---------------------------------------------------------------------------------------------


def test_a_callback_that_says_false_ends_the_run_after_the_step(tmp_path: Path) -> None:
    class Stop:
        def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> bool:
            return step < 3

    trainer = PPOTrainer(config(tmp_path, batch_size=2), reward_model=constant)
    result = trainer.train(PROMPTS, num_epochs=10, callbacks=[Stop()])
    assert trainer.step == 3
    assert len(result["history"]) == 2
    assert (tmp_path / "run" / "final" / "adapters.safetensors").is_file()


def test_every_prompt_is_met_once_per_epoch_in_an_order_drawn_from_the_seed(tmp_path: Path) -> None:
    met: list[list[str]] = []

    def reward(prompts: Sequence[str], **columns: Any) -> list[float]:
        met.append(list(prompts))
        return [0.0] * len(prompts)

    prompts = [f"prompt {i}" for i in range(7)]
    trainer = PPOTrainer(config(tmp_path, batch_size=3, max_new_tokens=1), reward_model=reward)
    trainer.train(prompts, num_epochs=2)
    assert [len(batch) for batch in met] == [3, 3, 1] * 2
    epochs = [[prompt for batch in half for prompt in batch] for half in (met[:3], met[3:])]
    assert all(sorted(epoch) == prompts for epoch in epochs)
    assert epochs[0] != epochs[1] != prompts


def test_columns_reach_the_reward_and_components_are_logged_beside_their_weighted_sum(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def matches(prompts: Sequence[str], answer: Sequence[int], **columns: Any) -> list[float]:
        seen.append({"prompts": prompts, "answer": answer, **columns})
        return [float(a) for a in answer]

    def sometimes(completions: Sequence[str], answer: Sequence[int]) -> list[float | None]:
        return [1.0 if a == 3 else None for a in answer]

    rows = [{"prompt": "what is one", "answer": 1}, {"prompt": "what is three", "answer": 3}]
    trainer = PPOTrainer(
        config(tmp_path, reward_weights=[0.5, 2.0], group_size=2, **PPO), reward_model=[matches, sometimes]
    )
    line = steps_of(trainer.train(rows, num_epochs=1)["run_folder"])[0]
    assert sorted(zip(seen[0]["prompts"], seen[0]["answer"], strict=True)) == [
        ("what is one", 1),
        ("what is one", 1),
        ("what is three", 3),
        ("what is three", 3),
    ]
    of_the_trainer = {"trainer_state", "log_extra", "log_metric"}
    assert {len(v) for name, v in seen[0].items() if name not in of_the_trainer} == {4}
    assert line["rewards/matches/mean"] == 2.0
    assert line["rewards/sometimes/mean"] == 1.0
    # 0.5 · 1 for the first prompt, to which the second reward does not apply, and 0.5 · 3 + 2 · 1.
    assert line["reward"] == pytest.approx((0.5 + 3.5) / 2)


def test_a_learned_reward_model_is_a_reward_like_any_other(tmp_path: Path) -> None:
    options = config(tmp_path, learning_rate=1e-2, **GRPO)
    judge = RewardModel(build_embedded(SMALLEST, seed=9), options)
    trainer = PPOTrainer(options, reward_model=[judge, even_share])
    before = arrays(judge.module)
    result = trainer.train(PROMPTS, num_epochs=2)
    rollouts = trainer.generate(_prepared(trainer))
    scored = score_rollouts(trainer.rewards, rollouts)
    expected = [float(judge.forward(mx.array([[*r.prompt.ids, *r.completion_ids]]))[0]) for r in rollouts]
    np.testing.assert_allclose(scored.components["reward_model"], expected, atol=1e-5)
    assert np.std(expected) > 0
    assert "rewards/reward_model/mean" in result
    assert same(arrays(judge.module), before)


def _prepared(trainer: PPOTrainer) -> list[Prompt]:
    encode = trainer.policy.tokenizer.encode
    return [Prompt(i, text, tuple(encode(text)), {}) for i, text in enumerate(PROMPTS)]


def test_an_algorithm_of_ones_own_is_a_function_and_a_row(tmp_path: Path) -> None:
    """REINFORCE with the batch mean as baseline: no critic, no groups, an unclipped ratio."""
    met: list[Scored] = []

    def centred(batch: Scored, config: PPOConfig) -> Credit:
        met.append(batch)
        return Credit((batch.scores - mx.mean(batch.scores))[:, None] * batch.mask, None)

    row = Algorithm(
        name="mine",
        credit=centred,
        surrogate="unclipped",
        reduction="fixed_length",
        defaults={"num_epochs_per_rollout": 2, "batch_size": 3},
    )
    trainer = PPOTrainer(config(tmp_path, learning_rate=1e-2), reward_model=even_share, algorithm=row)
    before = weights(trainer)
    run = trainer.train(PROMPTS, num_epochs=1)["run_folder"]
    assert [line["num_updates"] for line in steps_of(run)] == [2, 2]
    assert [batch.mask.shape[0] for batch in met] == [3, 1]
    assert trainer.value_model is None
    assert json.loads((Path(run) / "config.json").read_text())["algorithm"] == "mine"
    assert not same(weights(trainer), before)


def test_models_that_are_built_already_are_used_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path, model_name="never/loaded", learning_rate=1e-2, **PPO)
    base = build_embedded(SMALLEST, seed=4)
    monkeypatch.setattr(ppo_trainer.ppo_trainer, "load_language_model", None)

    given = PPOTrainer(options, reward_model=constant, model=base)
    assert given.policy.base is base

    policy = PolicyModel(base, options)
    value, reference = ValueModel(base, options), policy.frozen_copy()
    trainer = PPOTrainer(
        options.replace(output_dir=str(tmp_path / "2")),
        reward_model=even_share,
        policy=policy,
        value_model=value,
        reference=reference,
    )
    assert (trainer.policy, trainer.value_model, trainer.reference) == (policy, value, reference)
    before = (arrays(policy.model), arrays(value.module), arrays(reference.model))
    trainer.train(PROMPTS, num_epochs=1)
    assert not same(arrays(policy.model), before[0])
    assert not same(arrays(value.module), before[1])
    assert same(arrays(reference.model), before[2])


def test_a_policy_that_has_learned_already_is_its_own_reference(tmp_path: Path) -> None:
    """The reference is the policy before the first update of this run, adapters and all."""
    first = PPOTrainer(config(tmp_path / "1", learning_rate=2e-2, **PPO), reward_model=even_share)
    first.train(PROMPTS, num_epochs=2)
    second = PPOTrainer(config(tmp_path / "2", **PPO), reward_model=even_share, policy=first.policy)
    assert second.evaluate(PROMPTS)["objective/kl"] == 0.0


def test_a_critic_that_the_algorithm_has_no_use_for_is_refused_or_left_alone(tmp_path: Path) -> None:
    options = config(tmp_path, **GRPO)
    base = build_embedded(SMALLEST, seed=4)
    value = ValueModel(base, options)
    before = arrays(value.module)
    try:
        PPOTrainer(options, reward_model=even_share, model=base, value_model=value).train(
            PROMPTS, num_epochs=1
        )
    except InvalidConfigurationError as error:
        assert "value_model" in str(error)  # noqa: PT017
    assert same(arrays(value.module), before)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # their spread has no float32
def test_numbers_that_are_not_finite_stop_the_run_after_a_while_and_not_the_weights(tmp_path: Path) -> None:
    """Rewards that float32 holds but their squares not: every update is skipped, then the run ends."""

    def enormous(completions: Sequence[str], **columns: Any) -> list[float]:
        return [(-1.0) ** i * 3e38 for i in range(len(completions))]

    trainer = PPOTrainer(config(tmp_path, max_skipped_steps=3, **PPO), reward_model=enormous)
    before = arrays(trainer.policy.model)
    with pytest.raises(TrainingRuntimeError, match=r"3 updates in a row .*interrupted"):
        trainer.train(PROMPTS, num_epochs=10)
    assert same(arrays(trainer.policy.model), before)


def test_evaluation_reaches_callbacks_and_the_metrics_file(tmp_path: Path) -> None:
    seen: list[tuple[int, Mapping[str, Any]]] = []

    class Watch:
        def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
            seen.append((step, metrics))

    trainer = PPOTrainer(config(tmp_path, **GRPO), reward_model=even_share, callbacks=[Watch()])
    trainer.train(PROMPTS, num_epochs=2)
    metrics = trainer.evaluate(PROMPTS)
    assert [step for step, _ in seen] == [2]
    assert seen[0][1]["avg_reward"] == metrics["avg_reward"]
    lines = [
        line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line.get("kind") == "evaluate"
    ]
    assert [line["eval/avg_reward"] for line in lines] == [pytest.approx(metrics["avg_reward"])]


def test_a_second_train_goes_on_with_other_orders_and_other_samples(tmp_path: Path) -> None:
    trainer = PPOTrainer(config(tmp_path, batch_size=1, **GRPO), reward_model=even_share)
    trainer.train(PROMPTS, num_epochs=1)
    trainer.train(PROMPTS, num_epochs=1)
    lines = steps_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["reward"] for line in lines[:4]] != [line["reward"] for line in lines[4:]]


def test_a_learned_reward_reads_texts_where_the_policy_has_another_vocabulary(tmp_path: Path) -> None:
    """In a list, and as a key of a mapping of weights."""
    base = build_embedded(SMALLEST, seed=4)
    judge = RewardModel(base, config(tmp_path))
    policy_base = build_embedded(SMALLEST, seed=5)
    policy_base.tokenizer._tokenizer.add_tokens(["hello"])  # their ids now differ
    for spec in ([judge], {judge: 2.0}):
        trainer = PPOTrainer(
            config(tmp_path).replace(output_dir=None),
            reward_model=spec,
            policy=PolicyModel(policy_base, config(tmp_path)),
        )
        assert trainer.rewards.rewards[0] is not judge
        assert trainer.rewards.rewards[0](prompts=["a"], completions=["b"]) == judge.score_texts(["a"], ["b"])
