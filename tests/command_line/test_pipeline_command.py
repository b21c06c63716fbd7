"""One file from nothing to a fused model; what is done already is not done again, what has changed is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from tools.loading import load_for_use
from tools.stage_folders import contents, inputs_hash, is_complete, set_aside, stamp


def headings(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("── ")]


def test_all_stages_then_none_then_those_that_changed(workplace: Path, command: Callable[..., Any]) -> None:
    done = command("pipeline", "--config", "pipeline.toml")
    assert done.code == 0, done.err
    stages = ["sft", "reward_model", "train", "evaluate", "fuse"]
    assert headings(done.out) == [f"── {n}/5 {name}" for n, name in enumerate(stages, 1)]
    assert "rewards  reward_model × 1" in done.out
    ids = mx.array([[9, 8, 7]])
    fused, _ = mlx_lm.load("out/fuse")
    trained = load_for_use("out/sft/final/base", "out/train").model
    assert mx.allclose(fused(ids), trained(ids), atol=1e-4)
    assert not mx.allclose(fused(ids), load_for_use("out/sft/final/base", "out/sft").model(ids), atol=1e-4)

    again = command("pipeline", "--config", "pipeline.toml")
    assert all("done already" in line for line in headings(again.out))
    assert len(headings(again.out)) == 5

    text = (workplace / "pipeline.toml").read_text()
    (workplace / "pipeline.toml").write_text(text.replace('algorithm = "grpo"', 'algorithm = "rloo"'))
    changed = headings(command("pipeline", "--config", "pipeline.toml").out)
    assert ["done already" in line for line in changed] == [True, True, False, False, False]
    assert "what was in out/train is in out/train-old-1 now" in changed[2]

    (workplace / "out/fuse/model.safetensors").unlink()
    repaired = headings(command("pipeline", "--config", "pipeline.toml").out)
    assert ["done already" in line for line in repaired] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("line", "by", "sentence"),
    [
        (
            "group_size = 2",
            "group_syze = 2",
            'pipeline.toml:17: [train] group_syze: PPOConfig has no field "group_syze"',
        ),
        (
            "learning_rate = 1e-2\n[reward",
            "learning_rate = -1\n[reward",
            "pipeline.toml:10: [sft] learning_rate",
        ),
        ('output_dir = "out"', "", "[pipeline] has no output_dir"),
        ("[fuse]", "[fuze]\nx = 1", "x stands under [fuze], and one of [pipeline], [sft]"),
        ("[fuse]", "[fuse]\nbits = 4", "[fuse] has no bits"),
        ('train_path = "prompts.jsonl"', 'output_dir = "x"', "output_dir is the pipeline's own"),
        ("[fuse]", 'limit = "all"\n[fuse]', "pipeline.toml:24: [evaluate] limit: a whole number is expected"),
        ("[fuse]", 'benchmark = "gsm9k"\n[fuse]', "perplexity is expected, found 'gsm9k'"),
        ("[fuse]", 'benchmark = "gsm8k"\n[fuse]', "[evaluate] --benchmark gsm8k: its rows are read from"),
        ("[fuse]", '[fuse]\nde_quantize = "yes"', "[fuse] de_quantize: true or false is expected"),
        (
            "[fuse]",
            "[fuse]\nexport_gguf = true",
            "pipeline.toml:25: [fuse] --export-gguf: mlx-lm writes GGUF for",
        ),
        (
            '"prompts.jsonl"',
            '"prompt.jsonl"',
            '[train] train_path: there is no file or folder "prompt.jsonl"',
        ),
        ("[train]", "[train]\nsoft_prompt_tokens = 2", "[fuse] [train] trains a soft prompt"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(
    workplace: Path, command: Callable[..., Any], line: str, by: str, sentence: str
) -> None:
    text = (workplace / "pipeline.toml").read_text()
    assert line in text
    (workplace / "pipeline.toml").write_text(text.replace(line, by, 1))
    done = command("pipeline", "--config", "pipeline.toml")
    assert done.code == 2
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not (workplace / "out").exists()


def test_a_stamp_is_of_inputs_and_of_every_output(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "a").write_text("1")
    key = inputs_hash({"lr": 1.0, "data": contents(folder / "a")})
    assert not is_complete(folder, key)
    stamp(folder, key)
    assert is_complete(folder, key)
    assert not is_complete(folder, inputs_hash({"lr": 2.0, "data": contents(folder / "a")}))
    (folder / "a").write_text("2")
    assert not is_complete(folder, key)
    (folder / "stage.json").write_text(json.dumps([1]))
    assert not is_complete(folder, key)
    assert set_aside(folder) == tmp_path / "stage-old-1"
    assert set_aside(folder) is None
