"""Texts and chats: checked, split into prompt and answer, and given their system message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from config.data_config import DataConfig
from data_loading.json_text import kind_of
from data_loading.records import BadRowError

Message = dict[str, Any]


def check_text(text: str, name: str, *, empty: bool = False) -> str:
    """A text that can be tokenised: whole characters, and not blank unless ``empty``."""
    if not empty and not text.strip():
        raise BadRowError(f'"{name}" is empty; a text is expected')
    if has_half_characters(text):
        raise BadRowError(f'"{name}" has half a character (a lone surrogate); repair the text')
    return text


def has_half_characters(text: str) -> bool:
    """Whether a surrogate stands alone in it: such a text has no UTF-8, and no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_chat(chat: Any, name: str) -> list[Message]:
    """A list of messages with role and content, both texts."""
    if not isinstance(chat, Sequence) or isinstance(chat, (str, bytes)):
        raise BadRowError(f'"{name}" must be a list of messages, found {kind_of(chat)}')
    if not chat:
        raise BadRowError(f'"{name}" has no messages; at least one is expected')
    for number, message in enumerate(chat):
        if not isinstance(message, Mapping):
            raise BadRowError(
                f'"{name}", message {number + 1}: role and content are expected, found {kind_of(message)}'
            )
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise BadRowError(
                    f'"{name}", message {number + 1}: "{part}" must be a text, found {kind_of(message.get(part))}'
                )
        check_text(message["content"], f"{name}, message {number + 1}", empty=True)
        check_text(message["role"], f"{name}, role of message {number + 1}")
    return [dict(message) for message in chat]


def as_prompt(prompt: Any, fields: Mapping[str, Any], config: DataConfig) -> str | list[Message]:
    """A prompt as the trainers take it, with the system message that is its row's or the config's."""
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRowError(f'"system" must be a text, found {kind_of(system)}')
    system = system or config.system_prompt
    if isinstance(prompt, str):
        check_text(prompt, config.prompt_column)
        if not system and config.prompt_format == "as_is":
            return prompt
        chat: list[Message] = [{"role": "user", "content": prompt}]
    else:
        if not isinstance(prompt, Sequence):
            raise BadRowError(f'"{config.prompt_column}" must be a text or a chat, found {kind_of(prompt)}')
        chat = check_chat(prompt, config.prompt_column)
        if not any(message["content"].strip() for message in chat):
            raise BadRowError(f'"{config.prompt_column}" is empty; its messages have no text')
    if system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": check_text(system, "system")}, *chat]
    return chat


def answer_text(answer: Any, name: str, *, empty: bool = False) -> str:
    """An answer: a text, or a chat of one message by the assistant; not blank unless ``empty``."""
    if isinstance(answer, str):
        return check_text(answer, name, empty=empty)
    if not isinstance(answer, Sequence):
        raise BadRowError(f'"{name}" must be a text or the assistant\'s message, found {kind_of(answer)}')
    chat = check_chat(answer, name)
    if len(chat) != 1 or chat[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in chat)
        raise BadRowError(f'"{name}" must be one message of the assistant, found {roles:.80}')
    return check_text(chat[0]["content"], name, empty=empty)


def split_chat(chat: Any, name: str = "messages") -> tuple[list[Message], str | None]:
    """A chat without the assistant's last message, and that message where the chat ends with it."""
    messages = check_chat(chat, name)
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = check_text(messages.pop()["content"], f"{name}, the last message")
    if all(message["role"] == "system" for message in messages):
        raise BadRowError(f'"{name}" must have a message of the user before the answer')
    return messages, answer


def shared_start(chosen: Any, rejected: Any) -> tuple[str | list[Message], str, str]:
    """The prompt that two whole texts or chats begin with, and how each goes on.

    >>> shared_start("The sky is blue.", "The sky is green.")
    ('The sky is', ' blue.', ' green.')
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        check_text(chosen, "chosen")
        check_text(rejected, "rejected")
        shared = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        # Back to where a word ends: the prompt is tokenised by itself, and half a word is no token of either.
        # The white space goes to the answers, as tokenizers put it before words.
        while shared and not _begins_word(chosen, rejected, shared):
            shared -= 1
        answers = chosen[shared:], rejected[shared:]
        if not chosen[:shared].strip() or not all(answer.strip() for answer in answers):
            raise BadRowError(
                '"chosen" and "rejected" must begin with the same prompt and go on differently; '
                'or give the prompt as "prompt"'
            )
        return chosen[:shared], *answers
    first, second = check_chat(chosen, "chosen"), check_chat(rejected, "rejected")
    if first[:-1] != second[:-1] or not first[:-1]:
        raise BadRowError('"chosen" and "rejected" must be the same chat up to its last message')
    return first[:-1], answer_text(first[-1:], "chosen"), answer_text(second[-1:], "rejected")


def _begins_word(chosen: str, rejected: str, position: int) -> bool:
    """Whether both texts have white space at ``position``, and none before it."""
    sides = (chosen[position : position + 1], rejected[position : position + 1])
    return all(side.isspace() for side in sides) and not chosen[position - 1].isspace()
