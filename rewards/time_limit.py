"""A limit on how long a call may take, and what it can promise.

In the main thread of a Unix process the limit is a signal: it ends loops, sleeps, waiting for a socket, pattern
matching, and anything else at which Python looks for signals, and comes again (every second at the latest) in case it
was caught.
Elsewhere (a second thread, Windows) the call runs in a thread of its own that is left behind when time is up: the
caller goes on, the thread does so too until its call returns or the process ends.

Neither ends a single operation of C code that never looks up, such as ``10 ** 10 ** 9``: that takes a process of its
own, which is what ``math_verify`` and ``code_execution`` use.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class TimeIsUp(BaseException):
    """Raised in the middle of a call; no ``Exception``, so that the call's own ``except Exception`` lets it through."""


def call_within(seconds: float | None, function: Callable[[], T]) -> T:
    """``function()``, or ``TimeIsUp`` after ``seconds``; None is no limit."""
    if seconds is None:
        return function()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _by_signal(seconds, function)
    return _in_a_thread(seconds, function)


def _by_signal(seconds: float, function: Callable[[], T]) -> T:
    over = False

    def ring(signum: int, frame: Any) -> None:
        if not over:
            raise TimeIsUp

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    # Somebody else's alarm is put off, not lost.
    others, interval = signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 1.0))
    try:
        return function()
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - began), 1e-3), interval)


def _in_a_thread(seconds: float, function: Callable[[], T]) -> T:
    returned: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            returned.append(function())
        except BaseException as error:
            raised.append(error)

    # Under the name of its caller; daemon: it must not hold up the exit.
    thread = threading.Thread(target=work, name=threading.current_thread().name, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeIsUp
    if raised:
        raise raised[0]
    return returned[0]
