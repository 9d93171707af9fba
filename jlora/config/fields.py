"""What a table of settings is made of: field types, faults, and the base of every table.

A table is a frozen dataclass that inherits ``Section``. Its annotations are its schema: each value
is converted to the field's type when the table is built, lists become tuples and dicts become
``FrozenMap``, so that every table is hashable and can be a static argument of ``jax.jit``.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from jlora import errors
from jlora.config.convert import BadValueError, Bounds, Prefix, convert

Count = Annotated[int, Bounds(1)]
Natural = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, open_low=True)]
NonNegative = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1, open_high=True)]

OPTAX = "optax."

OptaxName = Annotated[str, Prefix(OPTAX)]
"""An optimizer of optax by its name there."""

INPUT, LOCAL = "input path", "local input path"

InputPath = Annotated[str, INPUT]
"""A file, a folder or a hub name; the loader finds relative ones (see ``load``)."""

LocalPath = Annotated[str, LOCAL]
"""The same, but never a hub name: it must be there."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the dotted keys it involves (first is named), cause and remedy."""

    keys: tuple[str, ...]
    cause: str
    fix: str | None = None
    where: str | None = None

    def under(self, prefix: str) -> Fault:
        """The same fault with its keys below a section."""
        return dataclasses.replace(self, keys=tuple(f"{prefix}.{k}" for k in self.keys))

    def error(self) -> errors.ConfigError:
        """This fault as an exception."""
        place = ": ".join(part for part in (self.where, self.keys[0] if self.keys else "") if part)
        return errors.ConfigError(self.cause, where=place or None, fix=self.fix)


def as_error(faults: Sequence[Fault]) -> errors.ConfigError:
    """One exception for all faults of a table or a file."""
    if len(faults) == 1:
        return faults[0].error()
    lines = [str(fault.error()) for fault in faults]
    return errors.ConfigError("\n".join([f"{len(faults)} settings are wrong", *lines]))


class Section:
    """Base of every table: converts the values to their fields' types, then checks them together.

    Raises ConfigError naming all faults.
    """

    ALIASES: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Field → spelling known elsewhere → the value it means here."""

    def __post_init__(self) -> None:
        faults = []
        for name, hint in hints(type(self)).items():
            try:
                value = self.convert(name, getattr(self, name), hint)
                object.__setattr__(self, name, value)
            except BadValueError as bad:
                faults.append(Fault((name,), bad.cause, bad.fix))
        if faults := faults or list(self.check()):
            owner = type(self).__name__
            raise as_error([dataclasses.replace(f, where=owner) for f in faults])

    @classmethod
    def convert(cls, name: str, value: Any, hint: Any = None) -> Any:
        """The value of field ``name`` in its field's type; raises BadValueError."""
        aliases = cls.ALIASES.get(name, {})
        if isinstance(value, str):
            value = aliases.get(value, value)
        return convert(value, hints(cls)[name] if hint is None else hint)

    def check(self) -> Iterator[Fault]:
        """Yields what is wrong between fields whose types are right."""
        yield from ()


@functools.cache
def hints(table: type) -> dict[str, Any]:
    """Field name → type, with the bounds, of a table."""
    types_of = typing.get_type_hints(table, include_extras=True)
    return {f.name: types_of[f.name] for f in dataclasses.fields(table)}
