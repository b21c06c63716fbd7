"""``sft``, ``reward-model`` and ``preference`` as typed: what they write, what they say, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitoring.metrics_file import read_metrics
from tests.command_line.conftest import TINY, write_rows

ROOT = Path(__file__).parents[2]
MODEL = ("--model-name", "embedded", "--embedded-model", json.dumps(TINY), "--learning-rate", "1e-2")
SHORT = ("--num-steps", "3", "--batch-size", "4")


@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "simpo", "orpo", "kto", "cpo"])
def test_preference_writes_an_adapter_that_train_and_mlx_lm_load(
    algorithm: str, workplace: Path, command: Callable[..., Any]
) -> None:
    words = ("--train-path", "preferences.jsonl", "--validation-fraction", "0.3", "--output-dir", "run")
    done = command("preference", *MODEL, *SHORT, *words, "--algorithm", algorithm, "--eval-every", "2")
    assert done.code == 0, done.err
    assert "validation loss" in done.out
    assert "of the rows in the right order" in done.out
    lines = read_metrics(workplace / "run" / "metrics.jsonl")
    assert ["validation/loss" in line for line in lines] == [False, True, True]
    assert json.loads((workplace / "run" / "config.json").read_text())["stage"] == "preference"
    if algorithm != "dpo":
        return
    import mlx_lm

    folder = workplace / "run" / "final"
    model, _ = mlx_lm.load(str(folder / "base"), adapter_path=str(folder))[:2]
    assert model is not None
    more = command(
        "train", "--config", "run.yaml", "--model-name", "run/final/base", "--adapter-path", "run/final"
    )
    assert more.code == 0, more.err


def test_a_reward_model_is_reported_on_and_scores_in_a_fresh_process(
    workplace: Path, command: Callable[..., Any]
) -> None:
    words = ("--train-path", "preferences.jsonl", "--validation-fraction", "0.3", "--output-dir", "run")
    done = command("reward-model", *MODEL, *SHORT, *words)
    assert done.code == 0, done.err
    report = json.loads((workplace / "run" / "reward_report.json").read_text())
    assert report["comparisons"] >= 3
    assert sum(report["histogram_counts"]) == report["comparisons"]
    assert f"in the right order: {report['accuracy']:.1%}" in done.out
    assert "calibration error" in (workplace / "run" / "reward_report.txt").read_text()
    code = (
        "import sys\nfrom config.ppo_config import PPOConfig\nfrom models.reward_model import RewardModel\n"
        "from ppo_trainer.ppo_trainer import PPOTrainer\n"
        "model = RewardModel.load('run/final')\nprint(model(['10 ', '12 '], ['12', 'x']))\n"
        f"common = dict(model_name='embedded', embedded_model={TINY!r}, max_new_tokens=4, verbose=False, "
        "batch_size=2, num_steps=1, log_samples_every=0)\n"
        "for i, how in enumerate(({'reward_model': 'run/final'}, {'reward_model': {'learned:run/final': 1}})):\n"
        "    config = PPOConfig(**common, output_dir=f'rl{i}')\n"
        "    trainer = PPOTrainer(config, **how)\n"
        "    print(trainer.train([{'prompt': '10 '}, {'prompt': '12 '}])['reward'])\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workplace,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert fresh.returncode == 0, fresh.stderr
    scores, *rewards = fresh.stdout.strip().splitlines()[-3:]
    from models.reward_model import RewardModel

    here = RewardModel.load(workplace / "run" / "final")(["10 ", "12 "], ["12", "x"])
    assert json.loads(scores) == pytest.approx(here, abs=1e-5)
    assert float(rewards[0]) == pytest.approx(float(rewards[1]), abs=1e-5)


STEPS = [
    {"prompt": f"q{n}", "completions": ["ab", "cz" if n % 3 else "cd"], "labels": [True, n % 3 == 0]}
    for n in range(12)
]


def test_steps_with_labels_become_a_process_reward_that_scores_in_a_fresh_process(
    workplace: Path, command: Callable[..., Any]
) -> None:
    write_rows(workplace / "steps.jsonl", STEPS)
    words = ("--train-path", "steps.jsonl", "--validation-fraction", "0.3", "--output-dir", "run")
    done = command("reward-model", *MODEL, *SHORT, *words, "--step-reward", "product")
    assert done.code == 0, done.err
    assert "of the steps judged rightly" in done.out
    assert "a process reward model; an answer scores the product of its steps" in done.out
    said = json.loads((workplace / "run" / "final" / "reward_config.json").read_text())
    assert (said["kind"], said["separator"], said["step_reward"]) == ("process_reward_model", "\n", "product")
    code = (
        "from config.ppo_config import PPOConfig\nfrom models.process_reward_model import ProcessRewardModel\n"
        "from ppo_trainer.ppo_trainer import PPOTrainer\n"
        "print(ProcessRewardModel.load('run/final').step_scores(['q1'], [['ab', 'cz']])[0])\n"
        f"config = PPOConfig(model_name='embedded', embedded_model={TINY!r}, verbose=False)\n"
        "for how in ('run/final', {'learned:run/final': 1}):\n"
        "    print(PPOTrainer(config, reward_model=how).rewards.score(['q1'], ['ab\\ncz']).total[0])\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workplace,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert fresh.returncode == 0, fresh.stderr
    steps, *rewards = fresh.stdout.strip().splitlines()[-3:]
    first, second = json.loads(steps)
    assert [float(reward) for reward in rewards] == pytest.approx([first * second] * 2, abs=1e-5)


def test_ranked_lists_are_compared_whole_and_parameters_are_counted(
    workplace: Path, command: Callable[..., Any]
) -> None:
    rows = [{"prompt": f"{n} ", "completions": [f"{n + 2}", f"{n}", "x"]} for n in range(10, 22)]
    write_rows(workplace / "ranked.jsonl", rows)
    words = ("--train-path", "ranked.jsonl", "--validation-fraction", "0.3", "--output-dir")
    done = command("reward-model", *MODEL, *SHORT, *words, "run")
    assert done.code == 0, done.err
    # One block: rank 16 on its seven matrices (16·16, 8·16 twice, 16·16; 16·32 three times), the head 16 + 1.
    trained = 16 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32)) + 17
    assert f"{trained:,} of " in done.out
    report = json.loads((workplace / "run" / "reward_report.json").read_text())
    assert report["comparisons"] == report["answers"]  # lists of three are three comparisons
    done = command("preference", *MODEL, *SHORT, *words, "dpo")
    assert done.code == 0, done.err
    assert f"{trained - 17:,} of " in done.out


def test_sft_packs_stops_early_and_says_its_perplexity(workplace: Path, command: Callable[..., Any]) -> None:
    words = ("--train-path", "pairs.jsonl", "--validation-fraction", "0.3", "--output-dir", "run")
    stopping = (
        "--eval-every",
        "1",
        "--early-stopping-patience",
        "2",
        "--num-steps",
        "40",
        "--batch-size",
        "8",
    )
    done = command("sft", *MODEL, *words, *stopping, "--packing", "--loss-on", "text", "--lora-dropout", "0")
    assert done.code == 0, done.err
    lines = read_metrics(workplace / "run" / "metrics.jsonl")
    best = min(lines, key=lambda line: line["validation/loss"])
    assert len(lines) == 40 or len(lines) == best["step"] + 2
    assert f"validation loss {best['validation/loss']:.4f} nats per token, perplexity" in done.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sft", "--early-stopping-patience", "2", "--eval-every", "1"), "there are no validation rows"),
        (("sft", "--early-stopping-patience", "2"), "eval_every = 0 makes one at the end alone"),
        (("preference", "--algorithm", "ppo"), "algorithm"),
        (("preference", "--algorithm", "cpo", "--target-margin", "1"), "cpo has no use for it"),
        (("preference", "--algorithm", "ipo", "--train-path", "scored.jsonl"), "scored.jsonl:1: ipo learns"),
        (("preference", "--algorithm", "kto", "--train-path", "scored.jsonl"), "scored.jsonl: kto measures"),
        (("reward-model", "--train-path", "scored.jsonl"), "scored.jsonl: the reward of all 3 answers is 1"),
        (
            ("reward-model", "--train-path", "steps.jsonl", "--pairing", "random"),
            "pairing: steps.jsonl has steps",
        ),
        (("reward-model", "--train-path", "steps.jsonl"), "steps.jsonl:2: step 1 has step_separator"),
        (("reward-model", "--step-reward", "mean"), "step_reward: preferences.jsonl has whole answers"),
        (("preference", "--train-path", "steps.jsonl"), "found stepwise supervision"),
        (("preference", "--val-path", "long.jsonl"), "long.jsonl:1: 2004 tokens"),
        (("sft", "--packing", "--soft-prompt-tokens", "3"), "packing: a soft prompt stands"),
        (("sft", "--loss-on", "assistant", "--train-path", "chat.jsonl"), "chat.jsonl:1: loss_on"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_before_a_weight_is_loaded(
    words: tuple[str, ...],
    sentence: str,
    workplace: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import models.sft_model

    monkeypatch.setattr(models.sft_model, "load_language_model", lambda config: pytest.fail("loaded"))
    write_rows(workplace / "scored.jsonl", [{"prompt": "a", "completion": "b", "reward": "1.0"}] * 3)
    write_rows(workplace / "steps.jsonl", [STEPS[0], {"prompt": "q", "completions": ["a\nb"], "labels": [1]}])
    write_rows(workplace / "long.jsonl", [{"prompt": "ab ", "chosen": "b" * 2000, "rejected": "c"}])
    turns = [{"role": role, "content": "x"} for role in ("assistant", "user", "assistant")]
    write_rows(workplace / "chat.jsonl", [{"messages": turns}])
    path = "pairs.jsonl" if words[0] == "sft" else "preferences.jsonl"
    done = command(words[0], *MODEL, *SHORT, "--train-path", path, *words[1:])
    assert done.code in (1, 2)
    assert sentence in done.err
    assert not (workplace / "runs").exists()
