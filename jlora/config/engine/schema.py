"""What a table of settings is made of: field types, faults, and the base of every table.

A table is a frozen dataclass that inherits ``Section``. Its annotations are its schema: each value
is converted to the field's type when the table is built, lists become tuples and dicts become
``FrozenMap``, so that every table is hashable and can be a static argument of ``jax.jit``.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from jlora.config.engine.convert import BadValueError, Bounds, convert
from jlora.config.engine.faults import Fault, as_error

Count = Annotated[int, Bounds(1)]
Natural = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, open_low=True)]
NonNegative = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1, open_high=True)]

DType = Literal["float32", "float16", "bfloat16"]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES |= {f"torch.{name}": name for name in ("float32", "float16", "bfloat16")}

INPUT, LOCAL = "input path", "local input path"

InputPath = Annotated[str, INPUT]
"""A file, a folder or a hub name; the loader finds relative ones (see ``load``)."""

LocalPath = Annotated[str, LOCAL]
"""The same, but never a hub name: it must be there."""


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
