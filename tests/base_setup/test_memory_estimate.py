"""The estimate against counts made here by hand, against real models and optimisers, and against a measured step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

import main
from base_setup import memory_estimate
from base_setup.memory_estimate import (
    GB,
    MACHINES,
    Architecture,
    describe,
    fitting_micro_batch,
    predict,
    read_config,
    within_memory,
)
from base_setup.parameters import count_parameters, named_arrays
from benchmarks.memory import CASES
from config.errors import InvalidConfigurationError, ModelLoadError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.training_config import TrainingConfig
from models.policy_model import PolicyModel
from models.sft_model import build_embedded
from ppo_trainer import updater
from ppo_trainer.ppo_trainer import PPOTrainer
from token_attribution import sampled_states, vocabulary
from training import adamw
from training.model_trainer import ModelTrainer

ROOT = Path(__file__).parents[2]
SHAPE = ModelConfig(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_layers=3, intermediate_size=160
)
#: Qwen3-0.6B, as its config.json has it.
QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
}


def options(**more: Any) -> PPOConfig:
    common = {"batch_size": 4, "group_size": 8, "max_prompt_length": 64, "max_new_tokens": 32, "kl_coef": 0.0}
    return PPOConfig(**{**common, **more})


def estimate(config: PPOConfig, model: dict[str, Any] = QWEN, **more: Any) -> memory_estimate.MemoryEstimate:
    return predict(model, config, **{"critic": False, "device": "metal", **more})


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in named_arrays(tree).values())


# What lives through the run ------------------------------------------------------------------------------


def test_the_parameters_of_qwen3_by_hand() -> None:
    """28 blocks of q, k, v, o, gate, up, down and four norms; one embedding; a last norm."""
    block = 1024 * 2048 + 2 * 1024 * 1024 + 2048 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    numbers = 28 * block + 151936 * 1024 + 1024
    assert numbers == 596_049_920
    assert Architecture.from_config(QWEN, "metal").numbers == numbers
    assert Architecture.from_config(QWEN, "metal").weights == 2 * numbers
    assert Architecture.from_config(QWEN, "cpu").weights == 4 * numbers  # held in float32 there
    untied = Architecture.from_config({**QWEN, "tie_word_embeddings": False}, "metal")
    assert untied.numbers == numbers + 151936 * 1024


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "mixtral"])
def test_other_architectures_are_counted_to_a_fiftieth(kind: str, architecture: Any) -> None:
    """Biases, and the choice among experts, are left out."""
    from tests.conftest import ARCHITECTURES
    from tests.conftest import SHAPE as COMMON

    config = {**COMMON, **ARCHITECTURES[kind], "model_type": kind}
    counted = Architecture.from_config(config, "cpu").numbers
    assert counted == pytest.approx(count_parameters(architecture(kind))[1], rel=0.02)


def test_a_four_bit_model_is_counted_to_the_byte() -> None:
    base = build_embedded(SHAPE, seed=0)
    nn.quantize(base.model, group_size=32, bits=4)
    config = {**base.config, "quantization": {"group_size": 32, "bits": 4}}
    assert Architecture.from_config(config, "cpu").weights == nbytes(base.model.parameters())


@pytest.mark.parametrize(
    "choice",
    [
        {"fine_tune_type": "lora", "lora_r": 4},
        {"fine_tune_type": "lora", "lora_r": 64, "lora_layers": 2, "optimizer_bits": 8},
        {"fine_tune_type": "full"},
        {"fine_tune_type": "full", "optimizer_bits": 8},
    ],
)
def test_what_trains_and_its_moments_are_counted_to_the_byte(choice: dict[str, Any]) -> None:
    base = build_embedded(SHAPE, seed=0)
    policy = PolicyModel(base, TrainingConfig(**choice))
    trainer = ModelTrainer(policy.model, TrainingConfig(**choice), total_steps=1)
    lasting = estimate(options(**choice), base.config, device="cpu").lasting
    trained = nbytes(policy.model.trainable_parameters())
    assert lasting["adapters"] + lasting["trained weights"] == pytest.approx(trained, rel=0.01)
    counters = 12  # step and learning rate
    # Norms of queries and keys, 16 numbers each, are left out.
    assert lasting["optimiser state"] == pytest.approx(nbytes(trainer.optimizer.state) - counters, rel=0.01)
    assert lasting["base weights"] == nbytes(base.model.parameters())


def test_a_critic_of_its_own_has_its_own_of_everything_that_trains() -> None:
    alone, both = estimate(options()), estimate(options(), critic=True)
    shared = estimate(options(value_network="shared"), critic=True)
    assert both.lasting["adapters"] == 2 * alone.lasting["adapters"]
    assert both.lasting["optimiser state"] == 2 * alone.lasting["optimiser state"]
    assert both.lasting["base weights"] == alone.lasting["base weights"]
    assert shared.lasting == alone.lasting


def test_references_and_sampling_copies_that_are_not_shared() -> None:
    adapters = estimate(options()).lasting["adapters"]
    assert estimate(options()).lasting["reference"] == 0
    weights = Architecture.from_config(QWEN, "metal").weights
    assert estimate(options(reference_path="elsewhere")).lasting["reference"] == weights
    assert estimate(options(reference_sync_every=5)).lasting["reference"] == adapters
    # Initial, trained in full on a GPU: the float32 weights before the first update.
    full = estimate(options(fine_tune_type="full")).lasting
    assert full["reference"] == full["trained weights"] == pytest.approx(2 * weights, rel=0.001)
    assert estimate(options(fine_tune_type="full"), device="cpu").lasting["reference"] == 0
    quantised = estimate(options(quantize_for_rollouts=True)).lasting["sampling copy"]
    assert quantised == pytest.approx(596_049_920 * (0.5 + 4 / 64), rel=0.001)


# What phases add -----------------------------------------------------------------------------------------


def test_the_peak_is_the_sum_of_its_parts() -> None:
    found = estimate(options())
    assert found.peak == sum(found.parts.values()) == found.peak_of(found.phase)
    assert found.peak == max(found.peak_of(phase) for phase in found.phases)
    assert set(found.phases) == {"rollouts", "scoring", "gradient pass", "update"}


def test_keys_and_values_by_hand() -> None:
    """32 rows of 96 tokens in 28 layers, of 8 × 128 numbers twice in 2 bytes, and one layer's while it grows."""
    cache = estimate(options()).phases["rollouts"]["keys and values"]
    assert cache == 32 * 96 * (28 + 1) * 2 * 1024 * 2


