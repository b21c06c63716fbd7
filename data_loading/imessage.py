"""iMessage conversations as rows to learn one's own replies from.

Reads what ``imessage-exporter -f txt -o message_data`` writes: a file per conversation, in which a message is

    May 17, 2022  5:29:42 PM (Read by you after 1 minute)      the date, at the beginning of the line
    +15551234567                                               who: "Me", a number, an address, a name
    one line or several
                                                               an empty line

Left out are group chats (their file name lists people, with commas), short files, announcements, tapbacks, the indented
copies of a thread's replies, and lines that are an attachment's path. A pair is their messages in a row and mine after
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import DataLoadError, InvalidConfigurationError
from data_loading.normalising import normalised

SHORTEST_FILE = 30  # lines
FEWEST_PAIRS = 10
SPLITS = ("train", "valid", "test")

_STAMP = re.compile(r"^[A-Za-z]{3} \d{2}, \d{4}\s+\d{1,2}:\d{2}:\d{2}\s*(?:[AP]M)?\s*(?P<rest>.*)$")
_NOTES = re.compile(
    r"^(This message responded to an earlier message\.|This message was deleted from the conversation!"
    r"|Sent with .{1,40}|Attachment missing!|Tapbacks:|Reactions:|Edited .{1,60} later:)$"
)
_TAPBACK = re.compile(r"^(Loved|Liked|Disliked|Laughed|Emphasized|Questioned|Sticker|Removed) by .{1,80}$")
_PATH = re.compile(
    r"^(?:~|/|[A-Za-z]:\\)?[^\n]*(?:Library/Messages/|MobileSync/Backup/|StickerCache/)[^\n]*$"
    r"|^(?:/|~/|\./)?(?:[\w.~+-]+/)+[\w.~+-]+\.\w{2,5}$"
)


class Message(NamedTuple):
    """What somebody wrote at a time."""

    sender: str
    text: str


class Pair(NamedTuple):
    """Their messages in a row, and the reply."""

    theirs: str
    mine: str


@dataclass
class ParsedExport:
    """The conversations of an export.

    Attributes:
        conversations: pairs by file name, in the order of time. left_out: file name to the reason.
    """

    conversations: dict[str, list[Pair]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        pairs = sum(map(len, self.conversations.values()))
        reasons = list(self.left_out.values())
        counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        out = ", ".join(
            f"{n} {reason if n > 1 else reason.replace('chats', 'chat')}" for reason, n in counts.items()
        )
        talks = (
            "1 conversation" if len(self.conversations) == 1 else f"{len(self.conversations)} conversations"
        )
        return f"{pairs} pairs in {talks}" + (f"; left out: {out}" if out else "")


# Reading -------------------------------------------------------------------------------------------------


def read_messages(text: str) -> list[Message]:
    """The messages of one conversation's file, those without words left out.

    >>> read_messages("May 17, 2022  5:29:42 PM\\nMe\\nHello\\nthere\\n\\nMay 18, 2022  9:00:00 AM\\n+15551\\nHi\\n")
    [Message(sender='Me', text='Hello\\nthere'), Message(sender='+15551', text='Hi')]
    """
    messages = []
    for block in _blocks(text.removeprefix("\ufeff").splitlines()):
        rest = _STAMP.sub(r"\g<rest>", block[0])
        if len(block) < 2 or (rest and not rest.startswith("(")):
            continue  # "… named the conversation …": an announcement has no sender's line
        words = [
            line.rstrip() for line in block[2:] if not (line.startswith("    ") or _is_note(line.strip()))
        ]
        said = "\n".join(words).strip()
        if said:
            messages.append(Message(block[1].strip(), said))
    return messages


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """The lines from one date with its time to the next; somebody may write a date alone."""
    block: list[str] = []
    for line in lines:
        if _STAMP.match(line):
            if block:
                yield block
            block = [line]
        elif block:
            block.append(line)
    if block:
        yield block


def _is_note(line: str) -> bool:
    return bool(_NOTES.match(line) or _TAPBACK.match(line) or (len(line) < 1000 and _PATH.match(line)))


def pairs_of(messages: Sequence[Message], me: str = "Me") -> list[Pair]:
    """Their consecutive messages, then my consecutive reply; what I began is nobody's reply.

    >>> pairs_of([Message("Me", "a"), Message("x", "b"), Message("x", "c"), Message("Me", "d"), Message("x", "e")])
    [Pair(theirs='b\\nc', mine='d')]
    """
    turns: list[tuple[bool, list[str]]] = []
    for message in messages:
        mine = message.sender == me
        if not turns or turns[-1][0] != mine:
            turns.append((mine, []))
        turns[-1][1].append(message.text)
    return [
        Pair("\n".join(theirs), "\n".join(mine))
        for (is_mine, theirs), (_, mine) in pairwise(turns)
        if not is_mine
    ]


def read_export(folder: str | Path, me: str = "Me") -> ParsedExport:
    """Every conversation of an export that has something to learn from.

    Args:
        me: how the export calls its owner (the exporter's ``--custom-name``).
    Raises:
        DataLoadError: no folder, no .txt file, or nothing in them to learn from.
    """
    above = Path(folder).expanduser()
    if not above.is_dir():
        raise DataLoadError(f"--export: {above} is no folder; give the one that imessage-exporter -o named")
    files = sorted(above.glob("*.txt"))
    if not files:
        raise DataLoadError(
            f"--export: {above} has no .txt files; export with imessage-exporter -f txt -o {above}"
        )
    parsed = ParsedExport()
    for file in files:
        reason, pairs = _read_file(file, me)
        if reason:
            parsed.left_out[file.name] = reason
        else:
            parsed.conversations[file.name] = pairs
    if not parsed.conversations:
        raise DataLoadError(
            f"--export: {above} holds nothing to learn from ({parsed}); a conversation of two with at least "
            f"{FEWEST_PAIRS} replies by {me!r} is needed (--me says what the export calls you)"
        )
    return parsed


def _read_file(file: Path, me: str) -> tuple[str, list[Pair]]:
    if "," in file.name:
        return "group chats", []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataLoadError(f"{file}: cannot be read ({reason}); export it again") from error
    if text.count("\n") + 1 < SHORTEST_FILE:
        return f"of fewer than {SHORTEST_FILE} lines", []
    messages = read_messages(text)
    if len({message.sender for message in messages} - {me}) > 1:
        return "group chats", []
    pairs = pairs_of(messages, me)
    return ("", pairs) if len(pairs) >= FEWEST_PAIRS else (f"of fewer than {FEWEST_PAIRS} pairs", [])


# Rows ----------------------------------------------------------------------------------------------------


def split_rows(
    parsed: ParsedExport,
    name: str,
    *,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.0,
    context_words: int = 24,
    as_messages: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Rows to train on and to be judged by, of which the first have seen nothing of the others.

    The last part of every conversation is set aside, as what is to be answered later comes later. Context never
    reaches across the border, and an exchange that was had in training, too, is left out of the others.

    Args:
        name: the owner's, who speaks after it: ``"…\\nUser: see you?\\nJo:"`` → ``" at 8"``.
        context_words: of what was said before, at most so many words (24 are about 32 tokens).
        as_messages: rows for a chat template in place of lines.
    Returns:
        "train", "valid" and "test" to rows as ``sft`` reads them.
    """
    if not name.strip() or ":" in name or "\n" in name:
        raise InvalidConfigurationError(
            f"--name: a name without colon or line break is expected, found {name!r}"
        )
    for option, share in (("--validation-fraction", validation_fraction), ("--test-fraction", test_fraction)):
        if not 0 <= share < 1:
            raise InvalidConfigurationError(f"{option}: at least 0 and below 1 is expected, found {share:g}")
    if validation_fraction + test_fraction >= 1:
        raise InvalidConfigurationError(
            "--validation-fraction, --test-fraction: nothing would be left to train on"
        )
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    known: set[tuple[str, str]] = set()
    for split in SPLITS:  # train first: what it has, the others must not have
        new = set()
        for pairs in parsed.conversations.values():
            part = pairs[_part(len(pairs), split, validation_fraction, test_fraction)]
            for number, pair in enumerate(part):
                exchange = (normalised(pair.theirs), normalised(pair.mine))
                if exchange in known:
                    continue
                new.add(exchange)
                rows[split].append(_row(part[:number], pair, name, context_words, as_messages))
        known |= new
    return rows


def _part(count: int, split: str, validation: float, test: float) -> slice:
    first_valid = count - round(count * (validation + test))
    first_test = count - round(count * test)
    return {
        "train": slice(0, first_valid),
        "valid": slice(first_valid, first_test),
        "test": slice(first_test, count),
    }[split]


def _row(
    before: Sequence[Pair], pair: Pair, name: str, context_words: int, as_messages: bool
) -> dict[str, Any]:
    if as_messages:
        messages: list[dict[str, str]] = []
        words = 0
        for earlier in reversed(before):
            words += len(earlier.theirs.split()) + len(earlier.mine.split())
            if words > context_words:
                break
            messages[:0] = [_said("user", earlier.theirs), _said("assistant", earlier.mine)]
        return {"messages": [*messages, _said("user", pair.theirs), _said("assistant", pair.mine)]}
    # Few words may span many lines; more than context_words of the last pairs are never needed.
    text = "".join(f"\nUser: {one.theirs}\n{name}: {one.mine}" for one in before[-max(context_words, 1) :])
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    context = text[starts[max(len(starts) - context_words, 0)] :] if starts and context_words else ""
    return {"prompt": f"{context}\nUser: {pair.theirs}\n{name}:", "completion": f" {pair.mine}"}


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
