"""Each check against a run in which nothing is wrong, and against one with the fault that it is there for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from base_setup.lora_setup import DESCRIPTION, adapter_layers
from base_setup.parameters import named_arrays
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from diagnosis.examination import OWN_PROMPTS, examine_trainer, shorter
from diagnosis.findings import Finding
from diagnosis.gradient_checks import (
    check_gradients,
    check_kl,
    check_padding,
    loss_gradients,
    with_probe_advantages,
)
from diagnosis.learning_checks import check_rewards, check_weights_move
from diagnosis.machine import MemoryUse, Process, check_environment, check_memory, damaged_libraries
from diagnosis.restart_check import check_restart
from diagnosis.token_checks import check_batched, check_mask, check_prompt_matters, check_sampler
from diagnosis.tolerance import logprob_tolerance
from experience_buffer.data_structures import Experience, Prompt, Rollout, TokenBatch
from models.policy_model import FrozenPolicy, PolicyModel
from ppo_trainer.ppo_trainer import PPOTrainer
from rewards.scored_batch import ScoredBatch
from token_attribution.extractor import extract
from token_attribution.trunk import find_trunk

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=2, intermediate_size=64
)


def make_config(folder: Path, **options: Any) -> PPOConfig:
    settings = {
        "model_name": "embedded",
        "embedded_model": SMALLEST,
        "output_dir": str(folder / "run"),
        "algorithm": "grpo",
        "group_size": 3,
        "batch_size": 3,
        "max_new_tokens": 6,
        "lora_r": 4,
        "lora_alpha": 8,
        "verbose": False,
    }
    return PPOConfig(**{**settings, **options})


def ascii_share(completions: Sequence[str], **columns: Any) -> list[float]:
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]


def make_trainer(
    folder: Path, *, reference: Any = None, reward: Any = ascii_share, **options: Any
) -> PPOTrainer:
    return PPOTrainer(make_config(folder, **options), reward_model=reward, reference=reference)


def examined(trainer: PPOTrainer, folder: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine_trainer(trainer, OWN_PROMPTS, folder)}


def faults(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.verdict != "ok"}


def rollouts_of(policy: PolicyModel, lengths: Sequence[int] = (3, 1, 6), seed: int = 0) -> list[Rollout]:
    """Of ids drawn at random; the sampler's logprobs are the policy's own, a row at a time."""
    random = np.random.default_rng(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = tuple(policy.tokenizer.encode(OWN_PROMPTS[index % len(OWN_PROMPTS)]))
        sampled = tuple(random.integers(0, 200, size=length).tolist())
        rollout = Rollout(Prompt(index, "", ids), 0, sampled, (0.0,) * length, False, "")
        batch = extract([rollout])
        logprobs = np.array(policy.logprobs(batch.tokens, batch.mask))[np.array(batch.mask)]
        made.append(replace(rollout, logprobs=tuple(logprobs.tolist())))
    return made


@pytest.fixture
def policy(tmp_path: Path) -> PolicyModel:
    return make_trainer(tmp_path).policy


def rebuilt(policy: PolicyModel) -> PolicyModel:
    """The policy after its model has been tampered with: the trunk is found anew."""
    policy.trunk = find_trunk(policy.model)
    return policy


# Nothing is wrong ----------------------------------------------------------------------------------------

SOUND = [
    {"algorithm": "grpo"},
    {"algorithm": "ppo"},
    {"algorithm": "ppo", "value_network": "shared"},
    {"algorithm": "grpo", "fine_tune_type": "full"},
    {
        "algorithm": "dapo",
        "temperature": 0.7,
        "lora_layers": 1,
        "num_epochs_per_rollout": 2,
        "minibatch_size": 6,
    },
    {
        "algorithm": "grpo",
        "quantize_for_rollouts": True,
        "rollout_quant_group_size": 32,
        "micro_batch_size": 2,
    },
    {"algorithm": "rloo", "max_new_tokens": 1},
]


@pytest.mark.parametrize("options", SOUND, ids=lambda options: "-".join(map(str, options.values())))
def test_it_has_nothing_to_say_about_a_sound_run(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **options)
    findings = examined(trainer, tmp_path)
    told = {"prompt is seen"} if options.get("max_new_tokens") == 1 else set()  # nothing to tell it by
    assert faults(findings) == told, findings
    expected = {
        "reward", "mask and end token", "prompt is seen", "batched = single", "sampler = trainer", "gradients",
        "masked positions", "ratio at step 0", "weights move", "save and load",
    }  # fmt: skip
    assert expected <= findings.keys()
    if trainer.reference is not None:
        assert {"KL at step 0", "reference stays"} <= findings.keys()
    if options == {"algorithm": "ppo"}:
        assert "critic moves" in findings
    assert all(
        any(c.isdigit() for c in finding.seen) or finding.verdict != "ok" for finding in findings.values()
    )


def test_a_reference_that_is_another_model_is_told_and_no_fault(tmp_path: Path) -> None:
    other = PolicyModel(make_trainer(tmp_path, seed=3).policy.base, make_config(tmp_path / "b")).frozen_copy()
    trainer = make_trainer(tmp_path / "c")
    batch = extract(rollouts_of(trainer.policy))
    experience = make_experience(batch)
    assert check_kl(trainer.policy, other, experience, 1.0, same=False).verdict == "ok"
    assert check_kl(trainer.policy, other, experience, 1.0, same=True).verdict == "fault"


def make_experience(batch: TokenBatch) -> Experience:
    return Experience(batch.tokens, batch.mask, mx.zeros(batch.mask.shape), batch.sampler_logprobs)


# Tokens and logprobs -------------------------------------------------------------------------------------


def shifted(rollouts: Sequence[Rollout]) -> TokenBatch:
    batch = extract(rollouts)
    return batch._replace(mask=mx.concatenate([batch.mask[:, 1:], batch.mask[:, :1]], axis=1))


def without_the_end(rollouts: Sequence[Rollout]) -> TokenBatch:
    """A completion's end token is left out of the mask, as when padding is recognised by its id."""
    batch = extract(rollouts)
    mask = np.array(batch.mask)
    for row, rollout in enumerate(rollouts):
        if rollout.terminated:
            mask[row, len(rollout.prompt.ids) + len(rollout.completion_ids) - 2] = False
    return batch._replace(mask=mx.array(mask))


