"""Every documented command line of the systems before, with a small model in the place of the one that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config.model_config import ModelConfig
from models.sft_model import build_embedded, save_language_model
from tests.command_line.conftest import TINY, write_rows


@pytest.fixture
def models(workplace: Path) -> Path:
    """``base_model`` and ``data``, as the documents name them."""
    save_language_model(build_embedded(ModelConfig(**TINY), 0), workplace / "base_model")
    (workplace / "data").mkdir()
    for split in ("train", "valid"):
        rows = [{"prompt": f"{split} {n} + {n}?", "completion": str(2 * n)} for n in range(4)]
        write_rows(workplace / f"data/{split}.jsonl", rows)
    return workplace


def written_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["config"]
    return config


def test_mlx_grpo_on_local_files(models: Path, command: Callable[..., Any]) -> None:
    """python mlx_grpo_trainer_aligned.py …, with 2 steps for 10000, short answers, and as many blocks as there are."""
    done = command(
        *("train", "--from", "mlx-grpo", "--output_dir", "./output_model", "--model_path", "./base_model"),
        *("--train_dataset_path", "./data/train.jsonl", "--val_dataset_path", "./data/valid.jsonl"),
        *("--num_training_steps", "2", "--reward_content_type", "jaccard"),
        *("--max_gen_len", "4", "--lora_layers", "1"),
    )
    assert done.code == 0, done.err
    assert "rewards  format × 0.5, jaccard × 0.5" in done.out
    assert "validation after: reward" in done.out
    config = written_config(models / "output_model")
    assert (config["algorithm"], config["group_size"], config["kl_coef"]) == ("grpo", 2, 0.15)  # its defaults
    assert (config["num_steps"], config["train_path"]) == (2, "./data/train.jsonl")
    steps = (models / "output_model/metrics.jsonl").read_text().splitlines()
    assert sum("kind" not in json.loads(line) for line in steps) == 2


def test_mlx_grpo_on_a_data_set(models: Path, command: Callable[..., Any]) -> None:
    """--dataset_name X --dataset_config main, X being a folder that ``datasets`` reads."""
    (models / "hub/main").mkdir(parents=True)
    write_rows(models / "hub/main/train.jsonl", [{"prompt": f"{n}?", "completion": "1"} for n in range(3)])
    (models / "hub/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train.jsonl\n  - split: test\n    path: main/train.jsonl\n---\n"
    )
    done = command(
        *("train", "--from", "mlx-grpo", "--dataset_name", "./hub", "--dataset_config", "main"),
        *("--model_path", "./base_model", "--lora_layers", "1", "--dry-run"),
    )
    assert done.code == 0, done.err
    assert "3 prompts of 2 tokens" in done.out


def test_mlx_rlhf_from_digits_to_ppo(models: Path, command: Callable[..., Any]) -> None:
    """generate_digit_data.py, sft.py for both of its uses, and ppo_training.py with either kind of reward."""
    small = ("--model", "./base_model", "--lora-layers", "1", "--batch-size", "4")
    assert (
        command("generate-digit-data", "--increasing", "--multiple-of", "2", "-n", "8", "--noise", "0").code
        == 0
    )
    assert sorted(path.name for path in models.glob("increasing_mult_2_*.jsonl")) == [
        f"increasing_mult_2_{split}.jsonl" for split in ("test", "train", "valid")
    ]
    sft = command(
        *("sft", "--from", "mlx-rlhf", "--train", *small, "--iters", "2", "--data", "./"),
        *("--data-base", "increasing_mult_2_", "--save-file", "sft.npz", "--output-dir", "runs/sft"),
    )
    assert sft.code == 0, sft.err
    assert "validation loss" in sft.out
    assert "save_file: the adapter is written to final/" in sft.err

    command(
        "generate-digit-data", "-i", "--multiple-of", "2", "-n", "8", "--noise", "0.3", "--folder", "noisy"
    )
    reward = command(
        *(
            "sft",
            "--from",
            "mlx-rlhf",
            "--reward_model",
            "--train",
            *small,
            "--iters",
            "2",
            "--data",
            "noisy/",
        ),
        *("--data-base", "increasing_mult_2_", "--output-dir", "runs/reward"),
    )
    assert reward.code == 0, reward.err
    assert "validation pairs in the right order" in reward.out

    ppo = (
        "train",
        "--from",
        "mlx-rlhf",
        *small,
        "--num_steps",
        "1",
        "--ppo_epochs",
        "1",
        "--max_new_tokens",
        "4",
    )
    truth = command(
        *(*ppo, "--ground_truth_reward", "--mini_batch_size", "4", "--adap_kl_ctrl", "True"),
        *("--init_kl_coef", "0.2", "--seed", "7", "--log_with", "wandb", "--output-dir", "runs/truth"),
    )
    assert truth.code == 0, truth.err
    assert "151 prompts of 1 to 3 tokens" in truth.out
    assert "trackers such as Weights & Biases are not available yet" in truth.err
    config = written_config(models / "runs/truth")
    assert (config["kl_coef"], config["kl_target"], config["seed"]) == (0.2, 6.0, 7)
    learned = command(
        *(*ppo, "--reward_model", "runs/reward/final", "--resume_file", "runs/sft/final"),
        *("--train-path", "prompts.jsonl", "--output-dir", "runs/learned"),
    )
    assert learned.code == 0, learned.err
    config = written_config(models / "runs/learned")
    assert (config["rewards"], config["adapter_path"]) == (["learned:runs/reward/final"], "runs/sft/final")


def test_soft_prompts_train_where_they_are_asked_for(models: Path, command: Callable[..., Any]) -> None:
    words = (
        "sft",
        "--from",
        "mlx-rlhf",
        "--prompt-tuning",
        "--train-path",
        "pairs.jsonl",
        "--model",
        "base_model",
    )
    result = command(*words, "--lora-layers", "1", "--dry-run")
    assert "WARNING: " not in result.err
    assert "a soft prompt of 10 vectors trains" in result.out
    assert command(*words, "--lora-layers", "1", "--dry-run", "--strict").code == 0


def test_mlx_grpo_gsm8k_with_a_toml_and_sets(models: Path, command: Callable[..., Any]) -> None:
    """python mlx-grpo.py --config configs/….toml --set key=value …, flat or under [mlx_grpo]."""
    (models / "grpo.toml").write_text(
        '[mlx_grpo]\nmodel_name = "nowhere"\nlearning_rate = 1e-6\nnum_generations = 4\nmax_new_tokens = 8\n'
        "kl_coeff = 0.01\nquantize_for_rollouts = false\n"
    )
    (models / "questions.jsonl").write_text('{"question": "1 + 1?", "answer": "2 #### 2"}\n')
    words = (
        "train",
        "--config",
        "grpo.toml",
        "--set",
        "num_generations=2",
        "--set",
        "model_name=./base_model",
    )
    done = command(*words, "--from", "mlx-grpo-gsm8k", "--train-path", "questions.jsonl", "--dry-run")
    assert done.code == 0, done.err
    assert "2 completions" in done.out
    assert "1 prompt" in done.out


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (
            "sft --from mlx-lm --model base_model --train --data data --iters 2 --batch-size 2 --num-layers 1 "
            "--learning-rate 1e-4 --adapter-path adapters --fine-tune-type lora --seed 1",
            ["2 steps of 2 rows", "4 for validation", "seed 1"],
        ),
        (
            "train --from trl --model_name_or_path base_model --train-path data/train.jsonl --reward_funcs jaccard "
            "--num_generations 4 --max_completion_length 8 --beta 0.01 --epsilon 0.2 --output_dir out",
            ["grpo on base_model", "4 completions", "jaccard × 1"],
        ),
    ],
)
def test_lines_of_trl_and_mlx_lm(
    models: Path, command: Callable[..., Any], words: str, printed: list[str]
) -> None:
    done = command(*words.split(), "--dry-run")
    assert done.code == 0, done.err
    assert all(text in done.out for text in printed), done.out


def test_installed_commands_of_mlx_rl_trainer(
    models: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """mlx-generate-config, mlx-train, mlx-preprocess, mlx-evaluate as in its document, names and flags."""
    import sys

    from command_line import program

    def installed(function: Callable[[], int], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["installed", *words])
        code = function()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    paths = ("--model-path", "embedded", "--data-path", "./data/train.jsonl")
    for template in ("minimal", "standard", "advanced"):
        code, _, err = installed(
            *(program.generate_config, *paths, "--output", f"{template}.yaml", "--template", template)
        )
        assert code == 0, err
    code, out, err = installed(program.train, "--config", "run.yaml", "--log-level", "INFO")
    assert code == 0, err
    [folder] = (models / "runs").iterdir()
    code, out, err = installed(
        *(program.preprocess, "--config", "run.yaml", "--output-train-path", "out/train.json"),
    )
    assert code == 0, err
    assert (models / "out/train.json").is_file()
    code, out, err = installed(program.preprocess, "--config", "run.yaml", "--output-train-path", "out/train")
    assert code == 0, err
    assert (models / "out/train_prompts.npy").is_file()
    (models / "gsm8k.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    evaluate = (program.evaluate, "--config", "run.yaml", "--checkpoint", str(folder))
    code, out, err = installed(*evaluate, "--benchmark", "gsm8k", "--benchmark-data", "gsm8k=gsm8k.jsonl")
    assert code == 0, err
    assert "exact_match" in out
    code, out, err = installed(*evaluate, "--benchmark", "human_eval", "gsm8k")
    assert code == 2
    assert "give --benchmark-data human_eval=FILE" in err


@pytest.mark.parametrize("name", ["mlx-rlhf", "mlx_rlhf", "MLX-RLHF"])
def test_a_system_is_the_same_however_it_is_spelled(
    models: Path, command: Callable[..., Any], name: str
) -> None:
    """Its own prompts are part of it: no data are named."""
    words = ("--model", "embedded", "--lora-layers", "1", "--ground-truth-reward", "--dry-run")
    done = command("train", "--from", name, *words)
    assert done.code == 0, done.err
    assert "data     151 prompts" in done.out
