"""What is wrong with settings: one ``Fault`` each, and one exception for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jlora import errors


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
