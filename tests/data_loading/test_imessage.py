"""iMessage exports made up here: what is read, what is left out, what never crosses the split."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.errors import DataLoadError, InvalidConfigurationError
from data_loading.imessage import Message, Pair, pairs_of, read_export, read_messages, split_rows
from data_loading.loading import load_pairs

TEXT = """May 17, 2022  5:29:42 PM (Read by you after 1 hour, 49 seconds)
+15551230000
See you
at 8?

    May 17, 2022  5:31:00 PM
    Me
    a reply in the thread
May 17, 2022  5:30:00 PM
Me
Yes
/Users/jo/Library/Messages/Attachments/3c/12/at_0.heic
attachments/AB/IMG_1.HEIC
Tapbacks:
    Loved by +15551230000
This message responded to an earlier message.

May 17, 2022  6:00:00 PM You named the conversation Dinner

May 18, 2022  9:00:00 AM
+15551230000
attachments/AB/IMG_2.HEIC

May 18, 2022  9:01:00 AM
Me
and/or later: 1/2 of it
"""


def conversation(replies: int, who: str = "+15551230000", say: str = "line") -> str:
    return "".join(
        f"May {1 + n // 50:02d}, 2022  5:{n % 60:02d}:42 PM\n{'Me' if n % 2 else who}\n{say} {n}\n\n"
        for n in range(2 * replies)
    )


def export(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_words_are_read_and_all_else_is_not() -> None:
    assert read_messages(TEXT) == [
        Message("+15551230000", "See you\nat 8?"),
        Message("Me", "Yes"),
        Message("Me", "and/or later: 1/2 of it"),
    ]


def test_a_date_that_somebody_wrote_is_a_word_of_theirs() -> None:
    text = "May 17, 2022  5:29:42 PM\nMe\nabout that day:\nMay 18, 2022 was great\nwasn't it\n"
    assert read_messages(text) == [Message("Me", "about that day:\nMay 18, 2022 was great\nwasn't it")]


def test_pairs_are_runs_and_begin_with_the_other() -> None:
    said = [Message(sender, text) for sender, text in ("Ma", "xb", "xc", "Md", "Me", "xf")]
    assert pairs_of(said, me="M") == [Pair("b\nc", "d\ne")]


def test_groups_and_short_ones_are_left_out_and_counted(tmp_path: Path) -> None:
    three = conversation(20) + conversation(20, who="a@b.org")
    export(tmp_path, jo=conversation(20), short=conversation(3), few=conversation(9), three=three)
    (tmp_path / "Ann, Bob.txt").write_text(conversation(20))
    parsed = read_export(tmp_path)
    assert list(parsed.conversations) == ["jo.txt"]
    assert parsed.left_out == {
        "Ann, Bob.txt": "group chats",
        "few.txt": "of fewer than 10 pairs",
        "short.txt": "of fewer than 30 lines",
        "three.txt": "group chats",
    }
    assert str(parsed).startswith("20 pairs in 1 conversation; left out: 2 group chats, ")


def test_nothing_crosses_the_split(tmp_path: Path) -> None:
    parsed = read_export(export(tmp_path, a=conversation(20), b=conversation(40, say="word")))
    rows = split_rows(parsed, "Jo", validation_fraction=0.25, test_fraction=0.1)
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 13 + 26,
        "valid": 5 + 10,
        "test": 2 + 4,
    }
    assert rows["train"][0] == {"prompt": "\nUser: line 0\nJo:", "completion": " line 1"}
    assert rows["train"][1]["prompt"] == "User: line 0\nJo: line 1\nUser: line 2\nJo:"
    lines = {
        split: {
            line.split(": ")[-1]
            for row in part
            for line in (row["prompt"] + row["completion"]).splitlines()[1:]
        }
        for split, part in rows.items()
    }
    numbered = {split: {line for line in found if line[-1:].isdigit()} for split, found in lines.items()}
    assert not numbered["train"] & (numbered["valid"] | numbered["test"])
    assert not numbered["valid"] & numbered["test"]


def test_an_exchange_that_was_had_in_training_is_no_test(tmp_path: Path) -> None:
    same = "".join(
        f"May 01, 2022  5:00:00 PM\n{who}\n{text}\n\n"
        for _ in range(20)
        for who, text in (("x", "ok"), ("Me", "OK "))
    )
    rows = split_rows(read_export(export(tmp_path, a=same)), "Jo", validation_fraction=0.5)
    assert (len(rows["train"]), rows["valid"]) == (10, [])


def test_context_is_so_many_words(tmp_path: Path) -> None:
    parsed = read_export(export(tmp_path, a=conversation(20)))
    rows = split_rows(parsed, "Jo", validation_fraction=0, context_words=4)["train"]
    assert rows[5]["prompt"] == "8\nJo: line 9\nUser: line 10\nJo:"  # 8 / Jo: / line / 9
    assert (
        split_rows(parsed, "Jo", validation_fraction=0, context_words=0)["train"][5]["prompt"]
        == "\nUser: line 10\nJo:"
    )


def test_messages_are_chats_that_sft_reads(tmp_path: Path) -> None:
    parsed = read_export(export(tmp_path, a=conversation(20)))
    rows = split_rows(parsed, "Jo", validation_fraction=0, context_words=8, as_messages=True)["train"]
    assert [m["content"] for m in rows[4]["messages"]] == [f"line {n}" for n in range(4, 10)]
    assert load_pairs(rows)[4]["completion"] == "line 9"


def test_what_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataLoadError, match="is no folder; give the one that imessage-exporter"):
        read_export(tmp_path / "none")
    with pytest.raises(DataLoadError, match=r"has no \.txt files"):
        read_export(tmp_path)
    export(tmp_path, a=conversation(20))
    with pytest.raises(DataLoadError, match="at least 10 replies by 'Jo' is needed"):
        read_export(tmp_path, me="Jo")
    with pytest.raises(InvalidConfigurationError, match="--name: a name without colon"):
        split_rows(read_export(tmp_path), "Jo:")
    with pytest.raises(InvalidConfigurationError, match="nothing would be left to train on"):
        split_rows(read_export(tmp_path), "Jo", validation_fraction=0.6, test_fraction=0.4)
