"""Tokenizers that are a pickled tiktoken encoding (``tokenizer.pkl``, as nanochat has it), without tiktoken.

Unpickling runs what the file names. Here a file may name ``tiktoken.core.Encoding`` and nothing else, and even that
is not made: its pattern, ranks and special tokens are read, and become a byte-level tokenizer of the same ids.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import io
import pickle
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from config.errors import ModelLoadError

FILE = "tokenizer.pkl"
LARGEST = 64 << 20  # bytes of a file; the largest encodings that are published are a tenth of it
_END = ("<|endoftext|>", "<|bos|>")


class _Encoding:
    """What a file says of an encoding."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load_pickled_tokenizer(path: Path) -> TokenizerWrapper:
    """The tokenizer in a ``tokenizer.pkl``.

    Its end, padding and first token are ``<|endoftext|>``, or ``<|bos|>`` where there is none. It has no chat
    template, so messages become plain text (``tokenizer_setup.plain_chat``).

    Raises:
        ModelLoadError: for a file that holds anything but one encoding; nothing that it names is run.
    """
    name, pattern, ranks, special = _encoding(path)
    end = next((token for token in _END if token in special), None)
    if end is None:
        raise ModelLoadError(
            f"{path}: {' or '.join(_END)} is expected among the special tokens, found {', '.join(special) or 'none'}"
        )
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {written(token): rank for token, rank in ranks.items()} | special
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(ranks, written)))
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # tokenizers raises plain ones
        raise ModelLoadError(f'{path}: the encoding "{name}" cannot be rebuilt ({error})') from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )
    return TokenizerWrapper(made, eos_token_ids=[special[end]])


def _merges(ranks: dict[bytes, int], written: Any) -> list[tuple[str, str]]:
    """Every way to put a token together from two, in the order of what comes out: what tiktoken merges first."""
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [(a, b) for a, b in splits if a in ranks and b in ranks]
        found.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written(a), written(b)) for a, b in found]
    return merges


def _encoding(path: Path) -> tuple[str, str, dict[bytes, int], dict[str, int]]:
    """Name, pattern, ranks and special tokens of a file, checked."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ModelLoadError(f"{path}: {size} bytes, and no tokenizer has more than {LARGEST}")
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except ModelLoadError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ModelLoadError(
            f"{path}: a pickled tiktoken encoding is expected, and nothing else is read ({error}); convert the "
            "tokenizer to tokenizer.json, or give the file that belongs to the model"
        ) from error
    state = getattr(found, "state", None) if isinstance(found, _Encoding) else None
    if not isinstance(state, dict):
        raise ModelLoadError(
            f"{path}: a tiktoken encoding with its ranks is expected, found {'one by name' if state else 'none'}"
        )
    parts: list[Any] = [state.get(k) for k in ("pat_str", "mergeable_ranks", "special_tokens")]
    pattern, ranks, special = parts
    fits = (
        isinstance(pattern, str)
        and isinstance(ranks, dict)
        and all(isinstance(k, bytes) and k and type(v) is int and v >= 0 for k, v in ranks.items())
        and isinstance(special, dict)
        and all(isinstance(k, str) and type(v) is int and v >= 0 for k, v in special.items())
    )
    if not fits or len({*ranks.values(), *special.values()}) != len(ranks) + len(special):
        raise ModelLoadError(
            f"{path}: pat_str, mergeable_ranks and special_tokens are expected, with an id of its own for each token"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ModelLoadError(
            f"{path}: the ranks lack the byte {missing[0]}, so some texts would have no tokens"
        )
    return str(state.get("name", "")), pattern, ranks, special
