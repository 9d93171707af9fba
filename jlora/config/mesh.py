"""The ``mesh`` section: how devices are arranged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from jlora.config.engine.convert import Bounds
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import ConfigSection

AxisSize = Annotated[int, Bounds(-1)]


@dataclass(frozen=True, kw_only=True)
class MeshConfig(ConfigSection):
    """Number of devices along each mesh axis; one axis may be -1: all remaining devices."""

    data: AxisSize = -1
    """Data parallelism: devices that split the batch, each with a copy of the parameters."""
    fsdp: AxisSize = 1
    """FSDP: devices that shard parameters and batch."""
    tensor: AxisSize = 1
    """Tensor parallelism: devices that split each matrix product of the same rows."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        axes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in axes.items():
            if size == 0:
                yield Fault((name,), "must be positive or -1, got 0")
        if surplus := [name for name, size in axes.items() if size == -1][1:]:
            yield Fault((surplus[0], *axes), "only one axis can be -1")
