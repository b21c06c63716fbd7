"""Reading ahead: in order, as far as asked, in a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from data_loading.prefetch import prefetched


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("depth", [0, 1, 2, 50])
def test_everything_comes_once_and_in_order(depth: int) -> None:
    assert list(prefetched(lambda n: n * n, range(20), depth)) == [n * n for n in range(20)]
    assert list(prefetched(lambda n: n, [], depth)) == []
    assert reading_threads() == []


def test_batches_are_read_while_nobody_asks() -> None:
    """The consumer holds on to the first batch; the two after it are read all the same, and no third."""
    read: list[int] = []
    enough = threading.Event()

    def reading(number: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        read.append(number)
        if number == 2:
            enough.set()
        return number

    batches = prefetched(reading, range(100), 2)
    assert next(batches) == 0
    assert enough.wait(timeout=30)
    assert read == [0, 1, 2]
    assert next(batches) == 1
    batches.close()
    assert reading_threads() == []
    assert len(read) <= 4


def test_depth_zero_reads_when_asked_and_in_this_thread() -> None:
    read: list[tuple[int, threading.Thread]] = []
    batches = prefetched(lambda n: read.append((n, threading.current_thread())), range(9), 0)
    next(batches)
    assert read == [(0, threading.main_thread())]


def test_an_error_comes_where_its_batch_would_and_ends_the_thread() -> None:
    def reading(number: int) -> int:
        if number == 2:
            raise ValueError("row 2")
        return number

    batches = prefetched(reading, range(9), 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="row 2"):
        next(batches)
    assert reading_threads() == []


def test_an_iterator_that_is_dropped_leaves_no_thread() -> None:
    def use() -> None:
        batches: Iterator[int] = prefetched(lambda n: n, range(1000), 3)
        next(batches)
        assert len(reading_threads()) == 1

    use()
    assert reading_threads() == []
