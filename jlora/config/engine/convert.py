"""Conversion of plain values (YAML's or Python's) to the annotated types of settings."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from jlora import errors


class FrozenMap(Mapping):
    """An immutable, hashable mapping with its keys in sorted order.

    Sorted, because PEFT applies the first pattern of a table that matches and writes
    adapter_config.json with sorted keys: in any other order the table could mean something else
    after a reload.
    """

    def __init__(self, items: Any = ()):
        self._dict = dict(sorted(dict(items).items()))

    def __getitem__(self, key: Any) -> Any:
        return self._dict[key]

    def __iter__(self) -> Iterator:
        return iter(self._dict)

    def __len__(self) -> int:
        return len(self._dict)

    def __hash__(self) -> int:
        return hash(tuple(self._dict.items()))

    def __repr__(self) -> str:
        return repr(self._dict)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Interval that a number must lie in; put on its type with ``Annotated``."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'below' if self.open_high else 'at most'} {self.high:g}"
        return " and ".join(
            text for text, end in ((low, self.low), (high, self.high)) if math.isfinite(end)
        )


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prefix that a string must have; put on its type with ``Annotated``."""

    text: str
    placeholder: str = "NAME"
    """Stands for the rest of the string in help and errors."""


@dataclasses.dataclass(frozen=True)
class InputMark:
    """Marks a string, with ``Annotated``, as the path of something that a command reads."""

    may_be_hub_name: bool


@dataclasses.dataclass(frozen=True)
class OutputMark:
    """Marks a string, with ``Annotated``, as the path of a folder that a command writes."""


class BadValueError(Exception):
    """A value does not fit its field's type; ``cause`` says how, ``fix`` what to write."""

    def __init__(self, cause: str, fix: str | None = None):
        self.cause, self.fix = cause, fix
        super().__init__(cause)


def split_annotated(hint: Any) -> tuple[Any, tuple]:
    """``Annotated[T, …]`` → (T, (…)); any other type → (the type, ())."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def union_members(hint: Any) -> list[Any]:
    """The members of a union; any other type as the only one."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def literal_values(hint: Any) -> list[Any]:
    """The values that the ``Literal`` members of a type allow."""
    literals = [m for m in union_members(hint) if typing.get_origin(m) is Literal]
    return [value for member in literals for value in typing.get_args(member)]


def type_in_words(hint: Any, plural: bool = False) -> str:
    """A type in a user's words, such as ``an integer at least 1 or null``."""
    members = union_members(hint)
    if any(split_annotated(member)[0] is float for member in members):
        members = [member for member in members if split_annotated(member)[0] is not int]
    words = list(dict.fromkeys(w for member in members for w in _member_words(member, plural)))
    text = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    return f"one of {text}" if len(literal_values(hint)) > 2 else text


NOUNS = {int: ("an integer", "integers"), float: ("a number", "numbers")}
NOUNS |= {str: ("a string", "strings")}


def _member_words(hint: Any, plural: bool) -> list[str]:
    base, marks = split_annotated(hint)
    origin, args = typing.get_origin(base), typing.get_args(base)
    if origin is Literal:
        return [v if isinstance(v, str) else value_in_words(v) for v in args]
    if base is bool:
        return ["true", "false"]
    if base is type(None):
        return ["null"]
    if origin in (tuple, Sequence):
        return [f"{'lists' if plural else 'a list'} of {type_in_words(args[0], plural=True)}"]
    if origin is Mapping:
        noun = "mappings" if plural else "a mapping"
        return [f"{noun} of names to {type_in_words(args[1], plural=True)}"]
    for mark in marks:
        if isinstance(mark, Prefix):
            return [mark.text + mark.placeholder]
        if isinstance(mark, InputMark):
            return ["a path or a hub name" if mark.may_be_hub_name else "a path"]
    name = base.__name__.removesuffix("Config").lower()
    noun = NOUNS.get(base, (f"a {name} section", f"{name} sections"))[plural]
    return [noun + "".join(f" {mark}" for mark in marks if isinstance(mark, Bounds))]


