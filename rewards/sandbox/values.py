"""Plain values as bytes and back: what may cross between the program and those who judge it.

Neither pickle nor JSON. Decoding never runs code of the sender, whatever the bytes are; and tuples, sets, bytes,
infinities and keys that are no strings survive. The program writes these bytes itself, so whatever it pretends to
be arrives as one of the types below, compared by *their* ``==`` and by none that it has written.

    N T F           None, True, False
    i… f… c…        int (hexadecimal), float, complex: up to a ;
    s… b…           str (UTF-8), bytes: LENGTH:BYTES
    l t S Z d       list, tuple, set, frozenset, dict: COUNT: and the items
    o               fractions, decimals, dates, deques, ranges: a name of KNOWN and a tuple of arguments
    h               something that stays where it is: its number there
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing's, whose import would cost every program three milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEEPEST = 200


class BadValue(ValueError):
    """Bytes that are no value, or a value that cannot be bytes."""


#: Constructors that may be called while decoding, and how to take their arguments from an instance.
KNOWN: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "fractions.Fraction": lambda x: (x.numerator, x.denominator),
    "decimal.Decimal": lambda x: (str(x),),
    "collections.deque": lambda x: (list(x),),
    "builtins.range": lambda x: (x.start, x.stop, x.step),
    "datetime.date": lambda x: (x.year, x.month, x.day),
    "datetime.datetime": lambda x: (x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond),
    "datetime.timedelta": lambda x: (x.days, x.seconds, x.microseconds),
}


def encode(value: Any, export: Callable[[Any], int] | None = None) -> bytes:
    """The bytes of a plain value. What is not plain gets a number from ``export``, or raises BadValue.

    Subclasses (a named tuple, a Counter, an IntEnum) go as what they are made of.

    >>> decode(encode({"a": (1, 2.5, None), 3: {b"x"}}))
    {'a': (1, 2.5, None), 3: {b'x'}}
    """
    out: list[bytes] = []
    _write(value, out, export, 0)
    return b"".join(out)


def _write(value: Any, out: list[bytes], export: Callable[[Any], int] | None, depth: int) -> None:
    if depth > DEEPEST:
        raise BadValue(f"the value is nested more than {DEEPEST} deep, or contains itself")
    if value is None or value is True or value is False:
        out.append(b"N" if value is None else b"T" if value else b"F")
    elif isinstance(value, int):
        out.append(b"i%s;" % hex(int.__index__(value)).encode())
    elif isinstance(value, float):
        out.append(b"f%s;" % float.__repr__(value).encode())
    elif isinstance(value, complex):
        out.append(b"c%s,%s;" % (repr(value.real).encode(), repr(value.imag).encode()))
    elif isinstance(value, str):
        raw = str.encode(value, "utf-8", "surrogatepass")
        out.append(b"s%d:%s" % (len(raw), raw))
    elif isinstance(value, (bytes, bytearray)):
        out.append(b"b%d:%s" % (len(value), bytes(value)))
    elif isinstance(value, (list, tuple, set, frozenset)):
        tag = next(t for t, kind in _COLLECTIONS.items() if isinstance(value, kind))
        items = list(value)
        out.append(b"%s%d:" % (tag, len(items)))
        for item in items:
            _write(item, out, export, depth + 1)
    elif isinstance(value, dict):
        pairs = list(dict.items(value))
        out.append(b"d%d:" % len(pairs))
        for pair in pairs:
            for item in pair:
                _write(item, out, export, depth + 1)
    else:
        _write_other(value, out, export, depth)


def _write_other(value: Any, out: list[bytes], export: Callable[[Any], int] | None, depth: int) -> None:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in KNOWN and getattr(value, "tzinfo", None) is None:
        out.append(b"o")
        _write(name, out, None, depth)
        _write(KNOWN[name](value), out, export, depth + 1)
    elif kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        _write(value.item(), out, export, depth + 1)
    elif export is not None:
        out.append(b"h%d;" % export(value))
    else:
        raise BadValue(f"a {kind.__name__} is not plain data")


_COLLECTIONS: dict[bytes, type] = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset}


def decode(data: bytes, handle: Callable[[int], Any] | None = None) -> Any:
    """The value of these bytes; ``handle`` turns a number of the other side into what stands for it here.

    Raises:
        BadValue: these are no value's bytes.
    """
    try:
        value, end = _read(data, 0, handle, 0)
    except BadValue:
        raise
    except (ValueError, TypeError, IndexError, ArithmeticError, MemoryError) as error:
        raise BadValue(f"not a value: {error}") from None
    if end != len(data):
        raise BadValue("something follows the value")
    return value


def _read(data: bytes, at: int, handle: Callable[[int], Any] | None, depth: int) -> tuple[Any, int]:
    if depth > DEEPEST:
        raise BadValue("nested too deep")
    tag, at = data[at : at + 1], at + 1
    if tag in (b"N", b"T", b"F"):
        return (None if tag == b"N" else tag == b"T"), at
    if tag in (b"i", b"f", b"c", b"h"):
        end = data.index(b";", at)
        text = data[at:end].decode("ascii")
        if tag == b"i":
            return int(text, 16), end + 1
        if tag == b"f":
            return float(text), end + 1
        if tag == b"c":
            real, imag = text.split(",")
            return complex(float(real), float(imag)), end + 1
        if handle is None:
            raise BadValue("a value that is not plain data")
        return handle(int(text)), end + 1
    if tag == b"o":
        name, at = _read(data, at, None, depth + 1)
        arguments, at = _read(data, at, handle, depth + 1)
        if name not in KNOWN:
            raise BadValue("an unknown type")
        module, _, kind = name.rpartition(".")
        __import__(module)
        return getattr(sys.modules[module], kind)(*arguments), at
    end = data.index(b":", at, at + 20)
    count, at = int(data[at:end]), end + 1
    if not 0 <= count <= len(data) - at:
        raise BadValue("it promises more than there is")
    if tag in (b"s", b"b"):
        raw = data[at : at + count]
        return (raw.decode("utf-8", "surrogatepass") if tag == b"s" else raw), at + count
    items = []
    for _ in range(2 * count if tag == b"d" else count):
        item, at = _read(data, at, handle, depth + 1)
        items.append(item)
    if tag == b"d":
        return dict(zip(items[::2], items[1::2], strict=True)), at
    if tag not in _COLLECTIONS:
        raise BadValue("an unknown tag")
    return _COLLECTIONS[tag](items), at
