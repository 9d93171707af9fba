"""The ``mesh`` section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from jlora.config.engine.convert import Bounds
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import ConfigSection

Axis = Annotated[int, Bounds(-1)]


@dataclass(frozen=True, kw_only=True)
class MeshConfig(ConfigSection):
    """Devices along each axis; one axis may be -1: all that are left."""

    data: Axis = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: Axis = 1
    """Parts of the batch that also share one copy of the parameters between them."""
    tensor: Axis = 1
    """Parts of every matrix, for one and the same part of the batch."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        axes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in axes.items():
            if size == 0:
                yield Fault((name,), "must be positive or -1, got 0")
        if free := [name for name, size in axes.items() if size == -1][1:]:
            yield Fault((free[0], *axes), "only one axis can be -1")
