"""A model for the tools: looked for before anything is loaded, in its own precision or ready to compute."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import _download, hf_repo_to_path, quantize_model

from base_setup.adapter_files import a_file
from base_setup.backend import compute_dtype
from base_setup.lora_setup import DESCRIPTION, WEIGHTS, load_adapter, read_description
from base_setup.memory_estimate import read_config
from base_setup.tokenizer_setup import check_vocabulary, end_token_ids
from base_setup.untrusted import check_model_folder
from config.errors import CheckpointError, InvalidConfigurationError, ModelLoadError
from config.model_config import ModelConfig
from models.sft_model import (
    EMBEDDED,
    LanguageModel,
    build_embedded,
    existing_model,
    read_folder,
    vocabulary_size,
)

#: Parts of a run folder that may hold an adapter, the last weights first.
RUN_PARTS = ("final", "interrupted", "")


def read_model(
    name: str,
    *,
    trust_remote_code: bool = False,
    field: str = "--model",
    embedded: tuple[ModelConfig, int] | None = None,
) -> LanguageModel:
    """A model as it is on disk, its weights in the types they are stored in and not computed yet.

    Args:
        name: a folder, a Hugging Face name, or "embedded".
        trust_remote_code: let the model's own Python files run. embedded: architecture and seed of "embedded".
    Raises:
        ModelLoadError: one sentence that begins with ``field``.
    """
    if name == EMBEDDED:
        return build_embedded(*(embedded or (ModelConfig.tiny(), 0)))
    found = existing_model(name, field, trust_remote_code=trust_remote_code)
    try:
        folder = _download(found)  # a folder stays what it is
        check_model_folder(folder, trust_remote_code=trust_remote_code, field=field)
        model, tokenizer, config = read_folder(folder, trust_remote_code, lazy=True)
    except ModelLoadError:
        raise
    except Exception as error:  # mlx-lm, transformers and the hub client each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f'{field}: "{name}" could not be loaded ({type(error).__name__}: {reason}); give a folder with config.json '
            "and *.safetensors, or a Hugging Face name that can be reached"
        ) from error
    check_vocabulary(tokenizer, vocabulary_size(model, config), name)
    return LanguageModel(model, tokenizer, config, name)


def load_for_use(
    name: str,
    adapter: str | None = None,
    *,
    quantize: bool = False,
    trust_remote_code: bool = False,
    field: str = "--model",
) -> LanguageModel:
    """A model to sample from, in the type this backend computes fastest in.

    Args:
        adapter: an adapter or the run folder that holds one.
        quantize: the base to 4 bits in groups of 64 before the adapter is put on it, as for training on such a base.
    """
    folder = None if adapter is None else adapter_folder(adapter)
    made = None if folder is None else embedded_of(folder)
    loaded = read_model(name, trust_remote_code=trust_remote_code, field=field, embedded=made)
    model, config = loaded.model, loaded.config
    end_token_ids(loaded.tokenizer)

    def fitting(x: mx.array) -> mx.array:
        return x.astype(compute_dtype(x.dtype)) if mx.issubdtype(x.dtype, mx.floating) else x

    model.update(tree_map(fitting, model.parameters()))
    if quantize:
        model, config = quantized(model, config)
    if folder is not None:
        load_adapter(model, folder)
    model.eval()
    mx.eval(model.parameters())
    return LanguageModel(model, loaded.tokenizer, config, name)


def adapter_folder(name: str, field: str = "--adapter-path") -> Path:
    """The folder of an adapter: ``name``, or what a run in ``name`` left (``final``, else ``interrupted``).

    Raises:
        CheckpointError: there is none.
    """
    above = Path(name).expanduser()
    if above.is_file():
        raise CheckpointError(f"{field}: {a_file(above)}")
    for part in RUN_PARTS:
        folder = above / part
        if (folder / WEIGHTS).is_file() and (folder / DESCRIPTION).is_file():
            read_description(folder)
            return folder
    raise CheckpointError(
        f'{field}: "{name}" holds no adapter ({WEIGHTS} and {DESCRIPTION}, or final/ with them); give another one'
    )


def quantized(
    model: Any,
    config: dict[str, Any],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    predicate: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """``model`` with packed weights, in place, and its config.json's contents.

    Raises:
        InvalidConfigurationError: no layer's width is a multiple of the group size, so nothing would be packed.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(model, config, group_size, bits, mode, quant_predicate=predicate)
    except (ValueError, RuntimeError) as error:
        raise InvalidConfigurationError(f"quantisation: {str(error).splitlines()[0]}") from error
    if not packed_layers(model):
        raise InvalidConfigurationError(
            "q_group_size: no layer's width is a multiple of "
            f"{config['quantization']['group_size']}, so nothing would be quantised; take 32, or leave it out"
        )
    return model, config


def packed_layers(model: Any) -> int:
    """How many layers hold quantised weights."""
    return sum("scales" in module for _, module in model.named_modules())


def is_quantized(name: str) -> bool:
    """Whether the model's config.json says that its weights are packed; nothing else is read."""
    if name == EMBEDDED:
        return False
    config = read_config(name)
    return bool(config.get("quantization") or config.get("quantization_config"))


def source_folder(name: str) -> Path | None:
    """Where a model's files lie: its folder, or its snapshot in the hub's cache."""
    if name == EMBEDDED:
        return None
    path = Path(name).expanduser()
    return path if path.is_dir() else Path(hf_repo_to_path(name))


def base_of(adapter: str) -> str:
    """The base that an adapter was trained on: the one saved beside it, else the name in its description.

    Raises:
        InvalidConfigurationError: neither is there.
    """
    folder = adapter_folder(adapter)
    if (folder / "base" / "config.json").is_file():
        return str(folder / "base")
    name = _written_down(folder).get("model_name") or read_description(folder).get("model")
    if not isinstance(name, str):
        raise InvalidConfigurationError(
            f"--model: {folder} does not say what it was trained on; name its base model"
        )
    if name != EMBEDDED and "/" not in name and not Path(name).expanduser().is_dir():
        raise InvalidConfigurationError(
            f'--model: {folder} was trained on the folder "{name}", which is not there, seen from {Path.cwd()}; name '
            "its base model"
        )
    return name


def embedded_of(folder: Path) -> tuple[ModelConfig, int] | None:
    """Architecture and seed of the embedded model that a run trained, if it wrote them down."""
    config = _written_down(folder)
    try:
        return ModelConfig(**config["embedded_model"]), int(config["seed"])
    except (KeyError, TypeError, ValueError):
        return None


def _written_down(folder: Path) -> dict[str, Any]:
    """The config of the run that left an adapter in ``folder``; empty where there is none."""
    for path in (folder / "ppo_config.json", folder.parent / "config.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and isinstance(content.get("config"), dict):
            return dict(content["config"])
    return {}