def with_padding(rollouts: Sequence[Rollout]) -> TokenBatch:
    batch = extract(rollouts)
    first = mx.argmax(batch.mask.astype(mx.int32), axis=1)[:, None]
    return batch._replace(mask=mx.arange(batch.mask.shape[1])[None] >= first)


@pytest.mark.parametrize("broken", [shifted, without_the_end, with_padding])
def test_a_mask_that_is_not_the_sampled_tokens(
    policy: PolicyModel, broken: Callable[..., TokenBatch]
) -> None:
    rollouts = rollouts_of(policy)
    assert check_mask(rollouts, policy.end_ids).verdict == "ok"
    finding = check_mask(rollouts, policy.end_ids, broken)
    assert finding.verdict == "fault"
    if broken is without_the_end:  # of three rows and the one that is added, that one alone ends
        assert "1 rows of 4 differ, 1 without their end token" in finding.seen
        assert "11 tokens in the mask, 12 sampled" in finding.seen  # 3 + 1 + 6 and 2


def test_a_sampler_with_another_temperature(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.generator.sampling = trainer.generator.sampling._replace(temperature=1.5)
    assert faults(examined(trainer, tmp_path)) == {"sampler = trainer"}


def test_a_sampler_that_the_config_says_is_another_is_no_fault(policy: PolicyModel) -> None:
    rollouts = [replace(r, logprobs=tuple(x - 0.5 for x in r.logprobs)) for r in rollouts_of(policy)]
    assert check_sampler(policy, rollouts, 1.0).verdict == "fault"
    told = check_sampler(policy, rollouts, 1.0, ["top_p = 0.9"])
    assert told.verdict == "ok"
    assert "differ by 0.5 nats at most, 0.5 on average (10 tokens" in told.seen


class Silent(nn.Module):
    """Attention that passes nothing on: each token sees itself alone."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return mx.zeros_like(x)


class Everywhere(nn.Module):
    """Attention without a mask: each token sees those after it, padding included."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return mx.broadcast_to(mx.mean(x, axis=1, keepdims=True), x.shape)


def test_a_trunk_that_ignores_its_prompt(policy: PolicyModel) -> None:
    rollouts = rollouts_of(policy)
    assert check_prompt_matters(policy, rollouts, 1.0).verdict == "ok"
    for layer in policy.model.layers:
        layer.self_attn = Silent()
    assert check_prompt_matters(rebuilt(policy), rollouts, 1.0).verdict == "fault"


def test_a_trunk_that_sees_padding(policy: PolicyModel) -> None:
    rollouts = rollouts_of(policy)
    assert check_batched(policy, rollouts, 1.0).verdict == "ok"
    for layer in policy.model.layers:
        layer.self_attn = Everywhere()
    assert check_batched(rebuilt(policy), rollouts, 1.0).verdict == "fault"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("scale", [1, 40])
def test_what_16_bits_round_away_is_no_fault_however_large_the_logits(
    policy: PolicyModel, dtype: mx.Dtype, scale: int
) -> None:
    """A pass in 16 bits and one in float32 over the same weights; half as much at twice the temperature."""
    batch = extract(rollouts_of(policy))
    assert logprob_tolerance(policy, batch.tokens, 1.0) == 1e-3
    policy.model.model.norm.weight = policy.model.model.norm.weight * scale
    policy.model.set_dtype(dtype)
    rounded = np.array(policy.logprobs(batch.tokens, batch.mask))
    allowed = logprob_tolerance(policy, batch.tokens, 1.0)
    cooler = logprob_tolerance(policy, batch.tokens, 0.5)
    size = np.abs(np.array(policy.model(batch.tokens[:1]).astype(mx.float32))).max()
    assert (size > 8) == (scale == 40)
    policy.model.set_dtype(mx.float32)
    difference = np.abs(rounded - np.array(policy.logprobs(batch.tokens, batch.mask))).max()
    spacing = {mx.bfloat16: 1 / 128, mx.float16: 1 / 1024}[dtype]
    assert allowed == pytest.approx(4 * spacing * max(size, 8))
    assert cooler == pytest.approx(4 * spacing * max(2 * size, 8))
    assert 0 < difference < allowed


# Gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, -1])
def test_a_policy_with_a_frozen_adapter_layer(tmp_path: Path, which: int) -> None:
    trainer = make_trainer(tmp_path)
    name, layer = adapter_layers(trainer.policy.model)[which]
    layer.freeze()
    findings = examined(trainer, tmp_path)
    assert findings["gradients"].verdict == "fault"
    assert f"1 of 14 adapter layers without one, {name} the first" in findings["gradients"].seen


def test_a_frozen_weight_and_one_that_is_not_finite(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fine_tune_type="full")
    trainer.policy.model.layers[1].mlp.freeze()
    gradients = named_arrays(trainer.policy.model.trainable_parameters())
    finding = check_gradients(trainer.policy.model, {name: mx.ones_like(x) for name, x in gradients.items()})
    assert finding.verdict == "fault"
    assert (
        "3 of 24 weights without one, model.layers.1.mlp" in finding.seen
    )  # gate, up, down; 2 · 11 + 2 in all
    trainer.policy.model.unfreeze()
    gradients = named_arrays(trainer.policy.model.parameters())
    assert check_gradients(trainer.policy.model, gradients).verdict == "ok"
    gradients["model.norm.weight"] = mx.array([1.0, float("nan")])
    assert (
        "1 of 24 weights with one that is not finite" in check_gradients(trainer.policy.model, gradients).seen
    )


def test_a_loss_that_forgets_the_mask(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    experience = make_experience(extract(rollouts_of(trainer.policy)))
    experience = with_probe_advantages(experience._replace(ref_logprobs=mx.zeros(experience.mask.shape)))
    assert check_padding(lambda one: loss_gradients(trainer, one), experience).verdict == "ok"

    def forgetful(one: Any) -> dict[str, mx.array]:
        return loss_gradients(trainer, one._replace(mask=mx.ones_like(one.mask)))

    assert check_padding(forgetful, experience).verdict == "fault"


@pytest.mark.parametrize(
    "field", ["advantages", "sampler_logprobs", "old_logprobs", "ref_logprobs", "values", "returns"]
)
def test_a_loss_that_forgets_the_mask_of_one_array(tmp_path: Path, field: str) -> None:
    """A sum over all positions of one array; over the sampled ones it would be sound."""
    experience = with_probe_advantages(make_experience(extract(rollouts_of(make_trainer(tmp_path).policy))))
    experience = experience._replace(
        **{
            name: mx.where(experience.mask, 0.5, 0.0)
            for name in ("old_logprobs", "ref_logprobs", "values", "returns")
        }
    )

    def over(one: Experience, mask: mx.array) -> dict[str, mx.array]:
        return {"weight": mx.sum(mx.where(mask, getattr(one, field), 0.0))}

    assert check_padding(lambda one: over(one, one.mask), experience).verdict == "ok"
    assert check_padding(lambda one: over(one, mx.ones_like(one.mask)), experience).verdict == "fault"


def test_a_loss_that_reads_padding(tmp_path: Path) -> None:
    experience = make_experience(extract(rollouts_of(make_trainer(tmp_path).policy)))
    finding = check_padding(lambda one: {"weight": mx.sum(one.tokens[:, 1:].astype(mx.float32))}, experience)
    assert finding.verdict == "fault"


def test_probe_advantages_are_for_sampled_tokens_alone() -> None:
    mask = mx.array([[False, True, True], [True, False, False]])
    probe = with_probe_advantages(
        Experience(mx.zeros((2, 4), mx.int32), mask, mx.ones((2, 3)), mx.zeros((2, 3)))
    )
    assert probe.advantages.tolist() == [[0.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]


def test_dropout_in_the_policy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lora_dropout=0.5, learning_rate=1e-2)
    trainer.policy.model.train()
    assert "ratio at step 0" in faults(examined(trainer, tmp_path))


# Learning ------------------------------------------------------------------------------------------------


def test_a_reference_that_trains(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.reference = FrozenPolicy(trainer.policy.model)
    findings = examined(trainer, tmp_path)
    assert faults(findings) == {"reference stays"}
    assert (
        "28 of 52 arrays changed" in findings["reference stays"].seen
    )  # both factors of 2 · 7 layers, 24 weights


def test_a_reference_that_is_another_model(tmp_path: Path) -> None:
    other = make_trainer(tmp_path / "other", seed=5).policy.frozen_copy()
    trainer = make_trainer(tmp_path, reference=other)
    assert faults(examined(trainer, tmp_path)) == {"KL at step 0"}


def test_a_learning_rate_that_moves_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fine_tune_type="full", learning_rate=1e-12)
    finding = examined(trainer, tmp_path)["weights move"]
    assert finding.verdict == "fault"
    assert "raise learning_rate" in finding.advice


def test_a_critic_that_stays_as_it_was_made(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, algorithm="ppo", value_learning_rate=1e-60)
    findings = examined(trainer, tmp_path)
    assert faults(findings) == {"critic moves"}
    assert "0 of 30 arrays moved" in findings["critic moves"].seen  # two factors of 14 layers; the head's two


def test_updates_that_are_skipped(tmp_path: Path) -> None:
    module = make_trainer(tmp_path).policy.model
    weights = named_arrays(module.trainable_parameters())
    finding = check_weights_move(module, weights, {"made": 2.0, "skipped": 2.0, "rejected": 0.0})
    assert finding.verdict == "fault"
    assert "in 0 of 2 updates; 2 were skipped" in finding.seen


def scored(*scores: float, failed: Sequence[bool] | None = None) -> ScoredBatch:
    total = np.array(scores, dtype=np.float32)
    return ScoredBatch(total, {"r": total}, None if failed is None else np.array(failed))


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "groups", "verdict", "seen"),
    [
        (
            scored(0, 2, 1, 1),
            [0, 0, 1, 1],
            "ok",
            "1 of 2 groups without spread, mean deviation within groups 0.5",
        ),
        (scored(1, 1, 0, 0, 1, 3), [0, 0, 1, 1, 2, 2], "warning", "2 of 3 groups without spread"),
        (scored(1, 1, 0, 0), [0, 0, 1, 1], "fault", "2 of 2 groups without spread"),
        (scored(0, 2), [0, 1], "ok", "1 on average, from 0 to 2; mean deviation 1"),
        (scored(2, 2), [0, 1], "fault", "mean deviation 0"),
        (
            scored(NAN, NAN, failed=[True, False]),
            [0, 1],
            "fault",
            "none of 2 completions got a score (1 because",
        ),
        (
            scored(0, 2, NAN, failed=[False, False, True]),
            [0, 0, 0],
            "warning",
            "1 of 3 completions without a score",
        ),
        (scored(0, 2, NAN), [0, 0, 0], "ok", "1 of 3 completions without a score, 0 because"),
    ],
)
def test_rewards_that_teach_and_rewards_that_do_not(
    scores: ScoredBatch, groups: list[int], verdict: str, seen: str
) -> None:
    finding = check_rewards(scores, groups)
    assert finding.verdict == verdict, finding
    assert seen in finding.seen
    assert (finding.advice == "") == (verdict == "ok")


