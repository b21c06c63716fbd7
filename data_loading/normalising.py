"""When two prompts are one: the same text but for case, white space and Unicode's several spellings."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np


def normalised(prompt: Any) -> str:
    """The text that is compared. Of a chat: all but the system message, which many rows share.

    >>> normalised("  What is\\n2 + 2? ")
    'what is 2 + 2?'
    """
    if isinstance(prompt, str):
        return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    turns = [message for message in prompt if message["role"] != "system"]
    if len(turns) == 1:  # a question is one question, whether it came as a text or as a message
        return normalised(turns[0]["content"])
    return "\n".join(f"{message['role']}: {normalised(message['content'])}" for message in turns)


def prompt_key(row: Mapping[str, Any]) -> int:
    """64 bits of a hash of what a row asks: of its prompt, or of all where it is one text.

    Two different prompts of a million share a key with a probability of 3e-8.
    """
    text = (
        normalised(row["prompt"]) if row.get("prompt") else normalised(row.get("text") or row["completion"])
    )
    return text_key(text.encode())


def text_key(data: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def shared(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool: which of ``keys`` are among ``others``."""
    found: np.ndarray = np.isin(keys, others)
    return found


def repeated(keys: np.ndarray) -> int:
    """How many rows have a prompt that an earlier row has."""
    return len(keys) - len(np.unique(keys))
