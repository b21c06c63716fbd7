"""An adapter added to the weights that it adapts: one model, which needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from base_setup.adapter_layers import adapter_layers, fuse_layers, wrapped
from base_setup.lora_setup import load_adapter, read_description, soft_prompt_length
from base_setup.memory_estimate import read_config
from base_setup.parameters import named_arrays
from config.errors import InvalidConfigurationError
from models.sft_model import EMBEDDED, LanguageModel
from tools.converting import cast_as_stored, dequantized
from tools.loading import adapter_folder, embedded_of, is_quantized, read_model
from tools.saving import check_new, fresh_folder, save_whole

GGUF_TYPES = ("llama", "mistral", "mixtral")  # those that mlx-lm writes
GGUF_FILE = "ggml-model-f16.gguf"


def fuse(
    name: str,
    adapter: str,
    path: str | Path,
    *,
    de_quantize: bool = False,
    gguf: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write base and adapter as one model to the new folder ``path``.

    A base that is quantised stays so, its packed weights being rounded anew, unless ``de_quantize``.

    Args:
        adapter: an adapter's folder, or a run's. gguf: the name of a GGUF file to write beside the model.
    Returns:
        What was done, in a line.
    Raises:
        ToolkitError: a sentence; nothing of ``path`` is left then.
    """
    check_new(path, "--save-path")
    source = adapter_folder(adapter)
    check_can_be_fused(source)
    packed = is_quantized(name)
    if de_quantize and not packed:
        raise InvalidConfigurationError(f"--de-quantize: {name} is not quantised; leave it out")
    if gguf is not None:
        check_gguf(name, gguf, packed and not de_quantize)
    with fresh_folder(path, "--save-path") as folder:
        base = read_model(name, trust_remote_code=trust_remote_code, embedded=embedded_of(source))
        kind = load_adapter(base.model, source).get("fine_tune_type", "lora")
        config = dict(base.config)
        if de_quantize:  # first: some modes unpack to bfloat16, which an update would be rounded to
            dequantized(base.model, config)
            for _, layer in adapter_layers(base.model):
                wrapped(layer).set_dtype(mx.float32)
        layers = len(adapter_layers(base.model))
        fuse_layers(base.model)
        if de_quantize:
            cast_as_stored(base.model, config)
        save_whole(
            LanguageModel(base.model, base.tokenizer, config, base.name), folder, own_code=trust_remote_code
        )
        if gguf is not None:
            _write_gguf(folder, base.model, config, gguf)
    done = (
        f"{layers} {kind} layers of {source} fused into {name}"
        if layers
        else f"{name} with the weights of {source}"
    )
    return f"{path}: {done}" + (f", and {Path(path) / gguf}" if gguf is not None else "")


def check_can_be_fused(folder: Path) -> None:
    """Refuse an adapter of which a part belongs to no weight.

    Raises:
        InvalidConfigurationError: for soft prompts.
    """
    if soft_prompt_length(read_description(folder)):
        raise InvalidConfigurationError(
            f"--adapter-path: {folder} has a soft prompt, and vectors that stand before the prompt's own are no part "
            "of any weight, so there is nothing to add them to; use it as it is: generate, chat and train take it by "
            "--adapter-path"
        )


# GGUF ----------------------------------------------------------------------------------------------------


def check_gguf(name: str, file: str, packed: bool) -> None:
    """Refuse a GGUF file that mlx-lm cannot write.

    Args:
        name: the base. file: to write beside the model. packed: whether the fused model stays quantised.
    Raises:
        InvalidConfigurationError: for another architecture, a quantised model, or a path.
    """
    kind = None if name == EMBEDDED else read_config(name).get("model_type")
    if kind not in GGUF_TYPES:
        raise InvalidConfigurationError(
            f"--export-gguf: mlx-lm writes GGUF for {', '.join(GGUF_TYPES)}, and this model is {kind or 'qwen3'}; "
            "leave it out and convert the fused folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if packed:
        raise InvalidConfigurationError(
            f"--export-gguf: {name} is quantised, which mlx-lm cannot write as GGUF; add --de-quantize"
        )
    if Path(file).name != file:
        raise InvalidConfigurationError(
            f"--gguf-path: a file name within --save-path is expected, found {file!r}"
        )


def _write_gguf(folder: Path, model: Any, config: dict[str, Any], file: str) -> None:
    import contextlib
    import io

    from mlx_lm.gguf import convert_to_gguf

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_gguf(folder, named_arrays(model.parameters()), config, str(folder / file))
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise InvalidConfigurationError(
            f"--export-gguf: mlx-lm cannot write this model ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "leave it out and convert the fused folder with llama.cpp's convert_hf_to_gguf.py"
        ) from error
