"""A test and the program that it tests, in two processes that exchange plain values.

The text of a test is executed by the judge. A name that it does not define itself stands for the program's: calling
it sends the arguments over and brings the result back. So ``assert add(2, 3) == 5`` compares *here*, where the 5 is;
the program sees 2 and 3 and no more, and neither ends the test, nor prints its way through it, nor brings an ``==``
of its own. What is not plain data stays in the process where it was made and is a ``Remote`` on the other side.
Lists, dicts and sets that the program changes in place are changed here, too.

Left to the program, because the question is about its own objects: what their methods return, and how two of them
compare. A ``Remote`` never equals plain data.
"""

from __future__ import annotations

# ruff: noqa: SIM105  (contextlib, and what it imports, would cost every program a millisecond)
import builtins
import os
import sys

from rewards.sandbox.values import BadValue, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any

LONGEST = 4 * 1024 * 1024  # bytes of one message
#: Names under which tests know packages.
_USUAL_NAMES = {"np": "numpy", "pd": "pandas"}


class Gone(Exception):
    """The other process has ended, or says what makes no sense."""


class Line:
    """One end of a conversation in which both sides ask and answer, one question inside the other."""

    def __init__(self, reader: int, writer: int, trusts_the_other: bool) -> None:
        self.reader, self.writer, self.trusts = reader, writer, trusts_the_other
        self.mine: list[Any] = []  # what the other side knows by its number
        self.numbers: dict[int, int] = {}  # id → that number; the list keeps the ids valid
        self.names: dict[str, Any] = {}

    # Frames -------------------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        data = encode(message, self._number)
        if len(data) > LONGEST:
            raise BadValue(f"a value of {len(data)} bytes; at most {LONGEST} go over")
        data = len(data).to_bytes(8, "big") + data
        try:
            while data:
                data = data[os.write(self.writer, data) :]
        except OSError as error:
            raise Gone("the program has ended") from error

    def _receive(self) -> Any:
        size = int.from_bytes(self._exactly(8), "big")
        if size > LONGEST:
            raise Gone("the program sent too much")
        try:
            return decode(self._exactly(size), self._thing)
        except BadValue as error:
            raise Gone(f"the program sent no value: {error}") from error

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.reader, min(size, 1 << 20))
            if not part:
                raise Gone("the program has ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _number(self, value: Any) -> int:
        """Even numbers are mine, odd ones belong to the other side, as each of them sees it on sending."""
        if isinstance(value, Remote):
            return 2 * object.__getattribute__(value, "_number") + 1
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.mine)
            self.mine.append(value)
        return 2 * self.numbers[id(value)]

    def _thing(self, number: int) -> Any:
        return self.mine[number // 2] if number % 2 else Remote(self, number // 2)

    # Asking -------------------------------------------------------------------------------------------

    def ask(self, verb: str, *rest: Any) -> Any:
        """One question, and whatever the other side wants to know before it can answer."""
        self._send((verb, *rest))
        while True:
            message = self._receive()
            if not isinstance(message, tuple) or not message or not isinstance(message[0], str):
                raise Gone("the program sent no message")
            if message[0] == "returned" and len(message) == 3:
                if verb == "call":
                    _restore(rest[1], message[2])
                return message[1]
            if message[0] == "raised" and len(message) == 3:
                error = _exception(message[1], message[2])
                if isinstance(error, StopIteration) and (verb, rest[0]) != ("do", "next"):
                    # To a map or a zip of the test it would be their end: nothing left to compare, so all is well.
                    raise RuntimeError("the program raised StopIteration")
                raise error
            self.answer(message)

    def serve(self) -> None:
        """Answer until the other side has gone."""
        while True:
            self.answer(self._receive())

    def answer(self, message: tuple[Any, ...]) -> None:
        try:
            arguments = message[2] if message[0] == "call" else ()
            reply = ("returned", self._do(*message), arguments)
        except Gone:
            raise
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = ("raised", kinds, _text_of(error))
        try:
            self._send(reply)
        except (BadValue, RecursionError) as error:
            self._send(("raised", ["ValueError"], str(error)))

    def _do(self, verb: str, *rest: Any) -> Any:
        if verb == "call":
            target, arguments, keywords = rest
            if not self.trusts and isinstance(target, Remote):
                raise TypeError("not a function of the test")
            return target(*arguments, **keywords)
        if verb == "get":
            return getattr(self._shown(*rest), rest[1])
        if verb == "set":
            setattr(self._shown(*rest), rest[1], rest[2])
            return None
        if not self.trusts:
            raise TypeError("the program asked for what it may not have")
        if verb == "name":
            if rest[0] not in self.names:
                raise NameError(f"name {rest[0]!r} is not defined")
            return self.names[rest[0]]
        if verb == "do":
            return getattr(builtins, rest[0])(*rest[1])
        import operator

        return getattr(operator, verb)(*rest)

    def _shown(self, target: Any, name: str, *_: Any) -> Any:
        """What may be read and written: of the test's objects, attributes that its own classes made public."""
        if not self.trusts and (name.startswith("_") or type(target).__module__ != "test"):
            raise AttributeError(name)
        return target


class Remote:
    """An object of the other process: its methods, items and attributes, but never an ``==`` with plain data."""

    __slots__ = ("_line", "_number")

    def __init__(self, line: Line, number: int) -> None:
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._line.ask("call", self, list(arguments), keywords)

    def __getattr__(self, name: str) -> Any:
        return self._line.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._line.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._line.ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._line.ask("delitem", self, key)

    def __contains__(self, key: Any) -> bool:
        return self._line.ask("contains", self, key) is True

    def __len__(self) -> int:
        return int(self._line.ask("do", "len", [self]))

    def __bool__(self) -> bool:
        return self._line.ask("truth", self) is True

    def __iter__(self) -> Any:
        return self._line.ask("do", "iter", [self])

    def __next__(self) -> Any:
        return self._line.ask("do", "next", [self])

    def __str__(self) -> str:
        return str(self._line.ask("do", "str", [self]))

    def __repr__(self) -> str:
        return str(self._line.ask("do", "repr", [self]))

    def __hash__(self) -> int:
        return hash((Remote, self._number))


def _between_remotes(name: str) -> Callable[[Any, Any], Any]:
    def operate(self: Remote, other: Any) -> Any:
        if not isinstance(other, Remote):
            return NotImplemented
        return object.__getattribute__(self, "_line").ask(name, self, other)

    return operate


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "and_", "or_", "matmul"):
    setattr(Remote, f"__{_name.strip('_')}__", _between_remotes(_name))