def test_equal_rewards_of_shortened_answers_are_a_warning(tmp_path: Path) -> None:
    finding = check_rewards(scored(0, 0), [0, 0], shortened="sampled were only 32 of 512 tokens")
    assert finding.verdict == "warning"
    assert "32 of 512 tokens" in finding.seen


def test_a_reward_that_raises_and_one_that_is_constant(tmp_path: Path) -> None:
    def broken(completions: Sequence[str], **columns: Any) -> list[float]:
        raise KeyError("answer")

    findings = examined(make_trainer(tmp_path, reward=broken), tmp_path / "a")
    assert faults(findings) == {"reward"}  # all the rest could be looked at nevertheless
    assert "KeyError" in findings["reward"].seen
    constant = make_trainer(tmp_path / "b", reward=lambda completions, **columns: [0.3] * len(completions))
    assert faults(examined(constant, tmp_path / "b")) == {"reward"}


# Saving --------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e-2)
    trainer.train(["ab"], num_epochs=1)
    tokens = mx.array([[1, 2, 3]])
    assert check_restart(trainer, tokens, tmp_path / "good").verdict == "ok"
    trainer.policy.description["lora_parameters"]["scale"] *= 2  # what is written, not what was trained with
    finding = check_restart(trainer, tokens, tmp_path / "bad")
    assert finding.verdict == "fault"
    assert "scale and rank" in finding.advice
    (tmp_path / "file").write_text("")
    assert (
        check_restart(trainer, tokens, tmp_path / "file" / "x").verdict == "fault"
    )  # not a folder to write to


