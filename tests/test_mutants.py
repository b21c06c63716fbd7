"""The planted mistakes are up to date: their text is there, their tests are there, no mistake is left out."""

from __future__ import annotations

import re

import pytest

from benchmarks.mutants import MISTAKES, MUTANTS, ROOT, Mutant, problems, selection


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    assert problems(mutant) == ""
    assert mutant.old != mutant.new


def test_every_mistake_is_planted_and_every_mutant_has_its_own_name() -> None:
    assert {m.mistake for m in MUTANTS} == set(MISTAKES) >= set(range(1, 16))
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_has_gone_stale_says_so_in_a_sentence() -> None:
    mutant, other = MUTANTS[0], MUTANTS[1]
    assert problems(mutant._replace(old="no such text")).endswith(
        "stands 0 times in " + mutant.file + ", once is expected"
    )
    assert "there is no tests/nowhere.py" in problems(mutant._replace(tests="tests/nowhere.py"))
    assert 'has "nobody"' in problems(mutant._replace(tests=f"{selection(other)[0][0]} -k nobody"))


def test_the_table_of_the_documents_is_the_list_and_its_tests_exist() -> None:
    page = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|[^|]*\| ([\w-]+) \| `(test_\w+\.py)::(\w+)", page, flags=re.MULTILINE)
    assert [(int(number), name) for number, name, _, _ in rows] == [(m.mistake, m.name) for m in MUTANTS]
    for mutant, (_, name, file, test) in zip(MUTANTS, rows, strict=True):
        found = [ROOT / f for f in selection(mutant)[0] if f.endswith("/" + file)]
        assert found, f"{name}: {file} is not among its tests"
        assert f"def {test}(" in found[0].read_text(encoding="utf-8"), f"{name}: there is no {test}"
