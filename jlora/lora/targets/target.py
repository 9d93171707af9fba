"""``Target``: one weight that the adapter changes, in all its layers."""

from __future__ import annotations

from typing import NamedTuple

from jlora.tree import paths


class Target(NamedTuple):
    """A weight to adapt: a linear layer, a part of a fused one, an embedding or a parameter."""

    path: paths.Path  # of the module, or of a parameter's leaf
    stack: paths.Path | None
    names: tuple[str, ...]  # the module's name in each layer
    shape: tuple[int, int]  # (in, out) of one matrix
    ranks: tuple[int, ...] = ()  # one for each layer; 0: the layer is not adapted
    kind: str = "kernel"  # or "embedding", or the key of a parameter
    experts: int = 0  # number of expert matrices in one layer
    widths: tuple[int, ...] = ()  # columns of all parts, if this is a part of a fused projection

    @property
    def modules(self) -> paths.ModuleStack:
        """The modules that it adapts, one a layer."""
        return paths.ModuleStack(self.path, self.stack, len(self.names) if self.stack else None)

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter without a linear layer: matrices of experts, or a router's."""
        return self.experts > 0 or self.kind == "weight"

    @property
    def leaf(self) -> paths.Path:
        """The path of the base's leaf."""
        return self.path if self.is_parameter else (*paths.whole_projection(self.path), self.kind)

    @property
    def start(self) -> int:
        """The first column of a part within its fused projection."""
        if not paths.is_part(self.path):
            return 0
        return sum(self.widths[: paths.FUSED[self.path[-2]].index(self.path[-1])])