def test_another_process_reads_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder with names of ours in it, as many projects have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text("")
    trainer = make_trainer(tmp_path, learning_rate=1e-2)
    trainer.train(["ab"], num_epochs=1)
    tokens = mx.array([[1, 2, 3]])
    finding = check_restart(trainer, tokens, tmp_path / "good", fresh=True)
    assert finding.verdict == "ok", finding
    assert "read by another process" in finding.seen


@pytest.mark.parametrize(
    "what",
    ["scale", pytest.param("base", marks=pytest.mark.slow), pytest.param("nothing", marks=pytest.mark.slow)],
)
def test_another_process_sees_what_this_one_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e-2)
    trainer.train(["ab"], num_epochs=1)
    save = trainer.save_model

    def broken(folder: Path) -> None:
        save(folder)
        if what == "scale":
            settings = json.loads((folder / DESCRIPTION).read_text())
            settings["lora_parameters"]["scale"] *= 2
            (folder / DESCRIPTION).write_text(json.dumps(settings))
        elif what == "base":  # a base that is here, and not on disk
            weights = dict(mx.load(str(folder / "base" / "model.safetensors")))
            weights["model.norm.weight"] = weights["model.norm.weight"] * 2
            mx.save_safetensors(str(folder / "base" / "model.safetensors"), weights)
        else:
            (folder / "base" / "config.json").unlink()

    monkeypatch.setattr(trainer, "save_model", broken)
    tokens = mx.array([[1, 2, 3]])
    finding = check_restart(trainer, tokens, tmp_path / "bad", fresh=True)
    assert finding.verdict == "fault"
    if what == "base":
        assert check_restart(trainer, tokens, tmp_path / "same", fresh=False).verdict == "ok"
    if what == "nothing":
        assert "has failed: " in finding.seen


