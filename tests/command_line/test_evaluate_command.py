"""evaluate: what a checkpoint is, whose config counts, that the trained weights are the ones that are judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from command_line.checkpoints import find_checkpoint
from config.errors import CheckpointError
from tests.command_line.conftest import TINY

VAL = ("--val-path", "prompts.jsonl")


def results(workplace: Path, name: str) -> Any:
    return json.loads((workplace / "eval_outputs" / f"{name}.json").read_text())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_trained_weights_are_judged_against_those_that_training_began_with(
    workplace: Path, command: Callable[..., Any], kind: str
) -> None:
    """Two small steps leave the KL to the start at about 0; noise on what was saved does not."""
    sharp = json.dumps({**TINY, "init_std": 0.5})  # its predictions are far from uniform
    words = (
        "train",
        "--config",
        "run.yaml",
        "--embedded-model",
        sharp,
        "--fine-tune-type",
        kind,
        "--no-verbose",
    )
    assert command(*words, "--output-dir", "runs/a").code == 0
    file = workplace / "runs/a/final/adapters.safetensors"
    weights = dict(mx.load(str(file)).items())
    untouched = command("evaluate", "--checkpoint", "runs/a", *VAL)
    assert untouched.code == 0, untouched.err
    assert abs(results(workplace, "a")["validation"]["objective/kl"]) < 0.05
    keys = mx.random.split(mx.random.key(0), len(weights))
    moved_weights = {
        n: x + mx.random.normal(x.shape, key=k) for (n, x), k in zip(weights.items(), keys, strict=True)
    }
    mx.save_safetensors(str(file), moved_weights)
    moved = command("evaluate", "--checkpoint", "runs/a", *VAL)
    assert moved.code == 0, moved.err
    assert results(workplace, "a-2")["validation"]["objective/kl"] > 1
    assert results(workplace, "a-2")["checkpoint"] == "runs/a/final"


def test_flags_come_before_what_the_run_wrote_down(workplace: Path, command: Callable[..., Any]) -> None:
    """The run's own answers have 6 tokens at most, its reward is well_formed; flags say 3 and another."""
    assert command("train", "--config", "run.yaml", "--output-dir", "runs/a").code == 0
    assert command("evaluate", "--checkpoint", "runs/a", *VAL, "--output-dir", "own").code == 0
    own = json.loads((workplace / "own/a.json").read_text())["validation"]
    assert own["completions/max_length"] == 6
    assert "rewards/well_formed/mean" in own
    words = (
        "evaluate",
        "--checkpoint",
        "runs/a",
        *VAL,
        "--max-new-tokens",
        "3",
        "--reward",
        "sequential_digits",
    )
    assert command(*words, "--output-dir", "own").code == 0
    given = json.loads((workplace / "own/a-2.json").read_text())["validation"]
    assert given["completions/max_length"] == 3
    assert "rewards/sequential_digits/mean" in given


def test_a_reward_that_was_a_function_is_asked_for(workplace: Path, command: Callable[..., Any]) -> None:
    """A run from Python writes down the function's name, which nobody can find again."""
    assert command("train", "--config", "run.yaml", "--output-dir", "runs/a").code == 0
    for file in workplace.glob("runs/a/**/*config.json"):
        content = json.loads(file.read_text())
        if "rewards" in content:
            content["rewards"], content["config"]["rewards"] = {"my_reward": 1.0}, None
            file.write_text(json.dumps(content))
    refused = command("evaluate", "--checkpoint", "runs/a", *VAL)
    assert refused.code == 2
    assert "give it with --reward FILE.py:NAME" in refused.err


def test_a_whole_model_is_a_checkpoint(workplace: Path, command: Callable[..., Any]) -> None:
    words = ("sft", "--config", "run.yaml", "--train-path", "pairs.jsonl", "--fine-tune-type", "full")
    trained = command(*words, "--num-steps", "1", "--output-dir", "runs/sft")
    assert trained.code == 0, trained.err
    assert "use it: --model-name runs/sft/model" in trained.out
    judged = command("evaluate", "--checkpoint", "runs/sft", *VAL, "--max-new-tokens", "4")
    assert judged.code == 0, judged.err
    assert results(workplace, "sft")["checkpoint"] == "runs/sft/model"
    assert "objective/kl" not in results(workplace, "sft")["validation"]  # from where is not known


def test_an_adapter_goes_on_where_its_stage_says(workplace: Path, command: Callable[..., Any]) -> None:
    """What sft prints as its use is what train takes."""
    trained = command(
        *(
            "sft",
            "--config",
            "run.yaml",
            "--train-path",
            "pairs.jsonl",
            "--num-steps",
            "1",
            "--output-dir",
            "runs/sft",
        )
    )
    assert trained.code == 0, trained.err
    use = trained.out.split("use it: ")[1].split()
    assert use == ["--model-name", "runs/sft/final/base", "--adapter-path", "runs/sft/final"]
    again = command("train", "--config", "run.yaml", *use, "--output-dir", "runs/a")
    assert again.code == 0, again.err
    assert command("evaluate", "--checkpoint", "runs/a", *VAL).code == 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--checkpoint", "nowhere"], 1, '--checkpoint: there is no folder "nowhere"'),
        (["--checkpoint", "."], 1, "holds neither a run"),
        ([], 2, "--checkpoint"),
        (["--checkpoint", "runs/a"], 2, "val_path: no validation prompts are named"),
        (["--checkpoint", "runs/a", "--val-path", "nope.jsonl"], 1, "nope.jsonl"),
        (["--checkpoint", "runs/a", "--benchmark", "gsm9k"], 2, 'did you mean "gsm8k"?'),
        (
            ["--checkpoint", "runs/a", *VAL, "--output-dir", "pairs.jsonl"],
            1,
            '--output-dir: "pairs.jsonl" cannot',
        ),
    ],
)
def test_what_cannot_be_judged_gets_a_sentence(
    workplace: Path, command: Callable[..., Any], words: list[str], code: int, sentence: str
) -> None:
    folder = workplace / "runs/a/final"
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"x": mx.zeros(1)})
    (folder / "adapter_config.json").write_text("{}")
    (folder / "ppo_config.json").write_text(
        json.dumps(
            {"config": {"model_name": "embedded", "embedded_model": TINY, "group_size": 1}, "rewards": {}}
        )
    )
    done = command("evaluate", *words)
    assert (done.code, done.out) == (code, ""), done.err
    assert sentence in done.err


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final/adapters.safetensors").write_bytes(b"")
    (tmp_path / "final/adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        find_checkpoint(str(tmp_path))


def test_every_validation_row_is_judged_however_few_were_trained_on(
    workplace: Path, command: Callable[..., Any]
) -> None:
    words = ("train", "--config", "run.yaml", "--rewards", "well_formed,sequential_digits")
    trained = command(*words, "--reward-weights", "1,0.5", "--max-samples", "2", "--output-dir", "runs/a")
    assert trained.code == 0, trained.err
    done = command("evaluate", "--checkpoint", "runs/a", *VAL)
    assert done.code == 0, done.err
    assert len(results(workplace, "a")["validation"]["samples"]) == 6
    done = command("evaluate", "--checkpoint", "runs/a", *VAL, "--reward", "well_formed")
    assert done.code == 0, done.err  # the run's two weights are not asked of one reward
