"""The names that transformers gives to the tensors of a parameter tree.

::

    tree    ("model", "layers", "mlp", "up_proj", "kernel")         (L, in, out)
    tensors model.layers.0.mlp.up_proj.weight … model.layers.{L-1}.mlp.up_proj.weight   [out, in]

Only names and shapes here; no array is touched.
"""

from __future__ import annotations

import dataclasses

from jlora import paths
from jlora.models.model import Model
from jlora.models.registry import family

WEIGHT = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
"""Our leaf keys → transformers' last name part."""

HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the slice of the tree that it holds."""

    name: str
    path: paths.Path
    layer: int | None
    """Its index on the leaf's leading axis, where the leaf is stacked."""
    transposed: bool
    """Whether the file holds [out, in] where the tree holds (in, out)."""
    shape: tuple[int, ...]
    """As in the file."""


def tensors(model: Model) -> list[Tensor]:
    """The tensors of the model's checkpoint, in tree order; tied heads have none."""
    transposed = family(model.config).transposed
    result = []
    for leaf in paths.leaves(model.shapes):
        flip = (transposed and leaf.kind == "kernel") or leaf.path[:1] == ("lm_head",)
        shape = leaf.shape[::-1] if flip else leaf.shape
        for layer in [None] if leaf.layers is None else range(leaf.layers):
            name = f"{leaf.module(layer)}.{WEIGHT[leaf.kind]}"
            result.append(Tensor(name, leaf.path, layer, flip, shape))
    return result


def embedding_name(model: Model) -> str:
    """The tensor that a tied head shares."""
    return f"{family(model.config).embedding}.weight"