# The machine ---------------------------------------------------------------------------------------------

GB = 10**9


@pytest.mark.parametrize(
    ("measured", "predicted", "whole", "machine", "verdict", "seen"),
    [
        (1.0, 1.0, 8.0, 16, "ok", "the whole run 8.00 GB of 16.0 GB"),
        (2.0, 1.0, 8.0, 16, "warning", "the whole run 16.00 GB of 16.0 GB"),  # twice what was predicted
        (2.1, 1.0, 8.0, 16, "fault", "the whole run 16.80 GB"),
        (0.1, 0.01, 8.0, 16, "ok", "the whole run 8.00 GB"),  # too small to tell anything
        (0.5, 1.0, 8.0, 16, "ok", "the whole run 8.00 GB"),  # an estimate is never lowered
    ],
)
def test_memory(
    measured: float, predicted: float, whole: float, machine: int, verdict: str, seen: str
) -> None:
    use = MemoryUse(int(measured * GB), int(predicted * GB), int(whole * GB))
    finding = check_memory(use, machine * GB)
    assert finding.verdict == verdict
    assert seen in finding.seen


def make_process(folder: Path, **changes: Any) -> Process:
    versions = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}
    sound = Process(versions, "cpu: OpenBLAS", {"MLX_DISABLE_COMPILE": "1"}, folder, True, True)
    return sound._replace(**changes)


