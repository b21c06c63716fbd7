"""Values as bytes and back, and bytes from a stranger."""

from __future__ import annotations

import collections
import datetime
import enum
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from rewards.sandbox.values import BadValue, decode, encode


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 10**5000, 1.5, -0.0, math.inf, 2j, "", "grüße\n", "\udc80", b"\0\xff",
        [], [1, [2, (3,)]], (), {1, "a"}, frozenset({1}), {}, {"a": 1, (1, 2): [None]},
        Fraction(1, 3), Decimal("1.10"), collections.deque([1, 2]), range(0, 10, 3),
        datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, 2, 3, 4), datetime.timedelta(1, 2, 3),
    ],
    ids=lambda value: type(value).__name__,  # a set prints itself in another order in each process
)  # fmt: skip
def test_a_plain_value_comes_back_as_it_was(value: Any) -> None:
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


def test_not_a_number_and_the_sign_of_zero_survive() -> None:
    assert math.isnan(decode(encode(math.nan)))
    assert math.copysign(1, decode(encode(-0.0))) == -1


def test_the_bytes_are_those_of_the_table() -> None:
    assert encode([1, -255, "é", (None, True)]) == b"l4:i0x1;i-0xff;s2:\xc3\xa9t2:NT"


def test_subclasses_come_back_as_what_they_are_made_of() -> None:
    class Sly(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    back = decode(encode(Sly(3)))
    assert type(back) is int
    assert back != 4
    assert decode(encode(collections.Counter("aab"))) == {"a": 2, "b": 1}
    assert decode(encode(collections.namedtuple("P", "x y")(1, 2))) == (1, 2)
    assert decode(encode(enum.IntEnum("E", "a").a)) == 1  # type: ignore[attr-defined]


def test_what_is_not_plain_is_refused_or_gets_a_number() -> None:
    with pytest.raises(BadValue, match="a object is not plain data"):
        encode(object())
    assert encode([print], lambda thing: 7) == b"l1:h7;"
    assert decode(b"l1:h7;", lambda number: f"<{number}>") == ["<7>"]
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(BadValue, match="contains itself"):
        encode(loop)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x", b"i;", b"izz;", b"i1", b"fone;", b"s5:ab", b"s-1:", b"l2:N", b"l999999999999999:", b"d1:N",
        b"NN", b"S1:l0:", b"d1:l0:N", b"h1;", b"os9:os.systemt1:s2:id", b"os18:fractions.Fractiont2:i1;i0;",
        b"os13:builtins.evalt1:s1:1", b"s2:\xff\xff", b"l1:" * 500 + b"N", b"c1;", b"oNN", b"ol0:N",
    ],
)  # fmt: skip
def test_other_bytes_are_refused_and_run_nothing(data: bytes) -> None:
    with pytest.raises(BadValue):
        decode(data)
