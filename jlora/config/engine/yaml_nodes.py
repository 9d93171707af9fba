"""YAML as a tree that knows where each value stands, and ``key=value`` overrides of it.

Scalars follow YAML 1.2's core schema: ``1e-5`` is a number, ``yes`` and ``1:30`` are strings.
Nothing is constructed from a tag, so a file cannot run code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import yaml

from jlora import errors
from jlora.config.engine.faults import Fault

CORE_TAGS = tuple(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
)
INT = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.I)


@dataclasses.dataclass(frozen=True)
class Node:
    """A scalar, a list of nodes or a dict of nodes, and its place (``file:line``)."""

    value: Any
    where: str
    empty: bool = False  # nothing is written after the key
    text: str | None = None  # as an override spells it

    def plain(self, done: dict[int, Any] | None = None) -> Any:
        """The value without places; what aliases share stays shared."""
        done = {} if done is None else done
        if id(self.value) in done:
            return done[id(self.value)]
        result = self.value
        if isinstance(self.value, dict):
            result = {key: node.plain(done) for key, node in self.value.items()}
        elif isinstance(self.value, list):
            result = [node.plain(done) for node in self.value]
        done[id(self.value)] = result
        return result


def scalar(text: str) -> Any:
    """The value of an unquoted YAML scalar."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if INT.fullmatch(text):
        return int(text) if len(text) < 300 else text
    if FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


class Reader:
    """Turns composed YAML nodes into ``Node``; ``faults`` collects what is wrong on the way."""

    def __init__(self, name: str, faults: list[Fault], lines: bool = True):
        self.name, self.faults, self.lines = name, faults, lines
        self._done: dict[int, Node] = {}  # an alias is the same node again: convert it once
        self._open: set[int] = set()

    def where(self, mark: Any) -> str:
        """The place of a mark."""
        return f"{self.name}:{mark.line + 1}" if self.lines else self.name

    def read(self, text: str) -> Node:
        """The tree of a document; an empty one is an empty mapping.

        Raises ConfigError when the text is not YAML at all: then nothing else can be judged.
        """
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as bad:
            mark = bad.problem_mark or bad.context_mark
            where = self.where(mark) if mark else self.name
            raise Fault((), f"not valid YAML: {bad.problem}", None, where).error() from None
        except yaml.YAMLError as bad:  # characters that YAML forbids
            cause = f"not valid YAML: {' '.join(str(bad).split())}"
            raise Fault((), cause, None, self.name).error() from None
        except RecursionError:
            raise Fault((), "nested too deeply", None, self.name).error() from None
        return Node({}, self.name) if root is None else self.convert(root)

    def fault(self, where: str, cause: str, fix: str | None = None) -> None:
        """Notes a fault at a place."""
        self.faults.append(Fault((), cause, fix, where))

    def convert(self, node: yaml.Node) -> Node:
        """A composed node with everything below it."""
        if id(node) in self._done:
            return self._done[id(node)]
        where = self.where(node.start_mark)
        if id(node) in self._open:
            self.fault(where, "an alias refers to itself")
            return Node(None, where)
        if node.tag not in CORE_TAGS:
            self.fault(where, f"tags such as {node.tag!r} are not allowed", "write a plain value")
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            result = Node(self._mapping(node), where)
        elif isinstance(node, yaml.SequenceNode):
            result = Node([self.convert(item) for item in node.value], where)
        else:
            assert isinstance(node, yaml.ScalarNode)
            plain = node.style is None  # neither quoted nor a block
            value = scalar(node.value) if plain else node.value
            result = Node(value, where, empty=plain and not node.value)
        self._open.discard(id(node))
        self._done[id(node)] = result
        return result

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self.where(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.fault(where, "a key must be a name")
                continue
            key = key_node.value
            if key in result:
                first = result[key].where.rpartition(":")[2]
                self.fault(where, f"the key {key!r} is there twice (first in line {first})")
            # A value's place is its key's line: what users look for.
            result[key] = dataclasses.replace(self.convert(value_node), where=where)
        return result


def override(root: Node, text: str, faults: list[Fault]) -> Node:
    """``root`` with ``section.key=value`` applied; the value is YAML, a number indexes a list."""
    name = f"override {text!r}"
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        faults.append(Fault((), "not an override", "write section.key=value", name))
        return root
    try:
        new = Reader(name, faults, lines=False).read(value) if value.strip() else Node(None, name)
    except errors.ConfigError:  # such as a prompt that begins with a bracket
        new = Node(value, name)
    new = dataclasses.replace(new, empty=False, text=value)
    return put(root, keys, new, name, faults)


def put(node: Node, keys: Sequence[str], new: Node, name: str, faults: list[Fault]) -> Node:
    """``node`` with ``new`` at ``keys``, copied along the path: aliases elsewhere keep theirs."""
    if not keys:
        return new
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        if not key.isdigit() or int(key) >= len(node.value):
            cause = f"{key!r} is no number of an entry: the list has {len(node.value)}"
            faults.append(Fault((), cause, "entries count from 0", name))
            return node
        items = list(node.value)
        items[int(key)] = put(items[int(key)], rest, new, name, faults)
        return dataclasses.replace(node, value=items)
    if not isinstance(node.value, dict) and node.value is not None:
        faults.append(Fault((), f"there is nothing below {node.value!r} to set", None, name))
        return node
    table = dict(node.value or {})
    table[key] = put(table.get(key, Node(None, name)), rest, new, name, faults)
    return dataclasses.replace(node, value=table, empty=False)
