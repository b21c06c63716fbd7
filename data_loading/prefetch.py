"""Reading ahead: while a batch is trained on, a background thread reads the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Batch = TypeVar("Batch")
Read = TypeVar("Read")


def prefetched(
    read: Callable[[Batch], Read], batches: Iterable[Batch], depth: int
) -> Generator[Read, None, None]:
    """``read(batch)`` for each batch, in order, at most ``depth`` of them ahead of who asks; 0: no thread.

    What ``read`` raises is raised where its batch would have come. The thread ends with the iterator: when it is
    exhausted, closed, or garbage.
    """
    if depth == 0:
        yield from map(read, batches)
        return
    waiting: deque[Future[Read]] = deque()
    to_read = iter(batches)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        try:
            waiting.extend(thread.submit(read, batch) for batch in islice(to_read, depth))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(thread.submit(read, batch) for batch in islice(to_read, 1))
                yield result
        finally:
            for one in waiting:
                one.cancel()
