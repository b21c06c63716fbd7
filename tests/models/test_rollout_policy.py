"""What samples while the policy learns: itself, a copy that lags behind, a quantised one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.policy_model import PolicyModel
from models.rollout_policy import RolloutPolicy
from models.sft_model import LanguageModel, build_embedded
from ppo_trainer.generator import Generator
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.conftest import SHAPE, TINY
from tests.tabular import Bandit, token_id

PROMPTS = [Prompt(0, "", (1, 2, 3), {}), Prompt(1, "", (4, 5, 6, 7, 8), {})]
TOKENS = mx.array([[1, 2, 3, 9, 8, 7, 5, 4]])
KINDS = ["lora", "full"]
GAP = "sampling/sampling_logp_difference/mean"

Make = Callable[..., Any]


def config(make_config: Make, **options: Any) -> PPOConfig:
    small = {"group_size": 3, "max_new_tokens": 6, "allow_truncated_sampling": True}
    made: PPOConfig = make_config(PPOConfig, **{**small, **options})
    return made


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(TOKENS)).astype(np.float64)


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(model.parameters())}


def learn(policy: PolicyModel) -> None:
    """One step of gradient descent on an arbitrary loss, large enough to see."""
    loss = nn.value_and_grad(
        policy.model, lambda model: mx.mean(nn.losses.cross_entropy(model(TOKENS), TOKENS))
    )
    _, gradients = loss(policy.model)
    assert tree_flatten(gradients)
    optim.Adam(learning_rate=0.02).update(policy.model, gradients)
    mx.eval(policy.model.parameters())


def sample(policy: PolicyModel, options: PPOConfig, sampler: RolloutPolicy) -> list[Rollout]:
    return Generator(policy, options, sampler).generate(PROMPTS, 1)


def furthest(model: nn.Module, rollouts: list[Rollout]) -> float:
    """Largest distance of a stored logprob from the model's own, by a forward without a cache, in float64."""
    distances = []
    for r in rollouts:
        ids, n = [*r.prompt.ids, *r.completion_ids], len(r.prompt.ids)
        z = np.array(model(mx.array([ids[:-1]]))[0, n - 1 :]).astype(np.float64)  # (C, V)
        logprobs = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        own = logprobs[np.arange(len(r.completion_ids)), list(r.completion_ids)]
        distances.append(np.abs(own - np.array(r.logprobs)).max())
    return float(max(distances))


# The policy itself, and a copy that lags ------------------------------------------------------------------


def test_the_current_policy_samples_from_itself(tiny: LanguageModel, make_config: Make) -> None:
    options = config(make_config, learning_rate=1e-3)
    policy = PolicyModel(tiny, options)
    sampler = RolloutPolicy(policy)
    for step in (1, 2):
        sampler.before_rollouts(step)
        assert sampler.is_current
        assert sampler.model is policy.model
        assert sampler.trunk is policy.trunk
        assert furthest(policy.model, sample(policy, options, sampler)) < 1e-5
        learn(policy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_samples_from_the_old_weights_until_it_is_synchronised(
    tiny: LanguageModel, make_config: Make, kind: str
) -> None:
    options = config(make_config, fine_tune_type=kind)
    policy = PolicyModel(tiny, options)
    sampler = RolloutPolicy(policy, copy=True)
    before = logits(policy.model)
    learn(policy)
    assert (logits(sampler.model) == before).all()
    old = sample(policy, options, sampler)
    assert furthest(sampler.model, old) < 1e-5
    assert furthest(policy.model, old) > 1e-2
    sampler.sync()
    assert (logits(sampler.model) == logits(policy.model)).all()
    new = sample(policy, options, sampler)
    assert furthest(policy.model, new) < 1e-5
    assert [r.completion_ids for r in new] == [
        r.completion_ids for r in sample(policy, options, RolloutPolicy(policy))
    ]


@pytest.mark.parametrize(("every", "at"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 1, 1, 4, 4, 4, 7])])
def test_synchronisation_is_at_the_first_step_and_every_few_from_there(
    tiny: LanguageModel, make_config: Make, every: int, at: list[int]
) -> None:
    policy = PolicyModel(tiny, config(make_config))
    sampler = RolloutPolicy(policy, copy=True, sync_every=every)
    assert sampler.synced_at == 0
    as_of: dict[int, np.ndarray] = {}
    for step, expected in enumerate(at, start=1):
        learn(policy)
        as_of[step] = logits(policy.model)
        sampler.before_rollouts(step)
        assert sampler.synced_at == expected
        assert (logits(sampler.model) == as_of[expected]).all()


