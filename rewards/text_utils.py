"""Reading text: messages, words in any script, n-grams. All in time linear in the text's length."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

# Of scripts that put no space between words, every letter counts as one; elsewhere a word is a run of letters,
# marks and digits, joined by single apostrophes or hyphens. Possessive, so nothing is ever tried twice.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = (
    rf"[[{_UNSPACED}]&&\p{{L}}]\p{{M}}*+"
    rf"|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]++(?:['’\-][[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]++)*+"
)


@functools.cache
def _word_pattern() -> Any:
    import regex  # knows scripts and possessive quantifiers; comes with transformers

    return regex.compile(_WORD, regex.V1)


def words(text: str) -> list[str]:
    """The words of a text in any script, as written.

    >>> words("It's 3.5 km — 你好!")
    ["It's", '3', '5', 'km', '你', '好']
    """
    return list(_word_pattern().findall(text))


def count_words(text: str) -> int:
    """How many words a text has, in any script; 0 for an empty one."""
    return len(words(text))


_count_words = count_words  # the name under which older plug-ins import it


def plain_tokens(text: str) -> list[str]:
    """Lower-cased tokens, everything but letters, marks and digits taken as a space.

    >>> plain_tokens("The cat, the_hat!")
    ['the', 'cat', 'the', 'hat']
    """
    import regex

    return list(regex.findall(r"[\p{L}\p{M}\p{N}]++", text.lower()))


def text_of(completion: Any) -> str:
    """A completion as one string: itself, or what the assistant says in a list of chat messages.

    Of several messages those of the assistant count (all of them where no message has that role), each on a line
    of its own; of a content in parts, the parts of type text.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        return _content(completion)
    if isinstance(completion, Sequence):
        messages = [message for message in completion if isinstance(message, Mapping)]
        spoken = [m for m in messages if m.get("role", "assistant") == "assistant"] or messages
        return "\n".join(_content(message) for message in spoken)
    return "" if completion is None else str(completion)


def prompt_text_of(prompt: Any) -> str:
    """A prompt as one string: itself, or the contents of all chat messages, one after the other."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return "\n".join(_content(message) for message in prompt if isinstance(message, Mapping))
    return text_of(prompt)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def distinct_share(units: Sequence[Any], n: int) -> float:
    """Different n-grams / all n-grams; where there are fewer than n units, of the units themselves; 1 for none."""
    size = n if len(units) >= n else 1
    grams = list(zip(*(units[start:] for start in range(size)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def fenced_block(text: str, language: str) -> str | None:
    """The contents of the first Markdown block fenced as ``language``, else of the first block, else None.

    An opened block that is never closed reaches to the end.
    """
    blocks: list[tuple[str, str]] = []
    lines: list[str] = []
    fence: str | None = None
    for line in text.splitlines():
        mark = line.strip()
        if fence is None and mark.startswith("```"):
            fence, lines = mark[3:].strip().lower(), []
        elif fence is not None and mark == "```":
            blocks.append((fence, "\n".join(lines)))
            fence = None
        elif fence is not None:
            lines.append(line)
    if fence is not None:
        blocks.append((fence, "\n".join(lines)))
    named = [block for name, block in blocks if name == language]
    found = named or [block for _, block in blocks]
    return found[0] if found else None


def shortened(text: str, longest: int = 60) -> str:
    """A text for a sentence or a line of a listing: quoted, cut in the middle of what is too long."""
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]}…{text[-(longest // 3) :]}"
    return repr(text)
