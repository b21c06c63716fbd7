"""Names, modules and files all lead to a callable; a wrong one leads to a sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.errors import InvalidConfigurationError
from rewards import registry
from rewards.registry import names, register, resolve


@pytest.fixture(autouse=True)
def _leave_no_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names()  # our own rewards are registered once and for all
    before, modules = dict(registry._registered), set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    registry._registered.clear()
    registry._registered.update(before)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def brevity(completions: list[str]) -> list[float]:
    return [1.0 / (1 + len(text)) for text in completions]


class Politeness:
    def __call__(self, completions: list[str]) -> list[float]:
        return [float("please" in text) for text in completions]


def test_our_own_rewards_are_found_by_name_and_alias() -> None:
    assert {"default", "well_formed", "sequential_digits"} <= set(names())
    assert resolve("default") is resolve("well_formed")
    assert names() == sorted(names())


def test_a_callable_is_itself() -> None:
    polite = Politeness()
    assert resolve(brevity) is brevity
    assert resolve(polite) is polite


def test_a_class_is_instantiated() -> None:
    assert isinstance(resolve(Politeness), Politeness)


def test_registering_gives_a_name_and_aliases_and_leaves_the_function_alone() -> None:
    assert register("brevity", "short")(brevity) is brevity
    assert resolve("brevity") is resolve("short") is brevity
    register("brevity")(brevity)  # again, as a notebook does


def test_a_name_belongs_to_one_reward() -> None:
    with pytest.raises(InvalidConfigurationError, match=r"'default' already belongs to .*well_formed"):
        register("default")(brevity)


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "1st", "two words"])
def test_a_name_that_could_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(InvalidConfigurationError, match="cannot be registered"):
        register(name)(brevity)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InvalidConfigurationError, match="did you mean 'sequential_digits'"):
        resolve("sequencial_digit")
    with pytest.raises(InvalidConfigurationError, match=r"there are: .*default.*well_formed"):
        resolve("zzz")


def test_a_module_and_a_function_in_it() -> None:
    assert resolve("rewards.default_reward:well_formed") is resolve("default")
    with pytest.raises(InvalidConfigurationError, match="did you mean 'well_formed'"):
        resolve("rewards.default_reward:wel_formed")
    with pytest.raises(InvalidConfigurationError, match=r"cannot be imported .*ModuleNotFoundError"):
        resolve("no_such_package.rewards:f")


def test_a_file_and_a_function_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    (folder / "helper_beside_it.py").write_text("BONUS = 2.0\n")
    file = folder / "mine.py"
    file.write_text(
        "from helper_beside_it import BONUS\n"
        "def bonus(completions):\n    return [BONUS] * len(completions)\n"
        "def other(completions):\n    return [0.0] * len(completions)\n"
        "class Grader:\n    @staticmethod\n    def grade(completions):\n        return [3.0]\n"
    )
    assert resolve(f"{file}:bonus")(completions=["a", "b"]) == [2.0, 2.0]
    assert resolve(f"{file}:Grader.grade")(completions=["a"]) == [3.0]
    # Loaded once, so functions of one file share their module.
    assert resolve(f"{file}:other").__globals__ is resolve(f"{file}:bonus").__globals__


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    with pytest.raises(InvalidConfigurationError, match="does not exist"):
        resolve(f"{file}:f")
    file.write_text("def f(completions):\n    return [0.0]\nLIMIT = 3\n")
    with pytest.raises(InvalidConfigurationError, match=r"say which function .*defines: f"):
        resolve(str(file))
    with pytest.raises(InvalidConfigurationError, match=r"has no 'g'; there are: f"):
        resolve(f"{file}:g")
    with pytest.raises(InvalidConfigurationError, match="is a int, which cannot be called"):
        resolve(f"{file}:LIMIT")
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    for _ in range(2):  # a failed load leaves nothing half-loaded behind
        with pytest.raises(InvalidConfigurationError, match=r"does not run \(SyntaxError"):
            resolve(f"{broken}:f")


@pytest.mark.parametrize("thing", [None, 3, ["default"]])
def test_a_thing_that_cannot_be_called_is_refused(thing: object) -> None:
    with pytest.raises(InvalidConfigurationError, match="cannot be called"):
        resolve(thing)


def test_a_class_that_needs_arguments_is_refused() -> None:
    class Threshold:
        def __init__(self, limit: float) -> None:
            self.limit = limit

        def __call__(self, completions: list[str]) -> list[float]:
            return [self.limit for _ in completions]

    with pytest.raises(InvalidConfigurationError, match="without arguments"):
        resolve(Threshold)
    assert resolve(Threshold(1.0))(completions=["a"]) == [1.0]


@pytest.mark.parametrize("leaves", ["import sys\nsys.exit(0)", "raise SystemExit", "exit()"])
def test_a_file_that_ends_the_process_is_said(tmp_path: Path, leaves: str) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    file = folder / "leaves.py"
    file.write_text(f"def f(completions): return [0.0]\n{leaves}\n")
    with pytest.raises(InvalidConfigurationError, match="does not run \\(SystemExit"):
        resolve(f"{file}:f")


@pytest.mark.parametrize("name", ["~nobody-here/x.py", "x" * 5000 + ".py", "a\0b.py"])
def test_a_path_that_is_none_is_said(name: str) -> None:
    with pytest.raises(InvalidConfigurationError, match="The reward file"):
        resolve(f"{name}:f")