# Quantised -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_the_policy_stays_what_it_is_and_trains_on(
    tiny: LanguageModel, make_config: Make, kind: str, bits: int | None
) -> None:
    """Its modules, its arrays and its logits, bit for bit; and what trains does not train in the copy."""
    policy = PolicyModel(tiny, config(make_config, fine_tune_type=kind))
    twin = PolicyModel(tiny, config(make_config, fine_tune_type=kind))
    learn(policy), learn(twin)
    trainable = [name for name, _ in tree_flatten(policy.model.trainable_parameters())]
    before, out = weights(policy.model), logits(policy.model)
    sampler = RolloutPolicy(policy, copy=True, bits=bits, group_size=32)
    for _ in range(2):
        sampler.sync()
        after = weights(policy.model)
        assert before.keys() == after.keys()
        assert all((before[name] == after[name]).all() for name in before)
        assert (logits(policy.model) == out).all()
        assert [name for name, _ in tree_flatten(policy.model.trainable_parameters())] == trainable
        assert not tree_flatten(sampler.model.trainable_parameters())
    learn(policy), learn(twin)  # as if there had been no copy
    assert all((weights(twin.model)[name] == x).all() for name, x in weights(policy.model).items())
    assert (logits(policy.model) != out).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_copy_is_sampled_from_as_it_is(tiny: LanguageModel, make_config: Make, kind: str) -> None:
    options = config(make_config, fine_tune_type=kind)
    policy = PolicyModel(tiny, options)
    learn(policy)
    sampler = RolloutPolicy(policy, bits=4, group_size=32)
    assert not sampler.is_current
    rollouts = sample(policy, options, sampler)
    assert furthest(sampler.model, rollouts) < 1e-4
    assert furthest(policy.model, rollouts) > 1e-2
    stale = logits(sampler.model)
    learn(policy)
    assert (logits(sampler.model) == stale).all()
    sampler.before_rollouts(1)
    assert (logits(sampler.model) != stale).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_each_quantised_weight_is_within_half_a_step_of_the_policys(
    tiny: LanguageModel, make_config: Make, kind: str, bits: int
) -> None:
    """Its adapters included: W + s (A B)ᵀ by hand. The grid of a group of 32 has 2^bits - 1 steps."""
    policy = PolicyModel(tiny, config(make_config, fine_tune_type=kind, lora_alpha=64.0))
    learn(policy)
    sampler = RolloutPolicy(policy, bits=bits, group_size=32)
    theirs, moved = dict(policy.model.named_modules()), 0.0
    for name, layer in sampler.model.named_modules():
        if "scales" not in layer:
            continue
        source = theirs[name]
        if "lora_a" in source:
            plain = np.array(source["linear"]["weight"])
            exact = plain + float(source.scale) * (np.array(source["lora_a"]) @ np.array(source["lora_b"])).T
            moved = max(moved, float(np.abs(exact - plain).max()))
        else:
            exact = np.array(source["weight"])
        found = np.array(
            mx.dequantize(layer["weight"], layer["scales"], layer["biases"], group_size=32, bits=bits)
        )
        groups = exact.reshape(*exact.shape[:-1], -1, 32)
        step = np.ptp(groups, axis=-1, keepdims=True) / (2**bits - 1)
        # MLX moves the grid so that the end farthest from 0 is exact, which widens it by up to a step.
        error = np.abs(found.reshape(groups.shape) - groups)
        assert (error <= 1.1 * step + 1e-6).all()
        assert error.mean() < 0.3 * step.mean()
    assert kind == "full" or moved > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2", "mixtral", "mamba2"])
