"""The planted mistakes are up to date: their text is there, their tests are there, no mistake is left out."""

from __future__ import annotations

import pytest

from benchmarks.mutants import MISTAKES, MUTANTS, Mutant, problems


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    assert problems(mutant) == ""
    assert mutant.old != mutant.new


def test_every_mistake_is_planted_and_every_mutant_has_its_own_name() -> None:
    assert {m.mistake for m in MUTANTS} == set(MISTAKES)
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
