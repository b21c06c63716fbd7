"""Demonstrations in tokens: which of them are learned, and how they lie in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from base_setup.tokenizer_setup import encode_pair, encode_prompt, end_token_ids, is_chat
from config.errors import DataLoadError
from token_attribution.extractor import pad_sequences
from token_attribution.packed_rows import fill_rows


class Example(NamedTuple):
    """A demonstration: its tokens, and for each whether it is learned. The first never is: nothing predicts it."""

    ids: list[int]
    learned: list[bool]

    @property
    def n_learned(self) -> int:
        """Tokens that are learned."""
        return sum(self.learned)


def encode_example(tokenizer: Any, row: Mapping[str, Any], loss_on: str) -> Example:
    """A row's prompt and completion with the tokens that ``loss_on`` names (see ``SFTConfig``).

    Raises:
        DataLoadError: for a missing field, an empty prompt, or a chat whose turns cannot be told apart.
    """
    prompt, completion = encode_pair(tokenizer, row)
    if not prompt:
        raise DataLoadError("the prompt is empty")
    learned = [loss_on == "text"] * len(prompt) + [True] * len(completion)
    learned[0] = False
    if loss_on == "assistant" and is_chat(row.get("prompt")):
        for start, end in assistant_turns(tokenizer, row["prompt"], prompt):
            learned[start:end] = [True] * (end - start)
    return Example([*prompt, *completion], learned)


def assistant_turns(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], ids: Sequence[int]
) -> list[tuple[int, int]]:
    """Where in a prompt's ids each earlier turn of the assistant stands, its end token included.

    A turn begins where the template, given the messages before it, has written the assistant's head, and ends with the
    first end token. Neither is guessed at: what a template renders otherwise is refused.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if turns and getattr(tokenizer, "chat_template", None) is None:
        raise DataLoadError(
            'loss_on = "assistant": the tokenizer has no chat template, so nothing marks where a turn ends; use '
            'loss_on = "completion"'
        )
    ends, spans = end_token_ids(tokenizer), []
    for i in turns:
        head = encode_prompt(tokenizer, messages[:i]) if i else []
        start = len(head)
        end = next((j for j in range(start, len(ids)) if ids[j] in ends), None)
        if not i or list(ids[:start]) != head or end is None:
            raise DataLoadError(
                f'loss_on = "assistant": message {i + 1} of the chat is the assistant\'s, and the chat template does '
                "not render the messages before it as it does by themselves, or closes the turn with no end token; "
                'use loss_on = "completion"'
            )
        spans.append((start, end + 1))
    return spans


class Layout(NamedTuple):
    """Examples in rows."""

    tokens: mx.array  # (B, T+1) int32
    mask: mx.array  # (B, T) bool: the next token is learned
    segments: mx.array | None = (
        None  # (B, T) int32, which example of its row each token is of; None: one a row
    )


def padded(examples: Sequence[Example]) -> Layout:
    """An example a row."""
    tokens, _ = pad_sequences([e.ids[:1] for e in examples], [e.ids[1:] for e in examples])
    mask = np.zeros((len(examples), tokens.shape[1] - 1), dtype=bool)
    for row, example in enumerate(examples):
        mask[row, : len(example.ids) - 1] = example.learned[1:]
    return Layout(tokens, mx.array(mask))


def packed(examples: Sequence[Example], capacity: int) -> list[Layout]:
    """Several examples a row, one layout for each row."""
    layouts = []
    for row in fill_rows([len(e.ids) for e in examples], capacity):
        chosen = [examples[i] for i in row]
        ids = [token for e in chosen for token in e.ids]
        learned = [
            flag for e in chosen for flag in e.learned
        ]  # the first of each is not, so none crosses over
        segments = np.repeat(np.arange(len(chosen)), [len(e.ids) for e in chosen])
        whole = padded([Example(ids, learned)])
        layouts.append(
            whole._replace(segments=mx.array(segments[None, : whole.mask.shape[1]].astype(np.int32)))
        )
    return layouts


def stacked(layouts: Sequence[Layout]) -> Layout:
    """Packed rows as one batch, padded on the right by a sequence that nobody sees."""
    width = max(layout.tokens.shape[1] for layout in layouts)

    def wide(x: mx.array, columns: int, value: int) -> mx.array:
        return mx.pad(x, [(0, 0), (0, columns - x.shape[1])], constant_values=value)

    tokens = mx.concatenate([wide(layout.tokens, width, 0) for layout in layouts])
    masks = [wide(layout.mask.astype(mx.int32), width - 1, 0) for layout in layouts]
    segments = [wide(layout.segments, width - 1, -1) for layout in layouts if layout.segments is not None]
    return Layout(tokens, mx.concatenate(masks).astype(mx.bool_), mx.concatenate(segments))
