"""Field types with bounds, and values converted to them or refused in a user's words."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from jlora import errors


class FrozenMap(Mapping):
    """An immutable, hashable mapping with its keys in sorted order.

    Sorted, because PEFT's pattern tables are order-sensitive and its adapter_config.json is
    written with sorted keys: any other order would mean something else after a reload.
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
    """The closed (or open) interval of a number, attached to its type by ``Annotated``."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def allow(self, x: float) -> bool:
        """Whether ``x`` lies within."""
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
    """What a string begins with, attached to its type by ``Annotated``."""

    text: str
    rest: str = "NAME"
    """What follows, for people."""


class BadValueError(Exception):
    """A value does not fit its field's type; ``cause`` says how, ``fix`` what to write."""

    def __init__(self, cause: str, fix: str | None = None):
        self.cause, self.fix = cause, fix
        super().__init__(cause)


def split_annotated(hint: Any) -> tuple[Any, tuple]:
    """``Annotated[T, …]`` → (T, (…)); anything else → (itself, ())."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the type itself, alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def describe(hint: Any) -> str:
    """A type in a user's words, such as ``an integer at least 1 or null``."""
    options = alternatives(hint)
    if any(split_annotated(option)[0] is float for option in options):
        options = [option for option in options if split_annotated(option)[0] is not int]
    if len(options) > 1:
        return " or ".join(dict.fromkeys(describe(option) for option in options))
    hint = options[0]
    base, extra = split_annotated(hint)
    bounds = [f" {b}" for b in extra if isinstance(b, Bounds)]
    origin, args = typing.get_origin(base), typing.get_args(base)
    if origin is Literal:
        words = ", ".join(show(a) for a in args)
        return f"one of {words}" if len(args) > 1 else words
    if origin in (tuple, Sequence):
        return f"a list ({describe(args[0])} each)"
    if origin is Mapping:
        return f"names and values ({describe(args[1])} each)"
    if prefixes := [p for p in extra if isinstance(p, Prefix)]:
        return prefixes[0].text + prefixes[0].rest
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    name = "null" if base is type(None) else names.get(base, f"a {base.__name__} section")
    return name + "".join(bounds)


def show(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value) if isinstance(value, list | dict | tuple) else _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def convert(value: Any, hint: Any) -> Any:
    """``value`` in the type ``hint``; raises BadValueError saying what was expected."""
    options = alternatives(hint)
    for option in options:
        if fits(value, option):
            return _convert_one(value, option)
    if value is None:
        raise BadValueError(f"null is not allowed: expected {describe(hint)}", "leave the key out")
    raise BadValueError(f"expected {describe(hint)}, got {show(value)}", _remedy(value, options))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the outer type ``hint``; elements and bounds are judged later."""
    base, extra = split_annotated(hint)
    origin = typing.get_origin(base)
    if any(isinstance(p, Prefix) for p in extra):
        return isinstance(value, str) and all(value.startswith(p.text) for p in extra)
    if origin is Literal:
        # 1 == True: compare types too.
        return any(type(a) is type(value) and a == value for a in typing.get_args(base))
    if origin in (tuple, Sequence):
        return isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if base in (int, float):
        return isinstance(value, int | base) and not isinstance(value, bool)
    return isinstance(value, base | Mapping if dataclasses.is_dataclass(base) else base)


def _convert_one(value: Any, hint: Any) -> Any:
    base, extra = split_annotated(hint)
    origin, args = typing.get_origin(base), typing.get_args(base)
    if origin in (tuple, Sequence):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return tuple(convert(item, args[0]) for item in items)
    if origin is Mapping:
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise BadValueError(f"expected names as keys, got {show(bad[0])}", "put it in quotes")
        return FrozenMap({key: convert(item, args[1]) for key, item in value.items()})
    if isinstance(value, Mapping):
        return _table(value, base)
    if base is float:
        value = float(value)
        if not math.isfinite(value):
            raise BadValueError(f"expected a finite number, got {value}")
    for bounds in extra:
        if isinstance(bounds, Bounds) and not bounds.allow(value):
            raise BadValueError(f"must be {bounds}, got {value:g}")
    return value


def _table(values: Mapping, table: type) -> Any:
    """A table of settings from names and values."""
    known = [f.name for f in dataclasses.fields(table)]
    for name in values:
        if name not in known:
            near = errors.did_you_mean(str(name), known) or f"known here: {', '.join(known)}"
            raise BadValueError(f"unknown key {show(name)}", near)
    return table(**values)


def _remedy(value: Any, options: Sequence[Any]) -> str | None:
    bases = [split_annotated(option)[0] for option in options]
    if isinstance(value, str):
        words = [a for b in bases if typing.get_origin(b) is Literal for a in typing.get_args(b)]
        if bool in bases and value.lower() in ("yes", "on", "y", "no", "off", "n"):
            return f"write {show(value.lower() in ('yes', 'on', 'y'))}"
        return errors.did_you_mean(value, [w for w in words if isinstance(w, str)])
    if str in bases and isinstance(value, int | float) and not isinstance(value, bool):
        return f'put it in quotes: "{value}"'
    if isinstance(value, Mapping) and any(typing.get_origin(b) in (tuple, Sequence) for b in bases):
        return "begin it with a dash: it is a list, even with one entry"
    return None
