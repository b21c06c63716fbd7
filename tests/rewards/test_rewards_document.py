"""docs/rewards.md: every example in it gives what it says, and every reward is in it."""

from __future__ import annotations

import doctest
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from config.errors import InvalidConfigurationError
from rewards.registry import names, registered, resolve
from rewards.sandbox.choice import proven_backend
from rewards.show import own_name

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))
EXAMPLES = {title: re.findall(r"```python\n(>>>.*?)```", body, re.DOTALL) for title, body in SECTIONS.items()}
#: It needs a server, and has its example in tests/rewards/test_judge.py.
WITHOUT_EXAMPLE = {"judge"}


def score(
    name: str, completion: str, prompt: str = "", config: Mapping[str, Any] | None = None, **columns: Any
) -> float | None:
    reward = resolve({"name": name, "config": dict(config or {})})
    own = {column: [value] for column, value in columns.items()}
    [said] = reward(prompts=[prompt], completions=[completion], **own)
    return said if said is None else round(said, 4)


@pytest.mark.parametrize("title", [title for title, examples in EXAMPLES.items() if examples])
def test_the_examples_are_true(title: str) -> None:
    if title == "code_execution":
        try:
            proven_backend()
        except InvalidConfigurationError as error:
            pytest.skip(str(error))
    example = doctest.DocTestParser().get_doctest(
        "\n".join(EXAMPLES[title]), {"score": score}, title, "docs/rewards.md", 0
    )
    assert example.examples
    told: list[str] = []
    doctest.DocTestRunner().run(example, out=told.append)
    assert not told, "".join(told)


def test_every_reward_has_an_example() -> None:
    shown = {
        own_name(name)
        for title in EXAMPLES
        for name in re.findall(r'score\(\s*"([^"]+)"', "".join(EXAMPLES[title]))
    }
    ours = {
        own_name(name)
        for name in names()
        if getattr(registered(name), "__module__", "").startswith("rewards.")
    }
    assert ours - WITHOUT_EXAMPLE <= shown


def test_every_section_is_named_after_rewards() -> None:
    for title in SECTIONS:
        for name in re.findall(r"\w+", title):
            assert name in names(), name
