"""Test cases: their forms, what they compare, and what crosses between a test and its program."""

from __future__ import annotations

from typing import Any

import pytest

from config.errors import RewardError
from rewards.sandbox.backends import Backend
from rewards.sandbox.grading import Assertions, Printed, Returned, read_cases, run_case, same_text, same_value
from rewards.sandbox.limits import Limits

LIMITS = Limits(seconds=3)


def test_the_forms_are_read() -> None:
    assert read_cases(None, 0) == []
    assert read_cases("assert f(1) == 2", 0) == [Assertions("assert f(1) == 2")]
    assert read_cases(["assert a", "assert b"], 0) == [Assertions("assert a"), Assertions("assert b")]
    assert read_cases({"input": "1\n", "expected": "2"}, 0) == [Printed("1\n", "2")]
    assert read_cases([{"input": ["1", 2], "output": 3}], 0) == [Printed("1\n2", "3")]
    assert read_cases('[{"input": "", "expected_output": "x"}]', 0) == [Printed("", "x")]
    assert read_cases([{"function": "f", "args": [1], "kwargs": {"k": 2}, "expected": None}], 0) == [
        Returned("f", (1,), {"k": 2}, None)
    ]
    assert read_cases([{"fn_name": "f", "input": [1, 2], "output": 3}], 0) == [Returned("f", (1, 2), {}, 3)]
    assert read_cases([{"test": "def check(c): pass", "entry_point": "f"}], 0) == [
        Assertions("def check(c): pass\ncheck(f)\n")
    ]
    assert read_cases("[assert_ok(x) for x in 'ab']", 0) == [Assertions("[assert_ok(x) for x in 'ab']")]


@pytest.mark.parametrize(
    "case", [3, {"input": "1"}, {"expected": 2}, None, {"function": "f", "args": 3, "expected": 1}]
)
def test_another_form_is_refused_by_row_and_number(case: Any) -> None:
    with pytest.raises(RewardError, match=r"Test case 1 of row 7 is .* expected an assertion"):
        read_cases(["assert True", case], 7)
    with pytest.raises(RewardError, match="The test cases of row 7 are a int"):
        read_cases(3, 7)


def test_lines_are_compared_without_the_white_space_at_their_ends() -> None:
    assert same_text("a \r\nb\n\n", "a\nb")
    assert not same_text("a b", "ab")
    assert not same_text(" a", "a")
    assert not same_text("a\nb", "a")
    assert same_text("", "\n")


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (3, 3, True), (3, 4, False), (True, 1, False), (1, True, False), (3, 3.0, True), (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False), ((1, (2,)), [1, [2]], True), ([1, 2], [2, 1], False), ("1", 1, False),
        ({"a": (1,)}, {"a": [1]}, True), ({"a": 1}, {"a": 1, "b": 2}, False), (None, None, True), (None, 0, False),
        ({1, 2}, {2, 1}, True), ([True], [1], False), (10**400, 1.5, False), ("x", 1.5, False), (b"a", "a", False),
    ],
)  # fmt: skip
def test_values_are_compared_by_type_and_content(value: Any, expected: Any, same: bool) -> None:
    assert same_value(value, expected) is same


