"""YAML as a tree of nodes with their places, and ``key=value`` overrides of it.

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

# Some are of YAML 1.1, by which PyYAML resolves plain scalars: a date gets the tag timestamp, but
# is read as a string here.
CORE_TAGS = tuple(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
)
INT = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.I)


@dataclasses.dataclass(frozen=True)
class YamlNode:
    """A scalar, a list of nodes or a dict of nodes, and its place: ``file:line`` or an override."""

    value: Any
    where: str
    empty: bool = False
    """Nothing is written after the key."""
    override_text: str | None = None
    """The value as it is spelled in an override."""

    @classmethod
    def of_plain(cls, value: Any, where: str) -> YamlNode:
        """The node of a plain value, all of it at one place."""
        if isinstance(value, dict):
            return cls({key: cls.of_plain(item, where) for key, item in value.items()}, where)
        if isinstance(value, list):
            return cls([cls.of_plain(item, where) for item in value], where)
        return cls(value, where)

    def plain(self, done: dict[int, Any] | None = None) -> Any:
        """The value without places; lists and dicts that aliases share stay shared.

        ``done`` holds the values of the nodes visited so far: without it, nested aliases would
        take exponential time (an "alias bomb").
        """
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


def parse_scalar(text: str) -> Any:
    """The value of an unquoted YAML scalar."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if INT.fullmatch(text):
        # Longer integers would overflow float().
        return int(text) if len(text) < 300 else text
    if FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


class YamlReader:
    """Turns YAML text into ``YamlNode``s and appends what is wrong to ``faults``.

    ``name`` is the file's, or an override's, which has no lines.
    """

    def __init__(self, name: str, faults: list[Fault], has_lines: bool = True):
        self.name, self.faults, self.has_lines = name, faults, has_lines
        self._done: dict[int, YamlNode] = {}  # by id of PyYAML's node, which aliases share
        self._open: set[int] = set()  # nodes on the path from the root to the current one

    def place(self, mark: Any) -> str:
        """``file:line`` of a mark."""
        return f"{self.name}:{mark.line + 1}" if self.has_lines else self.name

    def read(self, text: str) -> YamlNode:
        """The tree of a document; an empty document is an empty mapping.

        Raises ConfigError for text that is not YAML, since nothing else can be judged then.
        """
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as bad:
            mark = bad.problem_mark or bad.context_mark
            where = self.place(mark) if mark else self.name
            raise Fault((), f"not valid YAML: {bad.problem}", None, where).as_error() from None
        except yaml.YAMLError as bad:  # characters that YAML forbids
            cause = f"not valid YAML: {' '.join(str(bad).split())}"
            raise Fault((), cause, None, self.name).as_error() from None
        except RecursionError:
            raise Fault((), "nested too deeply", None, self.name).as_error() from None
        return YamlNode({}, self.name) if root is None else self.from_pyyaml(root)

    def add_fault(self, where: str, cause: str, fix: str | None = None) -> None:
        """Appends a fault."""
        self.faults.append(Fault((), cause, fix, where))

    def from_pyyaml(self, node: yaml.Node) -> YamlNode:
        """A node that PyYAML composed, with everything below it."""
        if id(node) in self._done:
            return self._done[id(node)]
        where = self.place(node.start_mark)
        if id(node) in self._open:
            self.add_fault(where, "an alias refers to itself")
            return YamlNode(None, where)
        if node.tag not in CORE_TAGS:
            cause = f"tags such as {node.tag!r} are not allowed"
            self.add_fault(where, cause, "write a plain value")
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            result = YamlNode(self._mapping(node), where)
        elif isinstance(node, yaml.SequenceNode):
            result = YamlNode([self.from_pyyaml(item) for item in node.value], where)
        else:
            assert isinstance(node, yaml.ScalarNode)
            unquoted = node.style is None  # neither quoted nor a block scalar
            value = parse_scalar(node.value) if unquoted else node.value
            result = YamlNode(value, where, empty=unquoted and not node.value)
        self._open.discard(id(node))
        self._done[id(node)] = result
        return result

    def _mapping(self, node: yaml.MappingNode) -> dict[str, YamlNode]:
        result: dict[str, YamlNode] = {}
        for key_node, value_node in node.value:
            where = self.place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.add_fault(where, "a key must be a name")
                continue
            key = key_node.value
            if key in result:
                first = result[key].where.rpartition(":")[2]
                self.add_fault(where, f"the key {key!r} is there twice (first in line {first})")
            # The place of a value is the line of its key, which users search for.
            result[key] = dataclasses.replace(self.from_pyyaml(value_node), where=where)
        return result


def apply_override(root: YamlNode, override: str, faults: list[Fault]) -> YamlNode:
    """``root`` with ``section.key=value`` applied.

    The value is YAML; in the key, a number is the index of a list's entry.
    """
    where = f"override {override!r}"
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        faults.append(Fault((), "not an override", "write section.key=value", where))
        return root
    value = YamlNode(None, where)
    try:
        if text.strip():
            value = YamlReader(where, faults, has_lines=False).read(text)
    except errors.ConfigError:  # not YAML, such as a prompt that begins with a bracket
        value = YamlNode(text, where)
    value = dataclasses.replace(value, empty=False, override_text=text)
    return replace_at(root, keys, value, where, faults)


def replace_at(
    node: YamlNode, keys: Sequence[str], value: YamlNode, where: str, faults: list[Fault]
) -> YamlNode:
    """``node`` with ``value`` at the path ``keys``.

    Nodes on the path are copied, so that other aliases of them do not change.
    """
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        if not key.isdigit() or int(key) >= len(node.value):
            cause = f"{key!r} is not an index: the list has {len(node.value)} entries"
            faults.append(Fault((), cause, "indices start at 0", where))
            return node
        items = list(node.value)
        items[int(key)] = replace_at(items[int(key)], rest, value, where, faults)
        return dataclasses.replace(node, value=items)
    if not isinstance(node.value, dict) and node.value is not None:
        cause = f"{node.value!r} is a value, so there is nothing below it to set"
        faults.append(Fault((), cause, None, where))
        return node
    mapping = dict(node.value or {})
    child = mapping.get(key, YamlNode(None, where))
    mapping[key] = replace_at(child, rest, value, where, faults)
    return dataclasses.replace(node, value=mapping, empty=False)
