"""Options drawn at random and put together: whatever is not refused trains, trains the same however it is
cut up, and goes on where it was stopped.

Nobody tries every pair of a hundred options by hand. A refused combination loses the option that the sentence names,
so what runs in the end keeps as many options as go together.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from base_setup.parameters import named_arrays
from config.errors import InvalidConfigurationError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from ppo_trainer.algorithms import ALGORITHMS
from ppo_trainer.ppo_trainer import PPOTrainer

MODEL = ModelConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_layers=2,
    intermediate_size=64,
    init_std=0.3,
)
PROMPTS = ["ab", "abc", "q", "hello there", "xyz xyz", "a b c d e"]
CHOICES: dict[str, Sequence[Any]] = {
    "temperature": [0.5, 1.7],
    "top_p": [0.7],
    "top_k": [5],
    "min_p": [0.05],
    "repetition_penalty": [1.3],
    "rollout_batch_size": [1, 3],
    "rollout_policy": ["copy"],
    "quantize_for_rollouts": [True],
    "importance_correction": ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "importance_cap": [1.1, 5.0],
    "off_policy_mask_threshold": [0.001, 0.5],
    "allow_truncated_sampling": [True],
    "dynamic_sampling": [True],
    "gamma": [0.9, 1.0],
    "lam": [0.0, 0.5, 1.0],
    "whiten_advantages": [True, False],
    "scale_rewards": ["group", "batch", "none"],
    "advantage_epsilon": [0.0, 1e-4],
    "reward_composition": ["weighted_sum", "weighted_mean_clip01", "sum"],
    "score_while_decoding": [True],
    "score_scaling": ["std", "norm"],
    "score_clip": [3.0],
    "missing_end_penalty": [0.5],
    "missing_end_mode": ["replace"],
    "overlong_buffer": [0.5],
    "whiten_rewards": [True],
    "kl_coef": [0.0, 0.05, 0.3],
    "kl_placement": ["reward", "loss", "none"],
    "kl_estimator": ["k1", "k2", "k3", "k3_plain", "abs", "mse", "full"],
    "allow_biased_kl": [True],
    "kl_target": [0.01, 2.0],
    "kl_unit": ["token"],
    "kl_horizon": [100],
    "reference": ["base", "none"],
    "reference_sync_every": [1, 2],
    "reference_mixup": [0.5],
    "num_epochs_per_rollout": [2, 3],
    "minibatch_size": [2, 3, 5],
    "old_logprobs_from": ["rollout"],
    "ratio": ["token", "sequence", "sequence_product"],
    "surrogate": ["clipped", "unclipped", "cispo", "sapo"],
    "reduction": ["token_mean", "sequence_mean", "fixed_length", "sequence_sum"],
    "clip_epsilon": [0.1],
    "clip_epsilon_high": [0.28],
    "dual_clip": [3.0],
    "delta": [4.0],
    "ratio_cap": [2.0],
    "entropy_coef": [0.01, -0.01],
    "target_kl": [1e-6, 0.1],
    "ratio_threshold": [10.0],
    "value_network": ["shared"],
    "vf_coef": [0.5],
    "clip_range_value": [None],
    "value_learning_rate": [1e-2],
    "value_warmup_steps": [1],
    "fine_tune_type": ["full", "dora"],
    "optimizer_bits": [8],
    "max_grad_norm": [0.1],
    "lr_schedule": ["linear", "cosine"],
}


def drawn(seed: int) -> dict[str, Any]:
    """An algorithm and up to nine further options."""
    draw = random.Random(seed)
    options = {name: draw.choice(CHOICES[name]) for name in draw.sample(sorted(CHOICES), draw.randint(2, 9))}
    options |= {"algorithm": draw.choice(sorted(ALGORITHMS)), "group_size": draw.choice([2, 3, 4])}
    return options | {"batch_size": draw.choice([2, 3]), "max_new_tokens": draw.choice([4, 8])}


def judge(completions: Sequence[str], **columns: Any) -> list[float]:
    """Any two texts differ, hardly any by their length alone."""
    return [(sum(map(ord, text)) % 17) / 17 for text in completions]


def start(folder: Path, options: dict[str, Any]) -> PPOTrainer:
    return PPOTrainer(
        PPOConfig(
            model_name="embedded",
            embedded_model=MODEL,
            learning_rate=3e-3,
            output_dir=str(folder),
            verbose=False,
            **{"save_every": 0, **options},
        ),
        reward_model=judge,
    )


def start_what_goes_together(folder: Path, options: dict[str, Any]) -> PPOTrainer:
    """Takes the options out that a refusal names, until none is refused."""
    while True:
        try:
            return start(folder, options)
        except InvalidConfigurationError as error:
            sentence = str(error)
            named = [
                n
                for n in options
                if n in CHOICES and n in sentence.replace(",", " ").replace(":", " ").split()
            ]
            named.sort(key=sentence.index)
            assert len(sentence.splitlines()) == 1, sentence
            assert len(sentence) < 450, sentence
            assert named, f"no option that was given is named: {sentence}"
            del options[named[0]]


def weights(trainer: PPOTrainer) -> dict[str, np.ndarray]:
    found = named_arrays(trainer.policy.model.trainable_parameters())
    return {name: np.array(x.astype(mx.float32)) for name, x in found.items()}


def steps(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert all(math.isfinite(x) for x in line.values() if isinstance(x, float)), line
    return [line for line in lines if "kind" not in line]


def check(folder: Path, seed: int) -> None:
    options = drawn(seed)
    trainer = start_what_goes_together(folder / "whole", options)
    before = weights(trainer)
    trainer.train(PROMPTS, num_epochs=1)
    after = weights(trainer)
    if any(step["advantages/std"] > 0 for step in steps(folder / "whole")):
        assert any((before[name] != after[name]).any() for name in after), options
    whole = steps(folder / "whole")[0]
    if not trainer.config.unlike_policy:
        rounding = 1e-4 if trainer.config.old_logprobs_from == "rollout" else 0.0
        assert whole.get("objective/kl", 0.0) == pytest.approx(0.0, abs=rounding), options

    start(folder / "cut", options | {"micro_batch_size": 1, "gradient_checkpointing": True}).train(
        PROMPTS, num_epochs=1
    )
    cut = steps(folder / "cut")[0]
    assert whole.keys() == cut.keys()
    rounding = 1e-3 if whole["num_updates"] == 1 else 0.05  # each update starts from the last one's
    for name in ("loss/policy_avg", "loss/value_avg", "grad_norm", "objective/entropy", "advantages/std"):
        assert cut.get(name, 0.0) == pytest.approx(whole.get(name, 0.0), rel=rounding, abs=rounding / 10), (
            name,
            options,
        )


def check_resume(folder: Path, seed: int) -> None:
    """From one of the checkpoints of six or so: the last one's metrics and weights, bit for bit."""
    options = drawn(seed)
    start_what_goes_together(folder / "unused", options)
    options |= {"save_every": 1, "keep_last_n": 9, "min_free_gb": 0}
    through = start(folder / "through", options)
    through.train(PROMPTS, num_epochs=2)
    shutil.copytree(folder / "through", folder / "again", symlinks=True)
    checkpoints = sorted((folder / "again").glob("checkpoint_*"), key=lambda p: int(p.name.rsplit("_", 1)[1]))
    again = start(folder / "again", options)
    again.train(PROMPTS, num_epochs=2, resume=str(checkpoints[seed % (len(checkpoints) - 1)]))
    ends = [{name: x.tobytes() for name, x in weights(trainer).items()} for trainer in (through, again)]
    assert ends[0] == ends[1], options
    told = [
        [
            {
                name: value
                for name, value in step.items()
                if not name.startswith(("time", "tokens_per_second"))
            }
            for step in steps(folder / run)
        ]
        for run in ("through", "again")
    ]
    assert told[0] == told[1], options


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_options_put_together_at_random_train(tmp_path: Path, seed: int) -> None:
    check(tmp_path, seed)


@pytest.mark.parametrize("seed", [1001, 1003])
def test_a_run_of_options_put_together_at_random_goes_on_from_any_checkpoint(
    tmp_path: Path, seed: int
) -> None:
    check_resume(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1004, 1102))
def test_many_more_go_on_from_any_checkpoint(tmp_path: Path, seed: int) -> None:
    check_resume(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_more_options_put_together_at_random_train(tmp_path: Path, seed: int) -> None:
    check(tmp_path, seed)
