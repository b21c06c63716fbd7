"""Child processes that answer lines of JSON, several at a time, each killed when it takes too long.

What a thread cannot promise, since nothing can stop one: that a task ends. Children are started by ``subprocess``
and not by forking, because a process that has used MLX does not survive a fork. They end with their input, which ends
with this process, however it ends.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

STARTUP = 120.0  # seconds that a child may take to import its libraries


class LineWorkers:
    """Up to ``count`` children of one command; they live on between batches until :meth:`close`."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        self._command = list(command)
        self._count = count
        self._idle: list[_Child] = []

    def ask(self, tasks: Sequence[Any], seconds: float, budget: float) -> list[Any]:
        """The answer to each task, in order; ``"timeout"`` for one that took more than ``seconds``, ``"lost"`` for
        one whose child died, ``"budget"`` for those that were not begun within ``budget`` seconds for all of them.
        """
        answers: list[Any] = ["budget"] * len(tasks)
        waiting = deque(range(len(tasks)))
        busy: dict[_Child, int] = {}
        end = time.monotonic() + budget
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or busy:
                    now = time.monotonic()
                    while waiting and len(busy) < self._count and now < end:
                        child = self._idle.pop() if self._idle else _Child(self._command)
                        number = waiting.popleft()
                        child.begin(tasks[number], seconds)
                        busy[child] = number
                        selector.register(child.output, selectors.EVENT_READ, child)
                    if not busy:
                        break
                    soonest = min(child.deadline for child in busy)
                    for key, _ in selector.select(max(soonest - time.monotonic(), 0.0)):
                        answer = key.data.read(seconds)
                        if answer is not _NOT_YET:
                            selector.unregister(key.data.output)
                            answers[busy.pop(key.data)] = answer
                            self._put_back(key.data)
                    for child in [child for child in busy if child.deadline <= time.monotonic()]:
                        selector.unregister(child.output)
                        answers[busy.pop(child)] = "timeout"
                        child.kill()
            finally:
                for child in busy:  # interrupted: nobody will read what they say
                    child.kill()
        return answers

    def close(self) -> None:
        """End the children."""
        while self._idle:
            self._idle.pop().kill()

    def _put_back(self, child: _Child) -> None:
        if child.alive:
            self._idle.append(child)
        else:
            child.kill()


_NOT_YET = object()


class _Child:
    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which finishes its step: it needs the answers
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.input, self.output = self._process.stdin, self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self._buffer = b""
        self._ready = False
        self._ended = False
        self.deadline = 0.0

    @property
    def alive(self) -> bool:
        return not self._ended and self._process.poll() is None

    def begin(self, task: Any, seconds: float) -> None:
        # The time for a task starts when its child has its libraries; until then it has STARTUP.
        self.deadline = time.monotonic() + (seconds if self._ready else STARTUP)
        with suppress(BrokenPipeError):  # it died: read() will see that
            self.input.write(json.dumps(task).encode() + b"\n")
            self.input.flush()

    def read(self, seconds: float) -> Any:
        """Its answer, ``_NOT_YET``, or ``"lost"`` if it has ended."""
        chunk = self.output.read()
        if chunk == b"":
            self._ended = True  # poll() may not know yet
            return "lost"
        self._buffer += chunk or b""
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            if self._ready:
                return json.loads(line)
            self._ready = True
            self.deadline = time.monotonic() + seconds
        return _NOT_YET

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self.input, self.output):
            with suppress(OSError):
                pipe.close()
