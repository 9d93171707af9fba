"""Mistakes in settings: a ``Fault`` describes one, and one exception reports all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jlora import errors


@dataclasses.dataclass(frozen=True)
class Fault:
    """One mistake: the dotted keys involved (the message names the first), its cause and remedy.

    ``where`` is a file with its line, an override, or the class that was called from Python.
    """

    keys: tuple[str, ...]
    cause: str
    fix: str | None = None
    where: str | None = None

    def with_prefix(self, prefix: str) -> Fault:
        """The same fault with ``prefix.`` before each key."""
        return dataclasses.replace(self, keys=tuple(f"{prefix}.{key}" for key in self.keys))

    def as_error(self) -> errors.ConfigError:
        """This fault as an exception."""
        place = ": ".join(part for part in (self.where, *self.keys[:1]) if part)
        return errors.ConfigError(self.cause, where=place or None, fix=self.fix)


def combined_error(faults: Sequence[Fault]) -> errors.ConfigError:
    """One exception that lists every fault."""
    if len(faults) == 1:
        return faults[0].as_error()
    lines = [str(fault.as_error()) for fault in faults]
    return errors.ConfigError("\n".join([f"{len(faults)} settings are wrong", *lines]))
