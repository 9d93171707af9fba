"""The base class of every section, and the types its fields are annotated with.

A section is a frozen dataclass that inherits ``ConfigSection``. The annotations are the schema.
Values are converted to them, lists to tuples and mappings to ``FrozenMap``, so that a section is
hashable and can be a static argument of ``jax.jit``.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from jlora.config.engine.convert import BadValueError, Bounds, InputMark, OutputMark, convert_value
from jlora.config.engine.faults import Fault, combined_error

Count = Annotated[int, Bounds(1)]
Natural = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, open_low=True)]
NonNegative = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1, open_high=True)]

DType = Literal["float32", "float16", "bfloat16"]
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPE_ALIASES |= {f"torch.{name}": name for name in ("float32", "float16", "bfloat16")}

InputPath = Annotated[str, InputMark(may_be_hub_name=True)]
"""A file, a folder or a hub name; ``input_paths`` makes relative paths absolute."""

LocalPath = Annotated[str, InputMark(may_be_hub_name=False)]
"""A file or folder that must exist."""

OutputFolder = Annotated[str, OutputMark()]
"""A folder that need not exist; ``~`` is the home folder."""


class ConfigSection:
    """Base of every section.

    From Python, a section is built like any dataclass: values are converted to their fields'
    types and checked, and ConfigError names all faults. The YAML loader, which collects faults
    over a whole file, converts the values itself and calls ``from_converted`` and ``check``.
    """

    ALIASES: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Field → another library's spelling of a value → the value here."""

    def __post_init__(self) -> None:
        faults = []
        for name in field_types(type(self)):
            try:
                object.__setattr__(self, name, self.convert_field(name, getattr(self, name)))
            except BadValueError as bad:
                faults.append(Fault((name,), bad.cause, bad.fix))
        if not faults:
            self.derive_defaults()
            faults = list(self.check())
        if faults:
            where = type(self).__name__
            raise combined_error([dataclasses.replace(f, where=where) for f in faults])

    @classmethod
    def from_converted(cls, values: Mapping[str, Any]) -> Self:
        """The section with these values, one for every field and of its type; not checked."""
        section = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(section, name, value)
        section.derive_defaults()
        return section

    @classmethod
    def convert_field(cls, name: str, value: Any) -> Any:
        """``value`` in the type of field ``name``; raises BadValueError."""
        if isinstance(value, str):
            value = cls.ALIASES.get(name, {}).get(value, value)
        return convert_value(value, field_types(cls)[name])

    def derive_defaults(self) -> None:
        """Sets the fields whose default depends on other fields."""

    def check(self) -> Iterator[Fault]:
        """Yields contradictions between fields.

        After a fault the loader still calls this, to report everything at once; a faulty field
        then holds its default, or None if it has none.
        """
        yield from ()


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """Field name → its type, with the marks that ``Annotated`` puts on it."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}