def test_half_the_rows_take_half_of_the_activations_and_one_more_gradient() -> None:
    """Of completions without shared prompts: a group of 1."""
    whole = estimate(options(group_size=1, batch_size=8)).phases["gradient pass"]
    half = estimate(options(group_size=1, batch_size=8, micro_batch_size=4)).phases["gradient pass"]
    assert half["activations"] * 2 == whole["activations"]
    adapters = estimate(options()).lasting["adapters"]
    assert half["gradients"] - whole["gradients"] == adapters


def test_logits_are_held_a_chunk_at_a_time_and_on_the_cpu_all() -> None:
    """A chunk has 2**25 numbers: logits, logarithms, probabilities and slopes of so many."""
    chunk = estimate(options()).phases["gradient pass"]["logits"]
    assert chunk == 4 * (2**25 // 151936) * 151936 * 4
    few = estimate(options(batch_size=1, group_size=2, max_new_tokens=3), device="cpu")
    assert few.phases["gradient pass"]["logits"] == 6 * 151936 * 4


def test_what_is_mirrored_is_still_so() -> None:
    assert memory_estimate.LOGITS_AT_ONCE == vocabulary.CHUNK_ELEMENTS
    assert memory_estimate.UPDATED_AT_ONCE == adamw.CHUNK
    assert (memory_estimate.CODED_FROM, memory_estimate.CODED_BLOCK) == (adamw.SMALLEST, adamw.BLOCK)
    assert memory_estimate.EFFICIENT_TOKENS == updater.PASS_TOKENS
    assert memory_estimate.PASS_TOKENS == sampled_states._PASS_TOKENS


def measured(size: str, case: str) -> tuple[float, float]:
    """Predicted and measured peak of two real steps, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", size, "--case", case],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return max(found["predicted"].values()), max(found["measured"].values())


@pytest.mark.parametrize("case", ["grpo, full"])
def test_a_measured_step_needs_what_was_predicted(case: str) -> None:
    """1.3 million parameters; the acceptance is a fifth, also on 26 and 117 million (next test)."""
    predicted, peak = measured("tiny", case)
    assert predicted == pytest.approx(peak, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
@pytest.mark.parametrize("case", list(CASES))
def test_every_size_and_case_needs_what_was_predicted(size: str, case: str) -> None:
    predicted, peak = measured(size, case)
    assert predicted == pytest.approx(peak, rel=0.2)


# What fits -----------------------------------------------------------------------------------------------


def peak(config: PPOConfig, rows: int) -> int:
    return estimate(config.replace(micro_batch_size=rows)).peak


@pytest.mark.parametrize("limit", [3.0, 4.0, 6.0, 30.0])
def test_the_largest_that_fits_is_chosen(limit: float) -> None:
    config = options(max_memory_gb=limit, max_prompt_length=256, micro_batch_size=32)
    rows = fitting_micro_batch(QWEN, config, critic=False, device="metal")
    assert rows is not None
    assert peak(config, rows) <= limit * GB
    assert rows == 32 or peak(config, rows + 1) > limit * GB


def test_more_memory_never_means_fewer_rows() -> None:
    config = options(max_prompt_length=256, micro_batch_size=32)
    limits = [3.0, 3.5, 4.0, 5.0, 8.0, 100.0]
    chosen = [
        fitting_micro_batch(QWEN, config.replace(max_memory_gb=limit), critic=False, device="metal")
        for limit in limits
    ]
    assert chosen == sorted(chosen)  # type: ignore[type-var]
    assert len(set(chosen)) > 3
    assert chosen[-1] == 32  # everything at once


def test_without_a_limit_the_config_decides_and_a_given_size_is_never_exceeded() -> None:
    assert fitting_micro_batch(QWEN, options(), critic=False) is None
    assert fitting_micro_batch(QWEN, options(micro_batch_size=3), critic=False) == 3
    roomy = options(micro_batch_size=3, max_memory_gb=1000)
    assert fitting_micro_batch(QWEN, roomy, critic=False) == 3
    assert fitting_micro_batch(QWEN, options(minibatch_size=4, max_memory_gb=1000), critic=False) is None
    assert within_memory(QWEN, options(), critic=False) == options()
    assert within_memory(QWEN, roomy.replace(micro_batch_size=None), critic=True).micro_batch_size is None


def test_what_the_peak_leaves_of_a_limit_is_for_the_cache_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[int | None] = []
    monkeypatch.setattr(
        memory_estimate, "set_memory_limits", lambda cache_bytes=None: given.append(cache_bytes)
    )
    config = options(max_memory_gb=5)
    monkeypatch.setattr(memory_estimate, "_installed_device", lambda: "cpu")
    within_memory(QWEN, options(max_memory_gb=1000), critic=False)
    assert given == []
    monkeypatch.setattr(memory_estimate, "_installed_device", lambda: "metal")
    fitted = within_memory(QWEN, config, critic=False)
    assert given == [5 * GB - estimate(fitted).peak]
    assert given[0] >= 0


def test_where_one_row_does_not_fit_the_sentence_says_what_is_needed_and_what_to_change() -> None:
    full = options(max_memory_gb=2, fine_tune_type="full")
    needed = peak(full, 1) / GB
    with pytest.raises(InvalidConfigurationError) as caught:
        fitting_micro_batch(QWEN, full, critic=False, device="metal")
    assert str(caught.value) == (
        f"max_memory_gb: 2 GB do not hold this run even with micro_batch_size = 1, where {needed:.2f} GB are predicted"
        ', most of it optimiser state (4.77 GB); raise it, or set optimizer_bits to 8, or fine_tune_type to "lora"'
    )
    with pytest.raises(InvalidConfigurationError, match=r"most of it base weights .* a 4-bit model"):
        fitting_micro_batch(QWEN, options(max_memory_gb=0.5), critic=False, device="metal")


# The dry run ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN), encoding="utf-8")
    return tmp_path


def test_a_dry_run_needs_nothing_but_config_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--dry-run",
        "--model",
        str(folder),
        "--algorithm",
        "grpo",
        "--batch-size",
        "2",
        "--group-size",
        "4",
    ]
    assert (
        main.main([*arguments, "--prompt-length", "20", "--max-new-tokens", "10", "--max-memory-gb", "5"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "596.0 million parameters, grpo, lora, 2 prompts × 4 completions, 20 + 10 tokens" in printed
    assert "base weights" in printed
    assert "peak" in printed
    for memory in MACHINES:
        assert f"\n  {memory:3d} GB" in printed
    assert "max_memory_gb: 5 GB hold micro_batch_size = " in printed


@pytest.mark.parametrize(
    ("option", "value", "changed"),
    [
        ("--algorithm", "ppo", "ppo, lora"),
        ("--full", None, "grpo, full"),
        ("--optimizer-bits", "8", "optimiser state"),
        ("--micro-batch-size", "2", "micro_batch_size = 2"),
    ],
)
def test_every_option_of_a_dry_run_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str | None, changed: str
) -> None:
    base = ["--dry-run", "--model", str(folder), "--algorithm", "grpo"]
    assert main.main(base) == 0
    before = capsys.readouterr().out
    assert main.main([*base, option, *([value] if value else [])]) == 0
    after = capsys.readouterr().out
    assert changed in after
    assert before != after


def test_machines_fit_what_fits_them() -> None:
    lines = describe(QWEN, options(fine_tune_type="full"), critic=False, device="metal")
    small, large = (next(line for line in lines if line.startswith(f"  {m:3d} GB")) for m in (8, 128))
    # Weights in 2 and 4 bytes, 8 of moments, an initial reference of 4, two gradients of 4: 26 bytes × 0.596 billion.
    assert "none: one row needs 15." in small
    assert large.endswith("any: the default fits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON object is expected"),
        ("{}", "there is no hidden_size, which the memory estimate needs"),
        (json.dumps({**QWEN, "num_hidden_layers": "many"}), "num_hidden_layers is 'many', a whole number"),
    ],
)
def test_a_config_that_says_nothing_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main.main(["--dry-run", "--model", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json: it cannot be read \(No such file"):
        read_config(str(tmp_path))
    with pytest.raises(ModelLoadError, match=r'there is no folder "\./nope"'):
        read_config("./nope")


def test_the_embedded_model_has_an_estimate_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--dry-run", "--model", "embedded"]) == 0
    assert "0.3 million parameters" in capsys.readouterr().out


def test_a_run_takes_the_micro_batch_that_fits_or_refuses_before_it_loads_weights(tmp_path: Path) -> None:
    base = build_embedded(ModelConfig.tiny(), 0)
    config = PPOConfig(
        model_name="embedded",
        algorithm="grpo",
        group_size=8,
        max_prompt_length=64,
        max_new_tokens=32,
        micro_batch_size=32,
        output_dir=str(tmp_path / "run"),
    )
    device = "cpu"
    all_rows = predict(base.config, config, critic=False, device=device).peak
    half = predict(base.config, config.replace(micro_batch_size=16), critic=False, device=device).peak
    limited = config.replace(max_memory_gb=(half + all_rows) / 2 / GB)
    assert (
        16 <= (PPOTrainer(limited, reward_model="well_formed", model=base).config.micro_batch_size or 0) < 32
    )
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(base.config))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidConfigurationError, match=r"max_memory_gb: 0\.001 GB do not hold this run"):
        PPOTrainer(config.replace(model_name=str(folder), max_memory_gb=0.001), reward_model="well_formed")