def elf(sections_at: int, size: int) -> bytes:
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 40, sections_at)
    struct.pack_into("<HH", header, 58, 64, 3)
    return bytes(header) + bytes(size - 64)


def test_a_truncated_kernel(tmp_path: Path) -> None:
    """A library of 1000 bytes whose table of three sections, of 64 bytes each, begins at 808: it ends at 1000."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "whole.so").write_bytes(elf(808, 1000))
    assert all(finding.verdict == "ok" for finding in check_environment(make_process(tmp_path)))
    for name, content in {"a.so": elf(808, 999), "b.so": b"", "c.so": b"no library" * 20}.items():
        (tmp_path / "cpu" / name).write_bytes(content)
    assert [path.name for path in damaged_libraries(tmp_path.rglob("*.so"))] == ["a.so", "b.so", "c.so"]
    not_used = check_environment(make_process(tmp_path))[1]
    used = check_environment(make_process(tmp_path, variables={"MLX_DISABLE_COMPILE": "0"}))[1]
    own = check_environment(make_process(tmp_path, variables={"TMPDIR": "/tmp/mlx-ppo-kernels-1"}))[1]
    assert (not_used.verdict, used.verdict, own.verdict) == ("warning", "fault", "warning")
    assert "3 damaged" in used.seen
    assert f"remove {tmp_path / 'cpu' / 'a.so'} and 2 more" in used.advice


def test_the_libraries_of_this_python_are_whole() -> None:
    import mlx

    libraries = [path for folder in mlx.__path__ for path in Path(folder).rglob("*.so")]
    assert libraries
    assert damaged_libraries(libraries) == []


@pytest.mark.parametrize(
    ("changes", "which", "verdict"),
    [
        ({"backend": "cpu: reference BLAS (slow; …)"}, 0, "warning"),
        ({"versions": {"mlx": "0.33.0", "mlx-lm": "0.32.2"}}, 0, "warning"),
        ({"variables": {}, "has_compiler": False}, 1, "warning"),
        ({"variables": {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}}, 2, "fault"),
        ({"variables": {"MLX_RANK": "0", "MLX_HOSTFILE": "x"}}, 2, "fault"),
        ({"variables": {"MLX_RANK": "0", "MLX_WORLD_SIZE": "1"}}, 2, "ok"),
    ],
)
def test_the_process(tmp_path: Path, changes: dict[str, Any], which: int, verdict: str) -> None:
    finding = check_environment(make_process(tmp_path, **changes))[which]
    assert finding.verdict == verdict
    assert (finding.advice == "") == (verdict == "ok")


# The short run -------------------------------------------------------------------------------------------


def test_the_short_run_is_short_and_steady_and_the_users_own_otherwise(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, batch_size=64, group_size=16, max_new_tokens=512, minibatch_size=256, warmup_steps=10,
        lr_schedule="cosine", reference_sync_every=5, learning_rate=3e-4, temperature=0.9,
    )  # fmt: skip
    short = shorter(config, tmp_path / "elsewhere")
    assert (short.batch_size, short.group_size, short.max_new_tokens, short.minibatch_size) == (4, 4, 32, 16)
    assert (short.warmup_steps, short.lr_schedule, short.reference_sync_every) == (0, "constant", None)
    assert (short.learning_rate, short.temperature, short.algorithm) == (3e-4, 0.9, "grpo")
    assert short.output_dir == str(tmp_path / "elsewhere")
    small = make_config(tmp_path)
    assert (
        shorter(small, tmp_path).was_set("value_warmup_steps") is False
    )  # what is right already is left alone
