"""The digit walk-through: its commands are the document's, its tables add up, its fresh process is a fresh one."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import main
from benchmarks.digits_commands import MODES, REWARDS, beginning, ppo, steps
from benchmarks.digits_walkthrough import (
    ABLATIONS,
    agreement,
    fresh_answers,
    once,
    run_beginning,
    run_mode,
    scores_of,
    spread,
    table,
)
from command_line.commands import COMMANDS
from config.loader import load_config
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import SFTConfig
from data_loading.loading import load_preferences
from examples.digits_stages import ANSWERS, SCORED, stage_rows, write_stages
from models.policy_model import PolicyModel
from models.sft_model import build_embedded, load_language_model, save_language_model
from rewards.sequential_digits import digit_score
from tools.fusing import fuse

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelConfig(hidden_size=16, num_attention_heads=2, num_layers=1, intermediate_size=32, init_std=0.5)


def commands_of_document() -> list[str]:
    text = (ROOT / "docs/digits.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^python main\.py (.*)$", text, re.MULTILINE)
    return [" ".join(line.split()) for line in found]


def test_the_document_has_every_command_of_the_walk_through() -> None:
    expected = [step.command for step in beginning()]
    for mode in MODES:
        expected += [step.command for step in steps(mode)]
    documented = commands_of_document()
    assert [command for command in expected if command not in documented] == []


def test_every_command_of_the_document_parses_and_its_config_holds() -> None:
    for line in commands_of_document():
        name, *words = shlex.split(line)
        COMMANDS[name].parser().parse_args(words)
    for name, config in (("base", SFTConfig), ("sft", SFTConfig), ("ppo", PPOConfig)):
        load_config(config, files=[str(ROOT / f"examples/digits/{name}.toml")], environ={})
    for flags in ABLATIONS.values():
        COMMANDS["train"].parser().parse_args(shlex.split(f"{ppo('full', 'true').command} {flags}")[1:])


def test_files_of_the_stages_are_what_each_stage_needs(tmp_path: Path) -> None:
    rows = stage_rows(3)
    prompts, held_out = (
        [row["prompt"] for row in rows[name]] for name in ("prompts.jsonl", "held_out.jsonl")
    )
    assert not set(prompts) & set(held_out)
    assert (len(prompts), len(held_out), len(set(held_out))) == (100, 51 * ANSWERS, 51)
    words = {"even": 0, "odd": 1}
    for row in rows["base.jsonl"]:
        *word, first = row["prompt"].split()
        numbers = [int(number) for number in (first + row["completion"]).split()]
        assert all(one < other for one, other in pairwise(numbers))
        if word:
            assert {number % 2 for number in numbers} == {words[word[0]]}
    asked = [row["prompt"].split()[0] for row in rows["base.jsonl"] if " " in row["prompt"]]
    assert asked.count("even") == asked.count("odd") == len(rows["base.jsonl"]) // 4
    shown = [digit_score(row["prompt"], row["completion"]) for row in rows["sft.jsonl"]]
    assert 0.3 < sum(shown) / len(shown) < 0.6  # demonstrations are neither right nor useless
    for name in ("preferences.jsonl", "pairs_held_out.jsonl"):
        assert all(
            float(row["reward"]) == digit_score(row["prompt"], row["completion"]) for row in rows[name]
        )
        assert any(row["completion"] == "" for row in rows[name])  # a policy will find them, too
    paths = write_stages(tmp_path / "a", 3)
    assert {name: len(path.read_text().splitlines()) for name, path in paths.items()} == {
        name: len(some) for name, some in rows.items()
    }
    assert len(load_preferences(paths["preferences.jsonl"])) == SCORED
    assert write_stages(tmp_path / "b", 3)["sft.jsonl"].read_bytes() == paths["sft.jsonl"].read_bytes()


def test_the_command_writes_them_and_refuses_flags_it_would_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["generate-digit-data", "--stages", "--folder", str(tmp_path / "data")]) == 0
    assert "held_out.jsonl" in capsys.readouterr().out
    assert main.main(["generate-digit-data", "--stages", "--noise", "0"]) == 2
    assert "--noise: --stages draws its files" in capsys.readouterr().err


def test_results_are_kept_and_half_results_are_not(tmp_path: Path) -> None:
    folder, times = tmp_path / "run", []

    def work() -> dict[str, Any]:
        times.append((folder / "half").exists())
        folder.mkdir()
        return {"n": len(times)}

    folder.mkdir()
    (folder / "half").touch()
    assert [once(folder, work), once(folder, work)] == [{"n": 1}, {"n": 1}]
    assert times == [False]


def test_a_table_by_hand() -> None:
    assert spread([0.5, 0.75, 1.0]) == "0.75 ± 0.25 (0.50–1.00)"  # deviations −¼, 0, ¼: √(2/16 / 2)
    assert spread([2.0], 1) == "2.0 ± 0.0 (2.0–2.0)"
    results = [
        {
            "mode": "lora",
            "seed": seed,
            "reward_model": 0.9,
            "seconds": {"a": 1.0, "b": 2.0 + seed},
            "scores": {
                "sft": {"score": 0.5},
                **{r: {"score": s, "kl": 4.0} for r, s in (("true", 1 - seed / 2), ("learned", 0.75))},
            },
            "same_tokens": {reward: {"a way": f"{51 - seed} of 51"} for reward in REWARDS},
        }
        for seed in (0, 1)
    ]
    rows = table(results).splitlines()
    assert rows[2].startswith(
        "| LoRA | 0.50 ± 0.00 (0.50–0.50) | 0.90 ± 0.00 (0.90–0.90) | true score | **0.75** ± 0.35 (0.50–1.00) | 4.0"
    )
    assert rows[3].endswith(
        "| learned reward model | **0.75** ± 0.00 (0.75–0.75) | 4.0 ± 0.0 (4.0–4.0) | 4 |"
    )
    assert agreement(results).splitlines() == [
        f"seed 1, lora, {reward}, a way: 50 of 51" for reward in REWARDS
    ]
    assert agreement(results[:1]).startswith("1 runs: in fresh processes all answers")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "soft"])
def test_a_fresh_process_says_the_same_or_is_found_out(mode: str, tmp_path: Path) -> None:
    """An adapter that moves the likeliest answers, loaded as the document says; then another answer in the file."""
    start = tmp_path / {"lora": "lora/model", "soft": "base/model"}[mode]
    save_language_model(build_embedded(TINY, 0), start)
    kind = "soft_prompt" if mode == "soft" else "lora"
    config = PPOConfig(model_name=str(start), fine_tune_type=kind, lora_r=2, seed=1)
    policy = PolicyModel(load_language_model(config), config)
    import mlx.core as mx
    from mlx.utils import tree_map

    policy.model.update(
        tree_map(
            lambda x: x + 0.3 * mx.random.normal(x.shape, key=mx.random.key(5)),
            policy.model.trainable_parameters(),
        )
    )
    run = tmp_path / mode / "true"
    policy.save(run / "final")
    if mode == "lora":
        fuse(str(start), str(run), run / "fused")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "8"}\n{"prompt": "192"}\n')
    words = f"--model {start} --adapter-path {run} --prompts {tmp_path}/prompts.jsonl --temperature 0 --max-tokens 32"
    assert main.main(["generate", *words.split(), "--output", str(run / "answers.jsonl")]) == 0
    said = fresh_answers(mode, "true", tmp_path)
    assert set(said.values()) == {"2 of 2"}
    assert len(said) == (1 if mode == "soft" else 2)
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    plain = main.main(
        [
            "generate",
            *words.replace(f"--adapter-path {run}", "").split(),
            "--output",
            str(tmp_path / "base.jsonl"),
        ]
    )
    assert plain == 0
    assert (tmp_path / "base.jsonl").read_text() != (run / "answers.jsonl").read_text()  # the adapter counts
    rows[1]["tokens"] += 1
    (run / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(fresh_answers(mode, "true", tmp_path).values()) == {"1 of 2"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_seed_of_each_mode_reaches_its_scores(mode: str, tmp_path: Path) -> None:
    run_beginning(tmp_path, 0)
    found = run_mode(mode, tmp_path, 0)
    before = found["scores"]["sft"]["score"]
    assert found["scores"]["true"]["score"] > max(0.8, before)
    assert found["scores"]["learned"]["score"] > max(0.7, before)
    assert agreement([found]).startswith("1 runs")
    assert scores_of(tmp_path / mode / "scores/true.json") == found["scores"]["true"]
