"""What is adapted: one weight, in the layers it stands for."""

from __future__ import annotations

from typing import NamedTuple

from jlora.tree import paths


class Target(NamedTuple):
    """One weight to adapt: a linear layer, a part of a fused one, an embedding, or all experts'."""

    path: paths.Path  # the module's, or a bare parameter's own
    stack: paths.Path | None
    names: tuple[str, ...]  # the module's name in each layer
    shape: tuple[int, int]  # (in, out) of one matrix
    ranks: tuple[int, ...] = ()  # one a layer; 0: this layer is not adapted
    kind: str = "kernel"  # or "embedding", or the bare parameter's name
    experts: int = 0  # how many matrices a bare parameter holds in one layer
    widths: tuple[int, ...] = ()  # of all parts, if this is a part of a fused projection

    @property
    def modules(self) -> paths.ModuleStack:
        """The modules that it adapts, one a layer."""
        return paths.ModuleStack(self.path, self.stack, len(self.names) if self.stack else None)

    @property
    def leaf(self) -> paths.Path:
        """The path of the base's leaf."""
        return self.path if self.experts else (*paths.whole_projection(self.path), self.kind)

    @property
    def start(self) -> int:
        """The first column of a part in its projection."""
        if not paths.is_part(self.path):
            return 0
        return sum(self.widths[: paths.FUSED[self.path[-2]].index(self.path[-1])])
