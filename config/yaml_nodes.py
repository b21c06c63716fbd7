"""YAML to plain values, by the types of YAML 1.2, with the line of each key.

PyYAML follows YAML 1.1, where ``1e-5`` is text and ``no`` is False, and keeps the last of two equal keys. Here its
parser is used up to the nodes, and the values are made from them by the few rules below.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

MOST_VALUES = 20_000  # an alias may repeat what it names, and those nested in it again (a "billion laughs")

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)")
_TEXT = "tag:yaml.org,2002:str"


class NotPlain(ValueError):
    """Something that a configuration file has no use for; ``line`` says where."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _Nodes(Reader, Scanner, Parser, Composer, BaseResolver):
    """Text to nodes, every plain scalar left as text: a class of its own, so that nobody else's rules apply."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)


def compose(text: str) -> yaml.Node | None:
    """The root node of the one document in ``text``; None where it is empty."""
    node: yaml.Node | None = _Nodes(text).get_single_node()
    return node


def plain_value(root: yaml.Node, lines: dict[tuple[str, ...], int]) -> Any:
    """The value of a node; the line of each key goes into ``lines`` by its path."""
    made = 0

    def value(node: yaml.Node, path: tuple[str, ...]) -> Any:
        nonlocal made
        made += 1
        line = node.start_mark.line + 1
        if made > MOST_VALUES:
            raise NotPlain(f"it has more than {MOST_VALUES} values; a configuration has a hundred", line)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, line)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise NotPlain(f"the tag {node.tag} is not understood; leave it out", line)
        if isinstance(node, yaml.SequenceNode):
            return [value(one, (*path, str(i))) for i, one in enumerate(node.value)]
        table: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            at = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise NotPlain("a name is expected before the colon, found a list or a table", at)
            key = key_node.value
            if key == "<<" and key_node.style is None:
                raise NotPlain("merge keys (<<) are not understood; write the settings out", at)
            here = (*path, key)
            if key in table:
                first = lines.get(here)
                raise NotPlain(f'"{key}" is given twice (first in line {first}); keep one', at)
            lines[here] = at
            table[key] = value(value_node, here)
        return table

    return value(root, ())


def _scalar(node: yaml.ScalarNode, line: int) -> Any:
    text: str = node.value
    if node.tag not in (_TEXT, "!"):
        raise NotPlain(f"the tag {node.tag} is not understood; leave it out", line)
    if node.style is not None or node.tag == "!":  # quoted, or a block of text
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    try:
        if _INT.fullmatch(text):
            return int(text)
        if _HEX.fullmatch(text):
            return int(text, 0)
    except ValueError as error:  # thousands of digits
        raise NotPlain(f"a whole number that is too long: {error}", line) from None
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return float(f"{infinite[1]}inf")
    return float("nan") if _NAN.fullmatch(text) else text