def test_every_architecture_quantises(
    tiny: LanguageModel, architecture: Callable[[str], nn.Module], make_config: Make, name: str, kind: str
) -> None:
    """Tied heads, learned positions, mixtures of experts; a width of 48 stays as it is beside one of 32."""
    base = LanguageModel(architecture(name), tiny.tokenizer, {}, name)
    options = config(make_config, fine_tune_type=kind)
    policy = PolicyModel(base, options)
    learn(policy)
    sampler = RolloutPolicy(policy, bits=8, group_size=32)
    rollouts = sample(policy, options, sampler)
    assert furthest(sampler.model, rollouts) < 1e-4
    assert furthest(policy.model, rollouts) > 1e-4
    assert not any("lora_a" in m for m in sampler.model.modules())
    for path, module in sampler.model.named_modules():
        if "weight" in module and hasattr(module, "to_quantized"):
            assert module["weight"].shape[-1] % 32, path


def test_experts_are_quantised_and_their_router_at_the_bits_that_mlx_lm_gives_it(
    tiny: LanguageModel, make_config: Make
) -> None:
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    shape = {**SHAPE, **moe, "model_type": "qwen3_moe"}
    mx.random.seed(0)
    model_class, arguments = _get_classes(shape)
    base = LanguageModel(model_class(arguments.from_dict(shape)), tiny.tokenizer, {}, "moe")
    policy = PolicyModel(base, config(make_config))
    copy = RolloutPolicy(policy, bits=4, group_size=32).model
    bits = {name: m.bits for name, m in copy.named_modules() if "scales" in m}
    assert bits["model.layers.0.mlp.gate"] == 8
    assert bits["model.layers.0.mlp.switch_mlp.up_proj"] == 4
    assert {name for name, b in bits.items() if b != 4} == {f"model.layers.{i}.mlp.gate" for i in (0, 1)}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_quantised_already_keeps_its_bits(make_config: Make, bits: int) -> None:
    """QLoRA: the adapters are fused into the base's own 4 bits, and nothing is quantised twice."""
    base = build_embedded(TINY, seed=1)
    nn.quantize(base.model, group_size=32, bits=4)
    options = config(make_config)
    policy = PolicyModel(base, options)
    learn(policy)
    before = weights(policy.model)
    sampler = RolloutPolicy(policy, bits=bits, group_size=64)
    assert {m.bits for m in sampler.model.modules() if "scales" in m} == {4}
    rollouts = sample(policy, options, sampler)
    assert furthest(sampler.model, rollouts) < 1e-4
    assert furthest(policy.model, rollouts) > 1e-3
    assert all((before[name] == x).all() for name, x in weights(policy.model).items())
    out = logits(policy.model)
    learn(policy)
    assert (logits(policy.model) != out).any()


def test_a_group_that_no_width_holds_is_refused_in_one_sentence(
    tiny: LanguageModel, make_config: Make
) -> None:
    policy = PolicyModel(tiny, config(make_config))
    with pytest.raises(
        InvalidConfigurationError,
        match=r"rollout_quant_group_size = 128 \(there are 32, 64\); choose a smaller one$",
    ):
        RolloutPolicy(policy, bits=4, group_size=128)


# Through the trainer ---------------------------------------------------------------------------------------


