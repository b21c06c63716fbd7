"""The base language model: made on the spot, loaded, shared between models, saved."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download, _get_classes, load_model, save_config, save_model

from base_setup.backend import compute_dtype
from base_setup.new_tokens import add_tokens
from base_setup.parameters import named_arrays
from base_setup.pickled_tokenizer import FILE as PICKLED
from base_setup.pickled_tokenizer import load_pickled_tokenizer
from base_setup.quantized_base import quantize_base
from base_setup.soft_prompt import soft_prompt_of
from base_setup.tokenizer_setup import byte_tokenizer, check_vocabulary, end_token_ids
from base_setup.untrusted import check_model_folder
from config.errors import CheckpointError, ModelLoadError
from config.model_config import ModelConfig
from config.training_config import TrainingConfig

EMBEDDED = "embedded"


@dataclass(frozen=True)
class LanguageModel:
    """A base model with what belongs to it."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]  # the contents of its config.json
    name: str
    is_altered: bool = (
        False  # made here, grown or quantised: what ``name`` loads is not this, so it has to be saved
    )


def load_language_model(config: TrainingConfig, field: str = "model_name") -> LanguageModel:
    """The model that ``config.model_name`` names.

    Raises:
        ModelLoadError: in a sentence, when there is no such folder or Hugging Face name, when it cannot
            be read, or when its tokenizer does not fit.
    """
    if config.model_name == EMBEDDED:
        return _as_asked(build_embedded(config.embedded_model, config.seed), config)
    trusted = config.trust_remote_code
    name = existing_model(config.model_name, field, trust_remote_code=trusted)
    try:
        folder = _download(name)  # a folder stays what it is
        for sentence in check_model_folder(folder, trust_remote_code=trusted, field=field):
            print(sentence)
        model, tokenizer, model_config = read_folder(folder, trusted)
    except ModelLoadError:
        raise
    except Exception as error:  # mlx-lm, transformers and the hub client each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f'{field}: "{config.model_name}" could not be loaded ({type(error).__name__}: {reason}); give a '
            'folder with config.json and *.safetensors, a Hugging Face name that can be reached, or "embedded"'
        ) from error
    loaded = LanguageModel(model, tokenizer, model_config, config.model_name)
    _fit_dtype(model)
    check_vocabulary(tokenizer, vocabulary_size(model, model_config), config.model_name)
    end_token_ids(tokenizer)
    return _as_asked(loaded, config)


def read_folder(
    folder: Path, trusted: bool, *, lazy: bool = False
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Model, tokenizer and config.json as mlx-lm reads them, and a tokenizer that is a pickled encoding as we do.

    ``lazy``: the weights are not computed yet.
    """
    if has_pickled_tokenizer(folder):
        tokenizer = load_pickled_tokenizer(folder / PICKLED)
        model, settings = load_model(folder, lazy=lazy, trust_remote_code=trusted)
        ends = settings.get("eos_token_id")  # mlx-lm believes it before any tokenizer; what we save, it reads
        if ends is not None:
            ids = ends if isinstance(ends, list) else [ends]
            tokenizer = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=ids)
        return model, tokenizer, settings
    model, tokenizer, settings = mlx_lm.load(  # type: ignore[misc]
        str(folder),
        lazy=lazy,
        tokenizer_config={"trust_remote_code": trusted},
        return_config=True,
        trust_remote_code=trusted,
    )
    return model, tokenizer, settings


def has_pickled_tokenizer(folder: Path) -> bool:
    """Whether the folder's tokenizer is a pickled encoding and nothing that mlx-lm reads."""
    return (folder / PICKLED).is_file() and not (folder / "tokenizer.json").is_file()


def _as_asked(base: LanguageModel, config: TrainingConfig) -> LanguageModel:
    """``base`` with new tokens and quantised, in place, where ``config`` asks for it."""
    settings = base.config
    if config.new_special_tokens:
        settings = add_tokens(
            base.model,
            base.tokenizer,
            settings,
            config.new_special_tokens,
            mean=config.init_new_embeddings_with_mean,
            seed=config.seed,
        )
    settings = quantize_base(base.model, settings, config)
    if settings is base.config:
        return base
    return replace(base, config=settings, is_altered=True)


def existing_model(name: str, field: str = "model_name", *, trust_remote_code: bool = False) -> str:
    """``name`` as a folder that holds a model or a well-formed Hugging Face name, or a refusal.

    Settled here, because mlx-lm looks a mistyped folder up on the hub.
    """
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # longer than a path can be; ~ of somebody who is not there
        is_folder = is_file = False
    if is_folder:
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f'{field}: the folder "{name}" has no config.json, so it holds no model; give one that does'
            )
        if not any(path.glob("tokenizer*")) and not any(path.glob("*.tiktoken")):
            # transformers would make one up from the model's type, with other ids than the model learned
            raise ModelLoadError(
                f'{field}: the folder "{name}" has no tokenizer; give it the tokenizer.json and '
                "tokenizer_config.json that belong to the model"
            )
        check_model_folder(path, trust_remote_code=trust_remote_code, field=field)
        return str(path)
    if is_file:
        raise ModelLoadError(f'{field}: "{name}" is a file; give the folder that contains it')
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ModelLoadError(
            f'{field}: there is no folder "{name}", and it is no Hugging Face name either (those look '
            'like "Qwen/Qwen3-0.6B-Base"); give one of the two, or "embedded" for a small model made on the spot'
        )
    return name


