"""Every field is a flag; flags, files and environment in their order; sentences for what does not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line.commands import COMMANDS
from command_line.config_options import load
from config.options import options_of
from config.ppo_config import PPOConfig
from config.supervised_config import PreferenceConfig, RewardModelConfig, SFTConfig
from monitoring.metrics_file import read_metrics

CLASSES = {
    "train": PPOConfig,
    "explain": PPOConfig,
    "sft": SFTConfig,
    "reward-model": RewardModelConfig,
    "preference": PreferenceConfig,
}


def config(*words: str, name: str = "train") -> Any:
    options = COMMANDS[name].parser().parse_args(words)
    return load(CLASSES[name], options).config


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_a_flag_with_its_meaning(name: str) -> None:
    parser = COMMANDS[name].parser()
    text = "".join(parser.format_help().split())
    for field in dataclasses.fields(CLASSES[name]):
        flag = "--" + field.name.replace("_", "-")
        assert flag in parser.known_options()
        assert "".join(options_of(CLASSES[name])[field.name].meaning.split()) in text
    headings = {option.section for option in options_of(CLASSES[name]).values()}
    assert headings <= {group.title for group in parser._action_groups}


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate=2e-5"], "learning_rate", 2e-5),
        (["--set", "learning_rate=3e-5"], "learning_rate", 3e-5),
        (["--set", "learning-rate=3e-5"], "learning_rate", 3e-5),
        (["--learning-rate", "1e-5", "--set", "learning_rate=3e-5"], "learning_rate", 3e-5),
        (["--set", "learning_rate=3e-5", "--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--dynamic-sampling"], "dynamic_sampling", True),
        (["--no-dynamic_sampling"], "dynamic_sampling", False),
        (["--no-verbose", "--verbose"], "verbose", True),
        (["--log-level", "warning"], "verbose", False),
        (["--max-grad-norm", "none"], "max_grad_norm", None),
        (["--allow-truncated-sampling", "--logit-bias", '{"5": -1.5}'], "logit_bias", {5: -1.5}),
        (["--reward-weights", "1,0.5"], "reward_weights", [1.0, 0.5]),
        (["--rewards", "jaccard,format"], "rewards", ["jaccard", "format"]),
        (["--output-dir", "a_b"], "output_dir", "a_b"),
        (["--seed", "18446744073709551615"], "seed", 18446744073709551615),
        (["--entropy-coef", "-0.1"], "entropy_coef", -0.1),
    ],
)
def test_a_flag_sets_its_field(words: list[str], field: str, value: Any) -> None:
    loaded = config(*words)
    assert getattr(loaded, field) == value
    assert loaded.was_set(field)


def test_rewards_by_name_and_weight(workplace: Path, command: Callable[..., Any]) -> None:
    """They stand in place of the file's, and a reward of one's own has a colon in its name."""
    (workplace / "mine.py").write_text(
        "def brief(completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    words = (
        "train",
        "--config",
        "run.yaml",
        "--dry-run",
        "--reward",
        "mine.py:brief=0.25",
        "--reward",
        "jaccard",
    )
    assert "rewards  brief × 0.25, jaccard × 1\n" in command(*words).out


def test_files_environment_and_flags_in_their_order(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "a.toml").write_text("batch_size = 2\ngroup_size = 2\nseed = 2\nlora_r = 2\n")
    (workplace / "b.json").write_text('{"group_size": 3, "seed": 3, "lora_r": 3}')
    monkeypatch.setenv("MLX_PPO_SEED", "4")
    monkeypatch.setenv("MLX_PPO_LORA_R", "4")
    made = config("--preset", "grpo", "--config", "a.toml", "b.json", "--lora-r", "5")
    assert (made.algorithm, made.batch_size, made.group_size, made.seed, made.lora_r) == ("grpo", 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("words", "code", "sentences"),
    [
        (["--learning-rate", "fast"], 2, ["command line --learning-rate: learning_rate: ", "'fast'"]),
        (["--learning-rate", "-1"], 2, ["learning_rate", "greater than 0"]),
        (["--algorithm", "gropo"], 2, ["gropo", "grpo"]),
        (["--kl-estimator", "k9"], 2, ["kl_estimator", "k9"]),
        (["--set", "lerning_rate=1"], 2, ['no field "lerning_rate"; did you mean "learning_rate"?']),
        (["--set", "learning_rate"], 2, ["NAME=VALUE is expected, found 'learning_rate'"]),
        (["--lerning-rate", "1"], 2, ['did you mean "--learning-rate"?']),
        (["--learning-rate"], 2, ["--learning-rate: expected one argument"]),
        (["--config", "nope.yaml"], 2, ["nope.yaml"]),
        (["--config", "broken.yaml"], 2, ["broken.yaml"]),
        (["--config", "unknown.toml"], 2, ['unknown.toml:2: PPOConfig has no field "lerning_rate"']),
        (["--preset", "smal"], 2, ["smal", "small"]),
        (["--from", "mlxgrpo"], 2, ['did you mean "mlx-grpo"?']),
        (["--log-level", "LOUD"], 2, ["'LOUD' is none of DEBUG, INFO"]),
        (["--resume"], 2, ['resume: "latest" is the newest checkpoint in output_dir']),
        (["--resume", "runs/x"], 1, ['there is no folder "runs/x"']),
        (["--reward", "jacard"], 2, ["jacard", "jaccard"]),
        (["--reward", "jaccard=much"], 2, ["NAME=NUMBER is expected"]),
        (["--reward", "nope.py:f"], 2, ["nope.py"]),
        (["--reward", "learned:nowhere"], 1, ["nowhere"]),
        (["--reward", "well_formed", "--train-path", "nope.jsonl"], 1, ["nope.jsonl: there is no such file"]),
        (["--train-path", "bad.jsonl"], 1, ["bad.jsonl:2: "]),
        (["--train-path", "empty.jsonl"], 1, ["empty.jsonl"]),
        (["--train-path", "none"], 2, ["train_path: no data are named"]),
        (["--max-prompt-length", "1"], 1, ["prompts.jsonl:1", "3 tokens"]),
        (["--model-name", "nowhere"], 1, ['there is no folder "nowhere"']),
        (["--model-name", "pairs.jsonl"], 1, ["is a file"]),
        (["--adapter-path", "nowhere"], 1, ["adapters.safetensors", "nowhere"]),
        (["--output-dir", "pairs.jsonl/run"], 1, ['output_dir: "pairs.jsonl/run" cannot be written to']),
        (["--output-dir", "taken"], 1, ["already holds a run"]),
        (["--algorithm", "grpo", "--group-size", "1"], 2, ["group_size", "command line --group-size"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_work_gets_one_sentence(
    workplace: Path, command: Callable[..., Any], words: list[str], code: int, sentences: list[str], dry: bool
) -> None:
    """The same one in a dry run; a run is refused before it makes anything."""
    (workplace / "broken.yaml").write_text("a: [1,\n")
    (workplace / "unknown.toml").write_text("seed = 1\nlerning_rate = 1e-5\n")
    (workplace / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (workplace / "empty.jsonl").write_text("")
    (workplace / "taken").mkdir()
    (workplace / "taken/metrics.jsonl").write_text("")
    done = command("train", "--config", "run.yaml", *words, *(["--dry-run"] if dry else []))
    assert done.code == code, done.err
    assert len(done.err.splitlines()) <= 2, done.err
    for sentence in sentences:
        assert sentence in done.err
    assert not (workplace / "runs").exists()


def test_explain_says_where_a_value_comes_from(workplace: Path, command: Callable[..., Any]) -> None:
    done = command("train", "--config", "run.yaml", "--seed", "5", "--explain")
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert lines["seed"].endswith("command line --seed")
    assert lines["batch_size"].endswith("run.yaml:10")
    assert lines["num_epochs_per_rollout"].endswith("algorithm ppo")
    assert "surrogate  " in done.out  # the formula
    assert command("explain", "--config", "run.yaml", "--seed", "5").out == done.out
    other = command("sft", "--seed", "5", "--explain")
    assert other.code == 0
    assert "surrogate  " not in other.out


def test_a_config_written_by_a_run_is_one_that_a_run_reads(
    workplace: Path, command: Callable[..., Any]
) -> None:
    assert command("train", "--config", "run.yaml", "--output-dir", "runs/a").code == 0
    written = json.loads((workplace / "runs/a/config.json").read_text())["config"]
    (workplace / "again.json").write_text(json.dumps({**written, "output_dir": "runs/b"}))
    again = command("train", "--config", "again.json")
    assert again.code == 0, again.err
    first, second = (read_metrics(workplace / f"runs/{run}/metrics.jsonl") for run in "ab")
    assert [line.get("reward") for line in first] == [line.get("reward") for line in second]


def test_flags_of_an_older_system_however_it_is_named() -> None:
    for words in (["--from", "trl"], ["--from=trl"]):
        assert config(*words, "--num-generations", "4").group_size == 4


def test_a_number_below_zero_may_have_an_exponent() -> None:
    assert config("--entropy-coef", "-1e-3").entropy_coef == -1e-3
