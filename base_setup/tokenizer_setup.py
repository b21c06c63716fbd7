"""Text to token ids and back: the built-in byte tokenizer, prompts, and the tokens that end an answer."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from config.errors import DataLoadError, ModelLoadError
from data_loading.messages import has_half_characters
from data_loading.schemas import RESERVED_COLUMNS
from experience_buffer.data_structures import Prompt

HALF = "the text has half a character (a lone surrogate); repair it"
_ENDING = 32  # tokens: enough for the tag with which a template opens the thinking
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

    Raises:
        DataLoadError: for half a character, which no tokenizer takes.
    """
    try:
        return list(tokenizer.encode(text, add_special_tokens=special, split_special_tokens=True))
    except TypeError:
        if has_half_characters(text):
            raise DataLoadError(HALF) from None
        raise


def encode_prompt(tokenizer: TokenizerWrapper, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a prompt: a plain text, or chat messages through the tokenizer's own template.

    A tokenizer without one gets the messages as the text of :func:`plain_chat`.
    """
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, special=True)
    if getattr(tokenizer, "chat_template", None) is None:
        return encode(tokenizer, plain_chat(prompt), special=True)
    try:
        # As in encode(): control tokens that a message spells out stay text, only the template writes real ones.
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, sanitize_control_tokens=True
        )
    except Exception as error:  # a template is a program of its own and raises what it likes
        if any(has_half_characters(str(message.get("content"))) for message in prompt):
            raise DataLoadError(HALF) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataLoadError(f"the chat template does not take these messages ({reason})") from error
    return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as text, for a tokenizer that has no chat template.

    >>> plain_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}])
    'Be brief.\\n\\nUser: 2 + 2?\\nAssistant: '
    """
    lines = []
    for message in messages:
        role, content = str(message.get("role", "user")), message["content"]
        lines.append(f"{content}\n\n" if role == "system" else f"{role.capitalize()}: {content}\n")
    return "".join([*lines, "Assistant: "])


def encode_pair(
    tokenizer: TokenizerWrapper, row: Mapping[str, Any], answer: str = "completion"
) -> tuple[list[int], list[int]]:
    """Ids of a row's prompt and of one of its answers, which is closed by the end token.

    A row may hold them already (``prompt_ids``, ``completion_ids``), or be one ``text``, all of it answer: its
    first token then stands for the prompt, since nothing comes before it that it could be predicted from.

    Raises:
        DataLoadError: for a missing field, one of another type, or nothing to learn.
    """
    end = answer_end_id(tokenizer)
    if "prompt_ids" in row:
        if "completion_ids" not in row:
            raise DataLoadError(
                "the pre-tokenised row has a prompt and no completion; preprocess rows with both"
            )
        prompt, completion = (_known_ids(tokenizer, row[part]) for part in ("prompt_ids", "completion_ids"))
        return prompt, [*completion, end]
    if "text" in row and "prompt" not in row:
        ids = encode(tokenizer, _string(row, "text"), special=True)
        return ids[:1], [*ids[1:], end]
    answer_ids = [*encode(tokenizer, _string(row, answer)), end]
    if is_chat(row.get("prompt")):
        return encode_prompt(tokenizer, row["prompt"]), answer_ids
    return encode(tokenizer, _string(row, "prompt"), special=True), answer_ids


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataLoadError(f'"{name}" must be a string, found {value!r:.80}')
    return value


def is_chat(prompt: Any) -> bool:
    """Whether this is a list of messages, each with its content."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "content" in message for message in prompt)
    )


def fingerprint(tokenizer: TokenizerWrapper) -> str:
    """Equal for two tokenizers that make the same ids of texts and chats: SHA-256 of vocabulary, template, a probe."""
    described = json.dumps(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "template": str(getattr(tokenizer, "chat_template", None)),
            "probe": encode(
                tokenizer, "Größe: 1,234.5 naïve\n\n\tint x = 7;  你好 🙂 the quick brown fox", special=True
            ),
        }
    )
    return hashlib.sha256(described.encode()).hexdigest()


def check_sequence(prompts: Any) -> None:
    """Refuse what is no list of prompts."""
    if isinstance(prompts, str):
        raise DataLoadError("prompts: a list of prompts is expected, found one string; write [prompt]")
    if not isinstance(prompts, Sequence):
        raise DataLoadError(f"prompts: a list of prompts is expected, found {type(prompts).__name__}")
    if len(prompts) == 0:
        raise DataLoadError("prompts: the list is empty; at least one prompt is needed")


def check_length(tokens: int, place: str, limit: int) -> None:
    """Refuse a prompt of too many tokens."""
    if tokens > limit:
        raise DataLoadError(
            f"{place}: {tokens} tokens, but max_prompt_length is {limit}; shorten the prompt, raise the limit, or "
            'choose prompt_overflow="keep_end" or "drop"'
        )


def prepare_prompt(tokenizer: TokenizerWrapper, index: int, row: Any, place: str) -> Prompt:
    """One prompt, checked and encoded, of whatever length. ``place`` begins every sentence about it."""
    columns: dict[str, Any] = {}
    if isinstance(row, Mapping):
        if "prompt_ids" in row and "prompt" not in row:
            return _from_ids(tokenizer, index, row, place)
        if "prompt" not in row:
            raise DataLoadError(
                f'{place}: "prompt" is missing (fields: {", ".join(map(str, row)) or "none"})'
            )
        columns = {k: v for k, v in row.items() if k != "prompt"}
        taken = sorted(RESERVED_COLUMNS & columns.keys())
        if taken:
            raise DataLoadError(
                f'{place}: the field "{taken[0]}" has the name of something that rewards are given '
                "anyway; rename it"
            )
        row = row["prompt"]
    messages: tuple[Mapping[str, Any], ...] | None = None
    if isinstance(row, str):
        text = row
    elif is_chat(row):
        text = "\n".join(str(m["content"]) for m in row)
        messages = tuple(row)
    else:
        raise DataLoadError(
            f"{place}: a string or a list of chat messages is expected, found {type(row).__name__}"
        )
    if not text.strip():
        raise DataLoadError(f"{place}: the prompt is empty")
    if has_half_characters(text):
        raise DataLoadError(f"{place}: {HALF}")
    try:
        ids = encode_prompt(tokenizer, row)
    except DataLoadError as error:
        raise DataLoadError(f"{place}: {error}") from error
    if not ids:
        raise DataLoadError(f"{place}: the tokenizer makes nothing of the text {text!r:.40}")
    ending = "" if messages is None else tokenizer.decode(ids[-_ENDING:])
    return Prompt(index, text, tuple(ids), columns, messages, ending)


def _from_ids(tokenizer: TokenizerWrapper, index: int, row: Mapping[str, Any], place: str) -> Prompt:
    """A pre-tokenised prompt; what rewards read is decoded from its ids."""
    columns = {k: v for k, v in row.items() if k not in ("prompt_ids", "completion_ids")}
    ids = _known_ids(tokenizer, row["prompt_ids"], place)
    if "completion_ids" in row:
        columns["completion"] = tokenizer.decode(_known_ids(tokenizer, row["completion_ids"], place))
    return Prompt(index=index, text=tokenizer.decode(ids), ids=tuple(ids), columns=columns)


def _known_ids(tokenizer: TokenizerWrapper, values: Any, place: str = "") -> list[int]:
    """Ids as Python's numbers. MLX reads past the end of the embeddings without a word, hence the check."""
    ids = [int(value) for value in values]
    if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise DataLoadError(
            f"{place}{': ' if place else ''}token ids from 0 to {len(tokenizer) - 1} are expected, found {min(ids)} to "
            f"{max(ids)}; run preprocess with this model"
        )
    return ids
