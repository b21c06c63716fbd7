"""What does not fit a model is said from its config.json: the folders here hold no weights at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import main
from base_setup.adapter_files import SHOWN
from base_setup.parameters import named_arrays
from command_line.checks import check_model
from config.errors import CheckpointError, InvalidConfigurationError
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, save_language_model
from tests.conftest import ARCHITECTURES, SHAPE


@pytest.fixture
def bare(tiny: LanguageModel, tmp_path: Path) -> Path:
    """Config and tokenizer of ``tiny``."""
    save_language_model(tiny, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*.safetensors*"):
        file.unlink()
    return tmp_path / "bare"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_layers": 3}, "lora_layers: 3 is more than the model's 2 blocks"),
    ({"lora_blocks": "1-2"}, 'lora_blocks: "1-2" names block 2'),
    ({"lora_modules": ["q_prj"]}, 'no layer "q_prj"; did you mean "q_proj"'),
    ({"fine_tune_type": "dora", "lora_modules": ["q_prj"]}, 'no layer "q_prj"'),
    ({"modules_to_save": ["nrm"]}, 'modules_to_save: the model has no module "nrm"; did you mean "norm"'),
    ({"modules_to_save": ["lm_head"]}, "its head is the embedding: name that"),
    ({"fine_tune_type": "soft_prompt", "soft_prompt_text": ""}, "soft_prompt_text: '' has no tokens"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=[str(one[0]) for one in REFUSED])
def test_what_the_model_has_not_is_refused_without_its_weights(
    bare: Path, make_config: Callable[..., Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        check_model(make_config(model_name=str(bare), **options))
    with pytest.raises(InvalidConfigurationError, match=sentence):
        check_model(make_config(**options))  # the embedded one, too


@pytest.mark.parametrize(
    "options",
    [
        {"lora_blocks": "0-1", "lora_modules": ["self_attn"], "modules_to_save": ["norm"]},
        {"fine_tune_type": "dora", "quantize_base": 4, "quantize_group_size": 32},
        {"fine_tune_type": "soft_prompt", "soft_prompt_text": "Say"},
        {"soft_prompt_tokens": 4},
        {"fine_tune_type": "full"},
    ],
    ids=str,
)
def test_what_it_has_is_let_through(
    bare: Path, make_config: Callable[..., Any], options: dict[str, Any]
) -> None:
    check_model(make_config(model_name=str(bare), **options))


def write_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_other_architectures_and_packed_weights(bare: Path, make_config: Callable[..., Any]) -> None:
    packed = {"quantization": {"group_size": 32, "bits": 4}}
    write_config(bare, **packed)
    with pytest.raises(InvalidConfigurationError, match="is quantised and packed weights have no gradient"):
        check_model(make_config(model_name=str(bare), fine_tune_type="full"))
    check_model(make_config(model_name=str(bare)))
    mamba = {**SHAPE, **ARCHITECTURES["mamba2"], "model_type": "mamba2"}
    (bare / "config.json").write_text(json.dumps(mamba))
    with pytest.raises(InvalidConfigurationError, match="mamba2 does not show its token embeddings"):
        check_model(make_config(model_name=str(bare), soft_prompt_tokens=2))
    (bare / "config.json").write_text(json.dumps({**mamba, "model_type": "of next year"}))
    check_model(make_config(model_name=str(bare)))  # loading says it, with what mlx-lm has to say


def test_an_adapter_of_another_model_is_refused_in_a_few_names(
    tiny: LanguageModel, bare: Path, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    policy = PolicyModel(tiny, make_config(soft_prompt_tokens=2))
    policy.save(tmp_path / "adapter")
    config = make_config(model_name=str(bare), adapter_path=str(tmp_path / "adapter"))
    check_model(config)
    file = tmp_path / "adapter" / "adapters.safetensors"
    weights = {name: mx.array(np.array(x)) for name, x in named_arrays(mx.load(str(file))).items()}
    mx.save_safetensors(str(file), {f"model.layers.7.{i}.lora_a": x for i, x in enumerate(weights.values())})
    write_config(bare, hidden_size=64)
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        check_model(config)
    assert len(str(caught.value).splitlines()) <= 5
    mx.save_safetensors(str(file), weights)
    with pytest.raises(CheckpointError, match=r"soft_prompt: vectors of shape \(n, 64\) are expected"):
        check_model(config)
    write_config(bare, hidden_size=32)
    names = sorted(weights)
    mx.save_safetensors(str(file), {name: weights[name] for name in names[10:]})
    with pytest.raises(CheckpointError) as caught:
        check_model(config)
    sentence = str(caught.value)
    missing = [name for name in names[:10] if not name.endswith("soft_prompt")]
    assert f"; and {len(missing) - SHOWN} more)" in sentence
    assert all(f"{name} is missing" in sentence for name in missing[:SHOWN])
    assert missing[SHOWN] not in sentence
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json has no num_layers"):
        check_model(config)


def test_a_dry_run_says_it_in_a_sentence(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dry-run", "--model-name", str(bare), "--lora-modules", "q_prj"]
    assert main.main([*words, "--train-path", "none.jsonl"]) == 2
    assert 'no layer "q_prj"; did you mean "q_proj"' in capsys.readouterr().err