def steps_of(
    folder: Path, model: LanguageModel, make_config: Make, n: int, **options: Any
) -> tuple[Any, list[Any]]:
    """A trainer after ``n`` steps on two prompts, and each step's metrics."""

    def reward(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [sum(token % 3 for token in ids) / len(ids) for ids in completion_ids]

    seen: list[Any] = []

    class Watch:
        def on_step_end(self, step: int, metrics: Any) -> None:
            seen.append(metrics)

    small = {
        "algorithm": "grpo",
        "batch_size": 2,
        "group_size": 8,
        "max_new_tokens": 6,
        "learning_rate": 0.02,
        "verbose": False,
        "log_samples_every": 0,
        "output_dir": str(folder),
    }
    trainer = PPOTrainer(make_config(PPOConfig, **{**small, **options}), model=model, reward_model=reward)
    trainer.train(["ab", "cde"], num_epochs=n, callbacks=[Watch()])
    return trainer, seen


def test_sampler_and_trainer_differ_on_the_second_step_of_each_pair(
    tiny: LanguageModel, make_config: Make, tmp_path: Path
) -> None:
    trainer, seen = steps_of(
        tmp_path, tiny, make_config, 4, rollout_policy="copy", rollout_sync_every=2, fine_tune_type="full"
    )
    gaps = [metrics[GAP] for metrics in seen]
    assert max(gaps[0], gaps[2]) < 1e-5
    assert min(gaps[1], gaps[3]) > 1e-2
    for metrics, apart in zip(seen, [False, True, False, True], strict=True):
        highest, lowest = (metrics[f"sampling/importance_sampling_ratio/{end}"] for end in ("max", "min"))
        assert (highest > 1.01, lowest < 0.99) == (apart, apart)
        assert (metrics["sampling/effective_sample_size"] < 0.9999) == apart
    assert trainer.rollout_policy.synced_at == 3


def test_eight_bits_are_nearer_than_four(tiny: LanguageModel, make_config: Make, tmp_path: Path) -> None:
    gaps = {}
    for bits in (4, 8):
        _, seen = steps_of(
            tmp_path / str(bits),
            tiny,
            make_config,
            2,
            quantize_for_rollouts=True,
            rollout_bits=bits,
            rollout_quant_group_size=32,
        )
        gaps[bits] = [metrics[GAP] for metrics in seen]
    for four, eight in zip(gaps[4], gaps[8], strict=True):
        assert 1e-5 < eight < four / 4  # a sixteenth of the step between neighbours


def test_evaluation_judges_the_policy_itself(tmp_path: Path) -> None:
    """u is likelier at first and v is better: the policy learns v while the copy, never synchronised, says u."""
    bandit = Bandit([1.5, 0.0], [0.0, 1.0])
    trainer = bandit.learn(
        tmp_path,
        "grpo",
        steps=12,
        kl_coef=0.0,
        rollout_policy="copy",
        rollout_sync_every=1000,
        eval_temperature=0.0,
    )
    assert bandit.probabilities(trainer)[1] > 0.6
    stale = np.array(trainer.rollout_policy.model(mx.array([[token_id("?")]])))[0, -1]
    assert stale.argmax() == token_id("u")
    assert [record["completion"] for record in trainer.evaluate(["?"])["samples"]] == ["v"]
    assert np.array(trainer.rollout_policy.model(mx.array([[token_id("?")]])))[0, -1].argmax() == token_id(
        "u"
    )


@pytest.mark.parametrize(
    "copy", [{"rollout_policy": "copy", "rollout_sync_every": 2}, {"quantize_for_rollouts": True}]
)
def test_a_copy_is_corrected_for_per_token_unless_told_otherwise(
    tiny: LanguageModel, make_config: Make, tmp_path: Path, copy: dict[str, Any]
) -> None:
    """auto = token_truncate: the same weights after two steps, and others than without any correction."""
    found = []
    for i, options in enumerate(
        ({}, {"importance_correction": "token_truncate"}, {"allow_truncated_sampling": True})
    ):
        trainer, _ = steps_of(
            tmp_path / str(i),
            tiny,
            make_config,
            2,
            rollout_quant_group_size=32,
            **copy,
            **options,
        )
        found.append(weights(trainer.policy.model))
    auto, truncated, uncorrected = found
    assert PPOConfig(**copy).correction == "token_truncate"
    assert all((auto[name] == x).all() for name, x in truncated.items())
    assert any((auto[name] != x).any() for name, x in uncorrected.items())
