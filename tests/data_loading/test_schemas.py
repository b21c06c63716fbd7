"""What each kind of row becomes for each trainer, written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.data_config import DataConfig
from config.errors import DataLoadError
from data_loading.loading import has_steps, load_pairs, load_preferences, load_prompts, load_steps

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
OTHER = {"role": "assistant", "content": "What?"}
SYSTEM = {"role": "system", "content": "Be brief."}
LOAD: dict[str, Any] = {
    "prompts": load_prompts,
    "pairs": load_pairs,
    "preferences": load_preferences,
    "steps": load_steps,
}


@pytest.mark.parametrize(
    ("kind", "row", "schema", "expected"),
    [
        ("prompts", {"prompt": "a"}, "prompt", [{"prompt": "a"}]),
        ("prompts", {"prompt": [USER], "n": 1}, "prompt", [{"prompt": [USER], "n": 1}]),
        (
            "prompts",
            {"prompt": "a", "completion": "b", "test_cases": [1], "meta": {}},
            "prompt and completion",
            [{"prompt": "a", "completion": "b", "test_cases": [1], "meta": {}}],
        ),
        (
            "prompts",
            {"prompt": "a", "system": "s"},
            "prompt",
            [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}],
        ),
        (
            "prompts",
            {"messages": [SYSTEM, USER, ASSISTANT], "tools": []},
            "chat (messages)",
            [{"prompt": [SYSTEM, USER], "completion": "Hello!", "tools": []}],
        ),
        ("prompts", {"messages": [USER]}, "chat (messages)", [{"prompt": [USER]}]),
        (
            "prompts",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference (prompt, chosen, rejected)",
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        ),
        ("pairs", {"prompt": "a", "completion": "b", "x": 1}, "prompt and completion", [("a", "b")]),
        (
            "pairs",
            {"prompt": [USER], "completion": [ASSISTANT]},
            "prompt and completion",
            [([USER], "Hello!")],
        ),
        ("pairs", {"prompt": "a", "completion": "b", "reward": 1}, "scored answers", [("a", "b")]),
        ("pairs", {"messages": [USER, ASSISTANT, USER, OTHER]}, "chat", [([USER, ASSISTANT, USER], "What?")]),
        ("pairs", {"text": "a b"}, "text", [{"text": "a b"}]),
        ("pairs", {"text": "a b", "reward": "1.0"}, "scored text", [{"text": "a b"}]),
        (
            "preferences",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference (prompt",
            [("a", "b", "c")],
        ),
        (
            "preferences",
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
            "preference (prompt",
            [([USER], "Hello!", "What?")],
        ),
        (
            "preferences",  # as in UltraFeedback: whole chats beside the prompt
            {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            "preference (prompt",
            [([USER], "Hello!", "What?")],
        ),
        (
            "preferences",
            {"chosen": "a b c", "rejected": "a b d"},
            "preference (chosen",
            [("a b", " c", " d")],
        ),
        (
            "preferences",
            {"chosen": "It is blue.", "rejected": "It is black."},
            "pref",
            [("It is", " blue.", " black.")],
        ),
        (
            "preferences",
            {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            "preference (chosen",
            [([USER], "Hello!", "What?")],
        ),
        (
            "preferences",
            {"prompt": "a", "completions": ["x", "y", "z"]},
            "ranked",
            [("a", ["x", "y", "z"], [0.0, -1.0, -2.0])],
        ),
        (
            "preferences",  # the best first, in the file's order where rewards are equal
            {"prompt": "a", "completions": ["x", "y", [ASSISTANT]], "rewards": [0, "1", 1.0]},
            "ranked",
            [("a", ["y", "Hello!", "x"], [1.0, 1.0, 0.0])],
        ),
        (
            "preferences",  # as a cell of a table
            {"prompt": "a", "completions": ' ["x", "y"]', "rewards": "[1, 2.5]"},
            "ranked",
            [("a", ["y", "x"], [2.5, 1.0])],
        ),
        (
            "steps",
            {"prompt": "a", "steps": ["x", "y\n"], "labels": [True, 0.25]},
            "stepwise supervision (prompt, steps",
            [("a", ["x", "y\n"], [1.0, 0.25])],
        ),
        (
            "steps",  # TRL's
            {"prompt": [USER], "completions": ["x", "y"], "labels": [True, False]},
            "stepwise supervision (prompt, completions",
            [([USER], ["x", "y"], [1.0, 0.0])],
        ),
        (
            "steps",
            {"prompt": "a", "steps": '["x"]', "labels": "[false]"},
            "stepwise supervision (prompt, steps",
            [("a", ["x"], [0.0])],
        ),
        ("preferences", {"prompt": "a", "completion": "b", "reward": "0.25"}, "scored", [("a", "b", 0.25)]),
        ("preferences", {"text": "8 20", "reward": "-1e-1"}, "scored text", [("", "8 20", -0.1)]),
        ("preferences", {"prompt": "a", "completion": "b", "label": False}, "unpaired", [("a", "b", 0.0)]),
        ("preferences", {"prompt": "a", "completion": "b", "label": True}, "unpaired", [("a", "b", 1.0)]),
        ("preferences", {"prompt": "a", "completion": "b", "label": 1}, "unpaired", [("a", "b", 1.0)]),
        ("preferences", {"prompt": "a", "completion": "b", "label": "False"}, "unpaired", [("a", "b", 0.0)]),
        ("preferences", {"prompt": "a", "completion": "", "label": 0}, "unpaired", [("a", "", 0.0)]),
        ("preferences", {"prompt": "a", "completion": "", "reward": 0}, "scored", [("a", "", 0.0)]),
        (
            "preferences",
            {"prompt": "a", "completion": [{"role": "assistant", "content": ""}], "reward": 0},
            "scored",
            [("a", "", 0.0)],
        ),
        ("pairs", {"prompt": "a", "completion": "b", "label": "geography"}, "prompt and", [("a", "b")]),
        (
            "preferences",  # the margin of an implicit prompt's pair counts, too
            {"chosen": "a b c", "rejected": "a b d", "margin": "2"},
            "preference (chosen",
            [{"prompt": "a b", "chosen": " c", "rejected": " d", "margin": 2.0}],
        ),
    ],
)
def test_a_row_becomes(kind: str, row: dict[str, Any], schema: str, expected: list[Any]) -> None:
    rows = LOAD[kind]([row])
    assert rows.report.schema.startswith(schema)
    assert rows.report.used == len(rows) == len(expected)
    found = [
        dict(one) if isinstance(wanted, dict) else tuple(one.values())
        for one, wanted in zip(rows, expected, strict=True)
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("kind", "row", "sentence"),
    [
        ("prompts", {}, r'"prompt" is missing \(columns: none\)'),
        ("prompts", {"question": "a", "answer": "b"}, 'try prompt_column="question"$'),
        (
            "pairs",
            {"question": "a", "answer": "b"},
            'try prompt_column="question", completion_column="answer"$',
        ),
        (
            "pairs",
            {"prompt": "a", "response": "b"},
            '"completion" is missing .*try completion_column="response"',
        ),
        (
            "pairs",
            {"prompt": "a", "completion": None},
            '"completion" is null; a prompt and its completion is expected',
        ),
        ("prompts", {"text": "a"}, "a prompt is expected, found text .*; that is read by load_pairs"),
        ("preferences", {"prompt": "a"}, "found prompt .*; that is read by load_prompts"),
        ("prompts", {"prompt": 3}, '"prompt" must be a text or a chat, found a number'),
        ("prompts", {"prompt": True}, "found true/false"),
        ("prompts", {"prompt": " \n"}, '"prompt" is empty'),
        ("prompts", {"prompt": []}, '"prompt" has no messages'),
        ("prompts", {"prompt": [{"role": "user", "content": " "}]}, '"prompt" is empty'),
        ("prompts", {"prompt": ["a"]}, '"prompt", message 1: role and content are expected, found a text'),
        (
            "prompts",
            {"prompt": [USER, {"role": "user"}]},
            '"prompt", message 2: "content" must be a text, found null',
        ),
        ("prompts", {"prompt": [{"content": "a"}]}, 'message 1: "role" must be a text'),
        ("prompts", {"prompt": "a", "system": 3}, '"system" must be a text, found a number'),
        ("prompts", {"prompt": "a", "completions": []}, 'the field "completions" has the name of something'),
        ("prompts", {"messages": [SYSTEM, ASSISTANT]}, "must have a message of the user"),
        ("pairs", {"messages": [USER]}, "must end with the assistant's message"),
        ("pairs", {"prompt": "a", "completion": ["b"]}, '"completion", message 1'),
        ("pairs", {"prompt": "a", "completion": [USER]}, "must be one message of the assistant, found user"),
        ("pairs", {"prompt": "a", "completion": ""}, '"completion" is empty'),
        ("pairs", {"prompt": "a", "completion": "b", "label": True}, '"label" says that some'),
        ("pairs", {"prompt": "a", "completion": "b", "label": 0}, '"label" says that some'),
        ("pairs", {"prompt": "a", "completion": "", "reward": 1}, '"completion" is empty'),
        ("preferences", {"text": "", "reward": 1}, '"text" is empty'),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": ""}, '"rejected" is empty'),
        (
            "preferences",
            {"prompt": "a", "completions": ["b", "c", "b"], "rewards": [2, 1, 0]},
            "better and the worse answer are the same",
        ),
        ("pairs", {"text": "\udc00"}, "half a character"),
        ("preferences", {"chosen": "a b", "rejected": "c d"}, "must begin with the same prompt"),
        ("preferences", {"chosen": "a b", "rejected": "a b"}, "are the same, so there is nothing"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same, so there is nothing"),
        (
            "preferences",
            {"chosen": "a", "rejected": "a b"},
            "must begin with the same prompt and go on differently",
        ),
        (
            "preferences",
            {"chosen": [USER, ASSISTANT], "rejected": [OTHER]},
            "the same chat up to its last message",
        ),
        ("preferences", {"prompt": "a", "completions": ["b"]}, "at least two completions"),
        (
            "preferences",
            {"prompt": "a", "completions": ["b", "c"], "rewards": [1]},
            r"one entry per completion \(2\)",
        ),
        ("preferences", {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 1]}, "of different rank"),
        ("preferences", {"prompt": "a", "completions": "b"}, '"completions" must be a list, found a text'),
        ("preferences", {"prompt": "a", "completions": '["b"'}, "not JSON at column"),
        (
            "preferences",
            {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]},
            '"scores" stands beside "completions".*give rewards_column="scores" if more of it is better',
        ),
        ("preferences", {"prompt": "a", "responses": ["b", "c"]}, 'try completions_column="responses"$'),
        (
            "preferences",
            {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
            "found stepwise supervision .*; that is read by load_steps",
        ),
        (
            "steps",
            {"prompt": "a", "completions": ["b", "c"]},
            "an answer in steps with .* found ranked answers",
        ),
        ("steps", {"prompt": "a", "chosen": "b", "rejected": "c"}, "that is read by load_preferences"),
        ("steps", {"prompt": "a", "steps": [], "labels": []}, '"steps" has no steps'),
        (
            "steps",
            {"prompt": "a", "steps": ["b", 3], "labels": [1, 1]},
            '"steps", step 2: a text is expected',
        ),
        ("steps", {"prompt": "a", "steps": ["b", " "], "labels": [1, 1]}, '"steps, step 2" is empty'),
        ("steps", {"prompt": "a", "steps": ["b"], "labels": [1, 1]}, r"one entry per step \(1\), found 2"),
        (
            "steps",
            {"prompt": "a", "steps": ["b"], "labels": [2]},
            "a number from 0 to 1 is expected, found 2",
        ),
        ("steps", {"prompt": "a", "steps": ["b"], "labels": ["+"]}, "'\\+'"),
        ("steps", {"prompt": "a", "steps": ["b"], "labels": [float("nan")]}, "found nan"),
        (
            "preferences",
            {"prompt": "a", "completion": "b", "reward": "good"},
            "must be a finite number.* found 'good'",
        ),
        ("preferences", {"prompt": "a", "completion": "b", "reward": "nan"}, "must be a finite number"),
        ("preferences", {"prompt": "a", "completion": "b", "reward": True}, "must be a finite number"),
        ("preferences", {"prompt": "a", "completion": "b", "reward": [1]}, "must be a finite number"),
    ],
)
def test_a_row_that_fits_nothing_is_refused_with_what_to_do(
    kind: str, row: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataLoadError, match=sentence.removesuffix("$")) as caught:
        LOAD[kind]([row])
    text = str(caught.value)
    assert text.startswith("rows[0]: ")
    assert "\n" not in text
    if sentence.endswith("$"):
        assert text.removesuffix(' (on_bad_row="skip" leaves such rows out)').endswith(
            sentence[4:-1].split("try ")[-1]
        )


def test_every_row_has_to_fit_the_schema_of_the_first() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    with pytest.raises(
        DataLoadError, match=r'rows\[1\]: "completion" is missing .*it are: prompt and completion'
    ):
        load_pairs(rows)
    with pytest.raises(DataLoadError, match=r'rows\[1\]: "completion" is null'):
        load_pairs([rows[0], {"prompt": "a", "completion": None}])


def test_the_first_usable_row_decides_not_the_first() -> None:
    rows = load_pairs([{"junk": 1}, {"text": "a"}, {"text": "b"}], DataConfig(on_bad_row="skip"))
    assert rows.report.schema == "text"
    assert len(rows) == 2


def test_columns_have_the_names_that_the_config_says() -> None:
    config = DataConfig(prompt_column="question", completion_column="answer")
    row = {"question": "2+2?", "answer": "4 #### 4", "level": 1, "prompt": "not this"}
    assert load_pairs([row], config)[0] == {"prompt": "2+2?", "completion": "4 #### 4"}
    assert load_prompts([row], config)[0] == {
        "prompt": "2+2?",
        "answer": "4 #### 4",  # under its own name
        "completion": "4 #### 4",  # … and under ours
        "level": 1,
    }
    config = DataConfig(chosen_column="win", rejected_column="lose", reward_column="score", text_column="t")
    assert load_preferences([{"prompt": "a", "win": "b", "lose": "c"}], config)[0]["rejected"] == "c"
    assert load_preferences([{"t": "a", "score": 2}], config)[0] == {
        "prompt": "",
        "completion": "a",
        "reward": 2.0,
    }
    config = DataConfig(completions_column="answers", rewards_column="scores")
    assert load_preferences([{"prompt": "a", "answers": ["b", "c"], "scores": [1, 2]}], config)[0] == {
        "prompt": "a",
        "completions": ["c", "b"],
        "rewards": [2.0, 1.0],
    }
    config = DataConfig(steps_column="solution", labels_column="ratings")
    assert load_steps([{"prompt": "a", "solution": ["b"], "ratings": [1]}], config)[0]["labels"] == [1.0]
    config = DataConfig(messages_column="conversation")
    assert load_pairs([{"conversation": [USER, ASSISTANT]}], config)[0]["completion"] == "Hello!"


def test_the_system_message_of_a_row_comes_before_the_configs() -> None:
    config = DataConfig(system_prompt="Be brief.")

    def prompt(row: Any, options: DataConfig = config) -> Any:
        return load_prompts([row], options)[0]["prompt"]

    assert prompt("Hi") == [SYSTEM, USER]
    assert prompt([USER]) == [SYSTEM, USER]
    assert prompt({"prompt": "Hi", "system": "Sing."})[0]["content"] == "Sing."
    own = {"role": "system", "content": "Shout."}
    assert prompt([own, USER]) == [own, USER]
    assert prompt({"messages": [USER, ASSISTANT]}) == [SYSTEM, USER]
    assert prompt("Hi", DataConfig()) == "Hi"
    assert prompt("Hi", DataConfig(prompt_format="chat")) == [USER]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (['{"prompt": "a", "completions": ["b"], "labels": [true]}'], True),
        (["", '{"junk": 1}', '{"prompt": "a", "steps": ["b"], "labels": [1]}'], True),
        (
            ['{"prompt": "a", "completions": ["b", "c"]}', '{"prompt": "a", "steps": ["b"], "labels": [1]}'],
            False,
        ),
        (['{"prompt": "a", "chosen": "b", "rejected": "c", "steps": [], "labels": []}'], False),
        (["{"], False),
    ],
)
def test_whether_a_file_has_steps_is_seen_in_its_first_row_that_fits_anything(
    tmp_path: Path, rows: list[str], expected: bool
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    assert has_steps(DataConfig(train_path=str(file))) == expected


def test_lists_come_from_tables_too(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import datasets

    ranked = [{"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, 2.0]}]
    steps = [{"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}]
    for name, rows in (("ranked", ranked), ("steps", steps)):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "steps.csv").write_text('prompt,steps,labels\na,"[""b"", ""c""]","[true, false]"\n')
    assert load_preferences(tmp_path / "ranked.parquet")[0]["completions"] == ["c", "b"]
    expected = {"prompt": "a", "steps": ["b", "c"], "labels": [1.0, 0.0]}
    assert load_steps(tmp_path / "steps.parquet")[0] == expected
    assert load_steps(tmp_path / "steps.csv")[0] == expected
