"""Text to token ids and back: the built-in byte tokenizer, prompts, and the tokens that end an answer."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from config.errors import DataLoadError, ModelLoadError
from experience_buffer.data_structures import Prompt

#: What every reward is offered besides the fields of the prompts' rows.
RESERVED_COLUMNS = frozenset(
    {
        "self",
        "prompts",
        "completions",
        "prompt_ids",
        "completion_ids",
        "terminated",
        "log_extra",
        "log_metric",
        "trainer_state",
    }
)

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special ones: every text has ids, nothing is unknown, no corpus is needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, TURN_START, TURN_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


def end_token_ids(tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Every token that ends an answer (several models have two)."""
    ids = frozenset(int(i) for i in tokenizer.eos_token_ids if i is not None)
    if not ids:
        raise ModelLoadError(
            "the tokenizer names no end-of-sequence token, so completions could never end; "
            'set "eos_token" in its tokenizer_config.json'
        )
    return ids


def answer_end_id(tokenizer: TokenizerWrapper) -> int:
    """The token that closes an answer we write: the tokenizer's own, where several can end one."""
    ids = end_token_ids(tokenizer)
    own = tokenizer.eos_token_id
    return own if own in ids else min(ids)


def check_vocabulary(tokenizer: TokenizerWrapper, rows: int, name: str) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings: MLX reads past the end without a word."""
    if len(tokenizer) > rows:
        raise ModelLoadError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} embeddings; "
            "use the tokenizer that belongs to this model"
        )


def encode(tokenizer: TokenizerWrapper, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text. Control tokens spelled out inside it stay text, so that content cannot forge turns.

    ``special``: put the tokenizer's own first tokens (BOS) where it has them; once, before a prompt.
    """
    return list(tokenizer.encode(text, add_special_tokens=special, split_special_tokens=True))


def encode_prompt(tokenizer: TokenizerWrapper, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a prompt: a plain text, or chat messages through the tokenizer's own template."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, special=True)
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataLoadError(
            "a prompt is a list of chat messages but the tokenizer has no chat template; "
            "pass the prompt as one string"
        )
    try:
        # As in encode(): control tokens that a message spells out stay text, only the template writes real ones.
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, sanitize_control_tokens=True
        )
    except Exception as error:  # a template is a program of its own and raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataLoadError(f"the chat template does not take these messages ({reason})") from error
    return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)


def prepare_prompts(
    tokenizer: TokenizerWrapper, prompts: Sequence[Any], *, max_prompt_length: int
) -> list[Prompt]:
    """Check and encode what a user calls prompts.

    Args:
        prompts: strings, lists of chat messages, or mappings with a ``prompt`` of either kind, whose other
            fields reach the reward as columns.
    Raises:
        DataLoadError: with the row's number, for no prompts at all, a row of another type, an empty
            prompt, or one longer than ``max_prompt_length`` tokens.
    """
    if isinstance(prompts, str):
        raise DataLoadError("prompts: a list of prompts is expected, found one string; write [prompt]")
    if not isinstance(prompts, Sequence):
        raise DataLoadError(f"prompts: a list of prompts is expected, found {type(prompts).__name__}")
    if len(prompts) == 0:
        raise DataLoadError("prompts: the list is empty; at least one prompt is needed")
    return [_prepare(tokenizer, i, row, max_prompt_length) for i, row in enumerate(prompts)]


def _prepare(tokenizer: TokenizerWrapper, index: int, row: Any, limit: int) -> Prompt:
    columns: dict[str, Any] = {}
    if isinstance(row, Mapping):
        if "prompt" not in row:
            raise DataLoadError(
                f'prompts[{index}]: "prompt" is missing (fields: {", ".join(map(str, row)) or "none"})'
            )
        columns = {k: v for k, v in row.items() if k != "prompt"}
        taken = sorted(RESERVED_COLUMNS & columns.keys())
        if taken:
            raise DataLoadError(
                f'prompts[{index}]: the field "{taken[0]}" has the name of something that rewards are given '
                "anyway; rename it"
            )
        row = row["prompt"]
    messages: tuple[Mapping[str, Any], ...] | None = None
    if isinstance(row, str):
        text = row
    elif isinstance(row, Sequence) and row and all(isinstance(m, Mapping) and "content" in m for m in row):
        text = "\n".join(str(m["content"]) for m in row)
        messages = tuple(row)
    else:
        raise DataLoadError(
            f"prompts[{index}]: a string or a list of chat messages is expected, found {type(row).__name__}"
        )
    if not text.strip():
        raise DataLoadError(f"prompts[{index}]: the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataLoadError(f"prompts[{index}]: the text has half a character (a lone surrogate); repair it")
    try:
        ids = encode_prompt(tokenizer, row)
    except DataLoadError as error:
        raise DataLoadError(f"prompts[{index}]: {error}") from error
    if not ids:
        raise DataLoadError(f"prompts[{index}]: the tokenizer makes nothing of the text {text!r:.40}")
    if len(ids) > limit:
        raise DataLoadError(
            f"prompts[{index}]: {len(ids)} tokens, but max_prompt_length is {limit}; "
            "shorten the prompt or raise the limit"
        )
    return Prompt(index=index, text=text, ids=tuple(ids), columns=columns, messages=messages)
