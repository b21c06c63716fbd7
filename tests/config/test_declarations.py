"""The declarations and what is made from them: sections, ranges, the reference, and a reader for every field."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from config.model_config import ModelConfig
from config.options import options_of, sections_of
from config.ppo_config import PPOConfig
from config.reference import reference
from config.supervised_config import PreferenceConfig, ProcessRewardConfig, RewardModelConfig, SFTConfig

ROOT = Path(__file__).parents[2]
STAGES = (PPOConfig, SFTConfig, RewardModelConfig, ProcessRewardConfig, PreferenceConfig)


def test_the_reference_is_what_the_declarations_say() -> None:
    found = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert found == reference(), "write it anew: ./run python -m config.reference > docs/configuration.md"
    for cls in (*STAGES, ModelConfig):
        for option in options_of(cls).values():
            assert f"| `{option.name}` | " in found
            assert option.meaning.replace("|", "\\|") in found


def test_options_are_read_with_their_types() -> None:
    options = options_of(PPOConfig)
    assert options["gamma"].values == "number ≥ 0, ≤ 1"
    assert options["batch_size"].values == "integer > 0"
    assert options["seed"].values == "integer ≥ 0"
    assert options["lora_layers"].values == "integer ≥ 1, or -1"
    assert options["max_grad_norm"].values == "number > 0, or none"
    assert options["lr_schedule"].values == "constant | linear | cosine"
    assert options["optimizer_bits"].choices == (32, 8)
    assert options["verbose"].is_switch
    assert options["logit_bias"].is_nested
    assert options["embedded_model"].is_nested
    assert options["rewards"].values == "list, or none"
    assert options["kl_placement"].shown(None) == "unset"
    assert options["learning_rate"].owner == "TrainingConfig"
    assert set(options) == set(PPOConfig.__dataclass_fields__)


@pytest.mark.parametrize("cls", STAGES)
def test_every_option_has_a_section_and_no_heading_is_a_field(cls: Any) -> None:
    sections = sections_of(cls)
    assert not set(sections) & {name for stage in STAGES for name in options_of(stage)}
    assert [option.name for options in sections.values() for option in options] == list(options_of(cls))
    assert all(len(options) < 30 for options in sections.values())
    assert sections_of(PPOConfig)["kl"][0].name == "kl_coef"


# Readers -------------------------------------------------------------------------------------------------


def _attributes_read(folder: str, *, of: tuple[str, ...]) -> set[str]:
    """Names read off something that is called like a config; and names given to getattr in a table beside it."""
    names = set()
    for path in (ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else [ROOT / folder]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                called = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if called in of:
                    names.add(node.attr)
    return names


def test_something_reads_every_field() -> None:
    packages = (
        "base_setup", "checkpointing", "command_line", "data_loading", "experience_buffer", "main.py", "models",
        "monitoring", "ppo_trainer", "rewards", "token_attribution", "training",
    )  # fmt: skip
    read: set[str] = set()
    for package in packages:
        if (ROOT / package).exists():
            read |= _attributes_read(package, of=("config", "options", "_config", "shared"))
    # Properties of the config stand for the fields that they are made of.
    files = [ROOT / "config" / name for name in ("ppo_config.py", "training_config.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if isinstance(node, ast.FunctionDef) and node.name in read:
            inner = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            read |= inner | {
                n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
    unread = {name for cls in STAGES for name in options_of(cls) if name not in read}
    assert unread == set(), f"no code reads {sorted(unread)}"