def _fit_dtype(model: nn.Module) -> None:
    """Cast the weights where this backend is slow in the checkpoint's own type (bfloat16 on CPU)."""

    def cast(x: mx.array) -> mx.array:
        return x.astype(compute_dtype(x.dtype)) if mx.issubdtype(x.dtype, mx.floating) else x

    model.update(tree_unflatten([(name, cast(x)) for name, x in named_arrays(model.parameters()).items()]))
    mx.eval(model.parameters())


def vocabulary_size(model: nn.Module, config: dict[str, Any]) -> int:
    """Rows of the embedding, read off a forward pass where config.json does not say."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size) if size else int(model(mx.array([[0]])).shape[-1])


def build_embedded(architecture: ModelConfig, seed: int) -> LanguageModel:
    """A Qwen3-type model with random weights and a byte tokenizer, the same for the same seed.

    Linear and embedding weights are drawn from N(0, init_std²); norms start at 1.
    """
    tokenizer = byte_tokenizer()
    heads = architecture.num_attention_heads
    config: dict[str, Any] = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "intermediate_size": architecture.intermediate_size or 4 * architecture.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": architecture.num_key_value_heads or heads,
        "head_dim": architecture.hidden_size // heads,
        "rms_norm_eps": architecture.layer_norm_eps,
        "attention_dropout": architecture.dropout,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": architecture.max_position_embeddings,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    shapes = sorted((name, x.shape) for name, x in named_arrays(model.parameters()).items())
    # A key of its own: the weights do not depend on what was drawn before.
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = [
        (
            name,
            (
                mx.random.normal(shape, scale=architecture.init_std, key=key)
                if len(shape) > 1
                else mx.ones(shape)
            ),
        )
        for (name, shape), key in zip(shapes, keys, strict=True)
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    wrapped = TokenizerWrapper(tokenizer, eos_token_ids=[tokenizer.eos_token_id])
    return LanguageModel(model, wrapped, config, EMBEDDED, is_altered=True)


def share_weights(model: nn.Module) -> nn.Module:
    """A second module tree over the same arrays: it costs no memory until one of the two replaces a weight.

    MLX arrays are references and an optimiser replaces them, it never writes into them; so the copy goes
    on computing what ``model`` computes now, whatever ``model`` learns later.
    """
    shared = {id(x): x for x in named_arrays(model.parameters()).values()}
    return copy.deepcopy(model, shared)  # the memo makes deepcopy keep those arrays


def save_language_model(language_model: LanguageModel, folder: Path) -> None:
    """Write a whole model so that mlx-lm, and ``model_name=folder``, load it like any other.

    Raises:
        CheckpointError: where it cannot be written, or has a soft prompt, which is no weight of a plain model.
    """
    if soft_prompt_of(language_model.model) is not None:
        raise CheckpointError(
            f"{folder}: the model has a soft prompt, and a plain model has no place for one; save the adapter "
            "(PolicyModel.save) and load it with adapter_path"
        )
    try:
        if folder.exists():
            # mlx-lm merges every model*.safetensors it finds, so a stale shard would override weights.
            for stale in folder.glob("model*.safetensors*"):
                stale.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, language_model.model, donate_model=False)  # donating would empty the live model
        save_config(dict(language_model.config), folder / "config.json")
        language_model.tokenizer.save_pretrained(str(folder))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: the model could not be written ({error}); free some space "
            f"({shutil.disk_usage(folder if folder.exists() else Path.cwd()).free / 1e9:.1f} GB are left) "
            "or choose another folder"
        ) from error
