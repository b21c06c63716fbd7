"""Generated files: they say what they were asked for, load, resolve, and train as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.errors import InvalidConfigurationError
from config.loader import load_config
from config.options import options_of
from config.ppo_config import PPOConfig
from config.template import TEMPLATES, generate_config
from ppo_trainer.algorithms import find_algorithm
from ppo_trainer.ppo_trainer import PPOTrainer
from ppo_trainer.resolution import resolve_config


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_generated_file_loads_as_what_was_asked_for(tmp_path: Path, template: str, suffix: str) -> None:
    path, model = tmp_path / f"run{suffix}", 'a "model" \\ with: # signs é'
    rewards = ["jaccard", {"name": "format", "weight": 0.5, "config": {"tags": "think"}}]
    text = generate_config(model, "rows.jsonl", template, val_path="v.jsonl", rewards=rewards, suffix=suffix)
    path.write_text(text, encoding="utf-8")
    loaded = load_config(PPOConfig, files=path, environ={})
    assert loaded.notes == []
    asked = {"model_name": model, "train_path": "rows.jsonl", "val_path": "v.jsonl", "rewards": rewards}
    expected = {**TEMPLATES[template], **asked}
    found = {n: getattr(loaded.config, n) for n, origin in loaded.origins.items() if origin.kind == "file"}
    assert found == expected
    resolve_config(loaded.config, find_algorithm(loaded.config.algorithm))


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
def test_the_advanced_one_shows_every_option_and_each_may_be_uncommented(tmp_path: Path, suffix: str) -> None:
    text = generate_config("embedded", "rows.jsonl", "advanced", suffix=suffix)
    sign = "=" if suffix == ".toml" else ":"
    path = tmp_path / f"one{suffix}"
    for name in options_of(PPOConfig):
        lines = [line.strip().lstrip("# ") for line in text.splitlines()]
        (line,) = [
            line
            for line in lines
            if line.startswith((f"{name} {sign} ".replace(" :", ":"), f"{name}{sign} "))
        ]
        path.write_text(line + "\n", encoding="utf-8")
        load_config(PPOConfig, files=path, environ={})


def test_the_minimal_one_trains(tmp_path: Path) -> None:
    rows, path = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    prompts = ["Say one", "Say two", "Say three"]
    rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    path.write_text(generate_config("embedded", str(rows), "minimal"), encoding="utf-8")
    overrides = ["num_steps=2", "max_new_tokens=8", f"output_dir={tmp_path / 'run'}", "verbose=false"]
    loaded = load_config(PPOConfig, files=path, environ={}, overrides=overrides)
    trainer = PPOTrainer(loaded.config)
    trainer.train(prompts)
    assert trainer.step == 2
    assert (tmp_path / "run" / "final" / "adapters.safetensors").is_file()


def test_bad_requests_are_refused() -> None:
    for arguments, sentence in [
        (("m", "d", "minimol"), 'there is no "minimol"; did you mean "minimal"'),
        (("", "d", "minimal"), "model_name: a path or a name is expected"),
    ]:
        with pytest.raises(InvalidConfigurationError, match=sentence):
            generate_config(*arguments)
    with pytest.raises(InvalidConfigurationError, match=r"the name ends in '\.txt'"):
        generate_config("m", "d", suffix=".txt")