def value_in_words(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict | tuple):
        return reprlib.repr(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def convert_value(value: Any, hint: Any) -> Any:
    """``value`` in the type ``hint``; raises BadValueError saying what was expected.

    Lists become tuples and mappings become FrozenMap, so that the result is hashable.
    """
    members = union_members(hint)
    for member in members:
        if has_outer_type(value, member):
            return _convert_to_member(value, member)
    expected = type_in_words(hint)
    if value is None:
        raise BadValueError(f"null is not allowed: expected {expected}", "leave the key out")
    raise BadValueError(
        f"expected {expected}, got {value_in_words(value)}", _suggestion(value, members)
    )


def has_outer_type(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type ``hint``, leaving its elements and bounds aside."""
    base, marks = split_annotated(hint)
    origin = typing.get_origin(base)
    if prefixes := [mark.text for mark in marks if isinstance(mark, Prefix)]:
        return isinstance(value, str) and value.startswith(prefixes[0])
    if origin is Literal:
        # 1 == True in Python, so compare the types, too.
        return any(type(a) is type(value) and a == value for a in typing.get_args(base))
    if origin in (tuple, Sequence):
        return isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if base in (int, float):
        return isinstance(value, int | base) and not isinstance(value, bool)
    return isinstance(value, base | Mapping if dataclasses.is_dataclass(base) else base)


def _convert_to_member(value: Any, hint: Any) -> Any:
    """``value``, whose outer type is right, converted to ``hint``, which is no union."""
    base, marks = split_annotated(hint)
    origin, args = typing.get_origin(base), typing.get_args(base)
    if origin in (tuple, Sequence):
        # Sets come from Python (peft's target_modules); sorted, they are the same in each process.
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return tuple(convert_value(item, args[0]) for item in items)
    if origin is Mapping:
        if bad := [key for key in value if not isinstance(key, str)]:
            cause = f"expected names as keys, got {value_in_words(bad[0])}"
            raise BadValueError(cause, "put it in quotes")
        return FrozenMap({key: convert_value(item, args[1]) for key, item in value.items()})
    if isinstance(value, Mapping):
        return _build_section(value, base)
    if base is float:
        value = float(value)
        if not math.isfinite(value):
            raise BadValueError(f"expected a finite number, got {value}")
    for mark in marks:
        if isinstance(mark, Bounds) and value not in mark:
            raise BadValueError(f"must be {mark}, got {value:g}")
        if isinstance(mark, OutputMark):
            value = os.path.expanduser(value)
    return value


def _build_section(values: Mapping, section: type) -> Any:
    """A nested section from a mapping that was given in Python."""
    known = [f.name for f in dataclasses.fields(section)]
    for name in values:
        if name not in known:
            fix = errors.did_you_mean(str(name), known) or f"known keys: {', '.join(known)}"
            raise BadValueError(f"unknown key {value_in_words(name)}", fix)
    return section(**values)


def _suggestion(value: Any, members: Iterable[Any]) -> str | None:
    """What to write instead of a value that fits none of ``members``."""
    bases = [split_annotated(member)[0] for member in members]
    if isinstance(value, str):
        if bool in bases and value.lower() in ("yes", "on", "y", "no", "off", "n"):
            return f"write {value_in_words(value.lower() in ('yes', 'on', 'y'))}"
        words = [word for base in bases for word in literal_values(base)]
        return errors.did_you_mean(value, [word for word in words if isinstance(word, str)])
    if str in bases and isinstance(value, int | float) and not isinstance(value, bool):
        return f'put it in quotes: "{value}"'
    if isinstance(value, Mapping) and any(typing.get_origin(b) in (tuple, Sequence) for b in bases):
        return "begin it with a dash: it is a list, even with one entry"
    return None
