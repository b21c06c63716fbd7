"""A Hugging Face model as an MLX model: other numbers, fewer bits, another end token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import compute_bits_per_weight, dequantize_model

from config.errors import InvalidConfigurationError
from models.sft_model import LanguageModel
from tools.loading import is_quantized, packed_layers, quantized, read_model
from tools.saving import check_new, fresh_folder, rewrite_end_token, save_whole, set_end_token

DTYPES = ("float16", "bfloat16", "float32")
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class Conversion:
    """What becomes of a model's numbers.

    Attributes:
        dtype: of what is not packed; None: as it is stored.
        bits, group_size: of packed weights; None: those of ``mode`` (affine: 4 bits in groups of 64).
        recipe: some layers with more bits than others, one of ``RECIPES``.
    """

    dtype: str | None = None
    quantize: bool = False
    dequantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None
    eos_token: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be done, or would not be done without a word."""
        if self.quantize and self.dequantize:
            raise InvalidConfigurationError("--quantize, --dequantize: both are given; give one of them")
        for flag, value in (
            ("--q-bits", self.bits),
            ("--q-group-size", self.group_size),
            ("--quant-predicate", self.recipe),
        ):
            if value is not None and not self.quantize:
                raise InvalidConfigurationError(f"{flag}: {value} is given, but not --quantize (-q); add it")
        if self.mode != "affine":
            if not self.quantize:
                raise InvalidConfigurationError(
                    f"--q-mode: {self.mode} is given, but not --quantize (-q); add it"
                )
            if self.recipe or self.bits or self.group_size:
                raise InvalidConfigurationError(
                    f"--q-mode: {self.mode} has its own bits and group size; leave --q-bits, --q-group-size and "
                    "--quant-predicate out"
                )
        if self.recipe and self.bits:
            raise InvalidConfigurationError(
                f"--quant-predicate: {self.recipe} names its bits itself; leave --q-bits out"
            )
        for flag, value, valid in (
            ("--q-bits", self.bits, AFFINE_BITS),
            ("--q-group-size", self.group_size, AFFINE_GROUPS),
        ):
            if value is not None and value not in valid:
                raise InvalidConfigurationError(
                    f"{flag}: one of {', '.join(map(str, valid))} is expected, found {value}"
                )


def convert(name: str, path: str | Path, how: Conversion) -> str:
    """Write the model ``name`` to the new folder ``path``.

    Returns:
        What was done, in a line.
    Raises:
        ToolkitError: a sentence; nothing of ``path`` is left then.
    """
    check_new(path, "--mlx-path")
    with fresh_folder(path, "--mlx-path") as folder:
        loaded = read_model(name, trust_remote_code=how.trust_remote_code, field="--hf-path")
        before = is_quantized(name)
        if how.quantize and before:
            raise InvalidConfigurationError(
                f"--quantize: {name} is quantised already; --dequantize first, into another folder, or leave it out"
            )
        if how.dequantize and not before:
            raise InvalidConfigurationError(f"--dequantize: {name} is not quantised; leave it out")
        converted = _converted(loaded, how)
        if how.eos_token is not None:
            set_end_token(converted, how.eos_token)
        save_whole(converted, folder, own_code=how.trust_remote_code)
        if how.eos_token is not None:
            rewrite_end_token(folder, converted.config["eos_token_id"])
        line = _summary(converted)
    return f"{path}: {line}"


def _converted(loaded: LanguageModel, how: Conversion) -> LanguageModel:
    model, config = loaded.model, dict(loaded.config)
    if how.dequantize:  # first: what it unpacks is in the type of its scales
        model = dequantized(model, config)
    if how.dequantize and how.dtype is None:
        cast_as_stored(model, config)
    if how.dtype is not None:
        _cast(model, how.dtype)
        config.update(
            {key: how.dtype for key in ("torch_dtype", "dtype") if key in config} or {"dtype": how.dtype}
        )
    if how.quantize:
        recipe = (
            mixed_quant_predicate_builder(how.recipe, model, how.group_size or 64) if how.recipe else None
        )
        model, config = quantized(
            model, config, bits=how.bits, group_size=how.group_size, mode=how.mode, predicate=recipe
        )
    return LanguageModel(model, loaded.tokenizer, config, loaded.name)


def dequantized(model: Any, config: dict[str, Any]) -> Any:
    """``model`` with plain weights, in place; its ``config`` loses what it says of packing."""
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    return dequantize_model(model)


def cast_as_stored(model: Any, config: Mapping[str, Any]) -> None:
    """Give unpacked weights the type that the config names: some modes unpack to bfloat16, whatever they were."""
    stored = config.get("torch_dtype", config.get("dtype"))
    if stored in DTYPES:
        _cast(model, str(stored))


def _cast(model: Any, dtype: str) -> None:
    keep = getattr(model, "cast_predicate", lambda name: True)  # some routers stay in float32

    def cast(name: str, x: mx.array) -> mx.array:
        return x.astype(getattr(mx, dtype)) if keep(name) and mx.issubdtype(x.dtype, mx.floating) else x

    model.update(tree_map_with_path(cast, model.parameters()))


def _summary(converted: LanguageModel) -> str:
    packed = packed_layers(converted.model)
    if not packed:
        kinds = {str(x.dtype).removeprefix("mlx.core.") for _, x in _arrays(converted.model)}
        return f"weights in {', '.join(sorted(kinds))}"
    plain = [
        path
        for path, module in converted.model.named_modules()
        if hasattr(module, "to_quantized") and "scales" not in module
    ]
    left = f", {len(plain)} left plain (first: {plain[0]})" if plain else ""
    return f"{packed} layers quantised{left}, {compute_bits_per_weight(converted.model):.2f} bits per weight"


def _arrays(model: Any) -> list[tuple[str, mx.array]]:
    from base_setup.parameters import named_arrays

    return list(named_arrays(model.parameters()).items())