def _restore(before: list[Any], after: Any) -> None:
    """What a call did to its arguments in place."""
    if not isinstance(after, list) or len(after) != len(before):
        return
    for old, new in zip(before, after, strict=True):
        if type(old) is not type(new):
            continue
        if isinstance(old, list):
            old[:] = new
        elif isinstance(old, (dict, set)):
            old.clear()
            old.update(new)


def _text_of(error: BaseException) -> str:
    try:
        return str.__str__(str(error))[:2000]
    except BaseException:
        return ""


def _exception(kinds: Any, text: Any) -> BaseException:
    """The built-in exception nearest to what was raised, so that ``except ValueError`` works across."""
    for name in kinds if isinstance(kinds, list) else []:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and the like want more
                continue
    return Gone(f"the program raised {kinds[0] if kinds else 'something'}: {text}")


# The two processes -----------------------------------------------------------------------------------


def serve_program(names: dict[str, Any], line: Line) -> None:
    """In the program's process: answer for what it has defined, until the judge is done."""
    line.names = names
    try:
        line.serve()
    except Gone:
        pass


def judge(text: str, line: Line) -> str:
    """Execute a test; empty if it passed, else why not."""
    try:
        code = compile(text, "test.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the test does not compile: {error}"
    names: dict[str, Any] = {"__name__": "test", "__builtins__": builtins}
    try:
        line.ask("name", "__name__")  # it is there, and has come to its end without an error
        _fill(names, text, code, line)
        exec(code, names)
    except AssertionError as error:
        return f"AssertionError: {_text_of(error)}" if _text_of(error) else "an assertion does not hold"
    except BaseException as error:
        return f"{type(error).__name__}: {_text_of(error)}"
    return ""


def _fill(names: dict[str, Any], text: str, code: CodeType, line: Line) -> None:
    """The names that the test uses and does not define: modules are imported here, the rest is the program's.

    Built-in functions are always Python's own, or a program would define ``abs`` so that all comes out right.
    """
    for name in sorted(_names_in(code)):
        if hasattr(builtins, name):
            continue
        is_module = name in sys.stdlib_module_names or name in _USUAL_NAMES
        if is_module and f"{name}." in text:  # a program may well define a function called statistics
            try:
                names[name] = __import__(_USUAL_NAMES.get(name, name))
            except ImportError:
                pass
            continue
        try:
            names[name] = line.ask("name", name)
        except NameError:
            continue  # an attribute, or a name that the test is about to define


def _names_in(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            found |= _names_in(constant)
    return found
