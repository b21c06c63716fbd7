"""The command of the README: what it prints, what it leaves, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest

from examples.digits_stages import imitation_rows, scored_rows
from examples.sequential_digits import FAST, Demo, improved
from models.reward_model import RewardModel
from monitoring.console import StageConsole
from monitoring.metrics_file import read_metrics
from rewards.sequential_digits import digit_score

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, command("--fast", "--seed", "3", "--output", str(folder))


def test_the_fast_demo_ends_well_and_shows_every_stage(
    fast: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, finished = fast
    assert finished.returncode in (0, 1), finished.stderr  # 1: it ran, but learned too little in its seconds
    for part in (
        "Model",
        "SFT",
        "Reward model",
        "PPO",
        "GRPO",
        "Held-out prompts",
        "true score",
        str(folder),
    ):
        assert part in finished.stdout
    assert "Traceback" not in finished.stderr


def test_the_demo_leaves_what_it_says(fast: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = fast
    results = json.loads((folder / "results.json").read_text())
    assert results["seed"] == 3
    assert results["sft"]["kl"] == 0.0
    assert set(results) >= {"base", "sft", "ppo", "grpo", "reward_model_accuracy", "seconds"}
    assert (folder / "training.png").read_bytes()[:4] == b"\x89PNG"
    for algorithm in ("ppo", "grpo"):
        lines = read_metrics(folder / algorithm / "metrics.jsonl")
        assert [line["step"] for line in lines if "kind" not in line] == list(range(1, 8))
        assert lines[0]["objective/kl"] == 0.0  # before the first update the policy is the SFT model
        assert json.loads((folder / algorithm / "config.json").read_text())["config"]["seed"] == 3
        mlx_lm.load(str(folder / "sft" / "model"), adapter_path=str(folder / algorithm / "final"))
    rows = scored_rows(50, 7)
    scores = RewardModel.load(folder / "reward_model").score_texts(
        [r["prompt"] for r in rows], [r["completion"] for r in rows]
    )
    assert len(set(scores)) > 40


def test_help_is_there_without_mlx() -> None:
    code = "import sys, main; main.build_parser().format_help(); print(any(m.startswith('mlx') for m in sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--fats"], 2, "unrecognized arguments: --fats"),
        (["--seed", "-1"], 2, "argument --seed"),
        (["--seed", "x"], 2, "a whole number from 0 up is expected, found 'x'"),
        (["--output", "{tmp}/file/run"], 1, 'error: --output: "{tmp}/file/run" cannot be used'),
        (["--output", "{tmp}"], 1, 'error: --output: "{tmp}" is not empty'),
    ],
)
def test_bad_usage_gets_its_sentence(tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    (tmp_path / "file").write_text("in the way")
    finished = command(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert finished.returncode == code
    assert sentence.format(tmp=tmp_path) in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_demo_fails_when_nothing_improved() -> None:
    assert improved({"ppo_reward": [0.1, 0.2], "grpo_reward": [0.1, 0.2]})
    assert not improved({"ppo_reward": [0.2, 0.2], "grpo_reward": [0.1, 0.2]})


def test_the_data_are_what_the_stages_need() -> None:
    imitation = imitation_rows(300, 0)
    assert max(int(row["prompt"]) for row in imitation) > 250  # prompts go up to 300
    assert {digit_score(r["prompt"], r["completion"], multiple=1) for r in imitation} == {1.0}
    scored = scored_rows(300, 0)
    assert all(float(r["reward"]) == digit_score(r["prompt"], r["completion"]) for r in scored)
    assert len({r["reward"] for r in scored}) > 5


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "new", seed=2, scale=FAST, console=StageConsole())
    assert not set(demo.prompts) & set(demo.held_out)
    assert (len(demo.prompts), len(set(demo.held_out))) == (100, 51)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_demo_reaches_its_scores(tmp_path: Path, seed: int) -> None:
    results = Demo(tmp_path / "run", seed=seed, console=StageConsole()).run()
    assert results["sft"]["score"] < 0.6
    assert results["ppo"]["score"] >= 0.8
    assert results["grpo"]["score"] >= 0.9
