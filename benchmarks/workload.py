"""The work that benchmarks do: models of known size, saved once, and prompts of exact length.

The weights are random: speed does not depend on what a model knows. They are saved as any Qwen3 model is, with a
tokenizer of one word per id ("t17" is token 17), so that other programs do the same work from the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from base_setup.parameters import named_arrays
from models.sft_model import LanguageModel, save_language_model


class Size(NamedTuple):
    """An architecture, in the words of config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


#: tiny 1.3 million parameters, small 26, medium 117.
SIZES = {
    "tiny": Size(128, 4, 4, 2, 384, 4096),
    "small": Size(384, 8, 6, 3, 1088, 32768),
    "medium": Size(768, 13, 12, 6, 2304, 32768),
}


def make_model(size: Size, seed: int = 0) -> LanguageModel:
    """A Qwen3 model of this size with random weights."""
    tokenizer = word_tokenizer(size.vocabulary)
    config: dict[str, Any] = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    generator = np.random.default_rng(seed)
    weights = [
        (
            name,
            (
                mx.array(generator.standard_normal(x.shape, dtype=np.float32) * 0.02)
                if x.ndim > 1
                else mx.ones(x.shape)
            ),
        )
        for name, x in sorted(named_arrays(model.parameters()).items())
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return LanguageModel(
        model, TokenizerWrapper(tokenizer, eos_token_ids=[tokenizer.eos_token_id]), config, "made"
    )


def save_model(size: Size, folder: Path, seed: int = 0) -> Path:
    """The same in a folder, unless it is there already."""
    if not (folder / "model.safetensors").is_file():
        save_language_model(make_model(size, seed), folder)
    return folder


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word "t<i>"; the last two are padding and end."""
    words = {f"t{i}": i for i in range(vocabulary - 2)} | {"<pad>": vocabulary - 2, "<end>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="t0"
    )


def make_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[str]:
    """``count`` distinct prompts of exactly ``length`` tokens each."""
    ids = np.random.default_rng([seed, 1]).integers(0, vocabulary - 2, (count, length))
    return [" ".join(f"t{i}" for i in row) for row in ids.tolist()]