PROGRAM = """
import collections
class Stack:
    def __init__(self): self.items, self.name = [], "stack"
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __contains__(self, x): return x in self.items
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)
    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)
def sort(xs): xs.sort()
def apply(f, xs): return [f(x) for x in xs]
def count(n):
    for i in range(n): yield i
def fail(kind): raise kind("because")
def root(x):
    if x < 0: raise ValueError("negative")
    return x ** 0.5
def words(text): return collections.Counter(text.split())
def pair(): return ("a", {1: {2}}, None)
def total(node): return 0 if node is None else node.value + total(node.next)
def statistics(xs): return sum(xs)
LIMIT = 10
"""
PASSING = {
    "plain values of every kind": "assert pair() == ('a', {1: {2}}, None) and isinstance(pair(), tuple)",
    "objects and their methods": "s = Stack()\ns.push(1); s.push(2)\nassert s.pop() == 2 and len(s) == 1 and s[0] == 1",
    "attributes": "s = Stack()\ns.name = 'x'\nassert s.name == 'x' and list(s) == [] and 3 not in s",
    "two of the program's objects": "assert Vector(1, 2) + Vector(1, 1) == Vector(2, 3) != Vector(0, 0)",
    "changes in place": "xs = [3, 1, 2]\nassert sort(xs) is None\nassert xs == [1, 2, 3]",
    "functions of the test": "assert apply(lambda x: 2 * x, [1, 2]) == [2, 4]",
    "generators": "assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0",
    "exceptions": (
        "try:\n    root(-1)\nexcept ValueError as error:\n    assert str(error) == 'negative'\nelse:\n    assert False"
    ),
    "constants": "assert LIMIT == 10",
    "a counter": "assert words('a b a') == {'a': 2, 'b': 1}",
    "modules": "import math\nassert math.isclose(root(2), 1.41421356, rel_tol=1e-6)",
    "modules that the test did not import": "assert math.isclose(root(4), 2)",
    "a function named like a module": "assert statistics([1, 2]) == 3",
    "classes of the test": (
        "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n"
        "assert total(Node(1, Node(2))) == 3"
    ),
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(root(9), 3)\n"
        "assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()"
    ),
}
FAILING = {
    "another value": ("assert pair() == ('a', {1: {3}}, None)", "an assertion does not hold"),
    "a message": ("assert LIMIT == 11, 'not eleven'", "AssertionError: not eleven"),
    "an exception": ("root(-1)", "ValueError: negative"),
    "an exception of another kind": ("try: root(-1)\nexcept KeyError: pass", "ValueError"),
    "a name that is nowhere": ("assert nothing(1)", "NameError"),
    "an object where a value is expected": ("assert Vector(1, 2) == (1, 2)", "an assertion does not hold"),
    "a test that does not compile": ("assert (", "does not compile"),
    "private attributes of the test": (
        "class Node:\n    def __init__(self): self._secret = 5\n" "assert fail(lambda _: Node()) is None",
        "",
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_an_honest_test_passes(name: str, backend: Backend) -> None:
    passed, result = run_case(PROGRAM, Assertions(PASSING[name]), LIMITS, backend)
    assert passed, result.stderr


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_test_says_why(name: str, backend: Backend) -> None:
    text, why = FAILING[name]
    passed, result = run_case(PROGRAM, Assertions(text), LIMITS, backend)
    assert not passed
    assert why in result.stderr


def test_a_program_gets_at_no_more_of_the_test_than_it_is_given(backend: Backend) -> None:
    program = """
def asked(thing, verb, *rest):
    line = object.__getattribute__(thing, "_line")
    try: return repr(line.ask(verb, thing, *rest))
    except (AttributeError, TypeError): return None
def look(thing):
    tried = [asked(thing, "get", name) for name in ("_secret", "__class__", "__dict__", "__globals__", "__code__")]
    return [*tried, asked(thing, "set", "_secret", 1), asked(thing, "getitem", 0), asked(thing, "name")]
def public(thing): return thing.shown
"""
    test = """
WANT = 4711
class Node:
    _secret, shown = 4711, 5
node = Node()
assert public(node) == 5
assert look(node) == [None] * 8, look(node)
assert look(lambda: WANT) == [None] * 8
"""
    passed, result = run_case(program, Assertions(test), LIMITS, backend)
    assert passed, result.stderr


def test_a_test_that_never_ends_is_ended(backend: Backend) -> None:
    for test in ("while True: pass", "for _ in forever(): pass"):
        program = "def forever():\n    while True: yield 1"
        passed, result = run_case(program, Assertions(test), Limits(seconds=0.3), backend)
        assert not passed
        assert result.status == "timeout"


def test_calls_reach_methods_and_solution_classes(backend: Backend) -> None:
    program = "class Solution:\n    def twice(self, x, by=2): return [x * by]"
    for name in ("Solution.twice", "twice"):
        assert run_case(program, Returned(name, (4,), {}, [8]), LIMITS, backend)[0]
    assert run_case(program, Returned("twice", (4,), {"by": 3}, [12]), LIMITS, backend)[0]
    assert not run_case(program, Returned("thrice", (4,), {}, None), LIMITS, backend)[0]
    nothing = "def f(): pass"
    assert run_case(nothing, Returned("f", (), {}, None), LIMITS, backend)[0]
    assert not run_case("import sys; sys.exit(0)", Returned("f", (), {}, None), LIMITS, backend)[0]
    passed, result = run_case("def f(): return object()", Returned("f", (), {}, None), LIMITS, backend)
    assert not passed
    assert "cannot be compared" in result.stderr
