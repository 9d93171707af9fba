"""The tensors of a transformers checkpoint, and the part of the parameter tree each one holds.

::

    tree    ("model", "layers", "mlp", "up_proj", "kernel")         (L, in, out)
    tensors model.layers.0.mlp.up_proj.weight … model.layers.{L-1}.mlp.up_proj.weight   [out, in]

Names and shapes only; no array is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from jlora.models.family import TensorPart
from jlora.models.model import Model
from jlora.models.registry import family_of
from jlora.tree import paths

HEADS = ("lm_head", "score")

SCORE_HEAD = "score.weight"
"""Name of the tensor of a classifier's head, in every family."""


@dataclasses.dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint and the slice of the leaf that it holds."""

    name: str
    path: paths.Path
    layer: int | None
    """Its index on the layer axis, if the leaf is stacked."""
    transposed: bool
    """Whether the last two axes are swapped in the file, compared with the tree."""
    shape: tuple[int, ...]
    """Its shape in the file."""
    within: tuple[int | slice, ...] = ()
    """Its index within the layer's array, if it is only a part of it."""

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Its index within the leaf."""
        return self.within if self.layer is None else (self.layer, *self.within)


def checkpoint_tensors(model: Model) -> list[CheckpointTensor]:
    """The tensors of the model's checkpoint, in the order of the tree; a tied head has none."""
    return [
        tensor
        for leaf in paths.leaves(model.shapes)
        for layer in ([None] if leaf.layers is None else range(leaf.layers))
        for tensor in _of_leaf(leaf, layer, model)
    ]


def tensors_by_layer(model: Model) -> list[dict[paths.Path, list[CheckpointTensor]]]:
    """For each layer the tensors of its leaves, by the leaf's path within the layer."""
    found: list[dict] = [{} for _ in range(model.config.num_hidden_layers)]
    for leaf in paths.leaves(model.shapes):
        if leaf.stack is not None:
            first, path = paths.first_layer(leaf.stack), leaf.path[len(leaf.stack) :]
            for layer in range(leaf.layers or 0):
                found[first + layer][path] = list(_of_leaf(leaf, layer, model))
    return found


def _of_leaf(leaf: paths.Leaf, layer: int | None, model: Model) -> Iterator[CheckpointTensor]:
    """The tensors that hold one layer of a leaf."""
    conventions = family_of(model.config)
    dotted = ".".join(leaf.path)
    pieces = next(
        (conventions.stored[end] for end in conventions.stored if f".{dotted}".endswith(f".{end}")),
        None,
    )
    flip = leaf.kind in conventions.flipped or (
        leaf.kind == "kernel" and (conventions.transposed or leaf.path[0] in HEADS)
    )
    if pieces is None:
        module_name = f"{leaf.module(layer)}.{paths.TORCH_NAMES.get(leaf.kind, leaf.kind)}"
        name = conventions.name_in_files(module_name)
        shape = _swap_last_axes(leaf.shape) if flip else leaf.shape
        yield CheckpointTensor(name, leaf.path, layer, flip, shape)
        return
    front = "" if leaf.stack is None else f"{leaf.modules_at(leaf.stack).name(layer)}."
    for piece in pieces:
        for within, shape, number in _parts(piece, leaf.shape):
            name = conventions.name_in_files(f"{front}{piece.name.format(number)}")
            yield CheckpointTensor(
                name, leaf.path, layer, flip, _swap_last_axes(shape) if flip else shape, within
            )


def _swap_last_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _parts(
    piece: TensorPart, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int | slice, ...], tuple[int, ...], int]]:
    """(index within the layer, shape, number) of each tensor of a TensorPart."""
    counted = "{}" in piece.name
    rest = shape[1:] if counted else shape
    part: tuple[slice, ...] = ()
    if piece.parts > 1:
        size = rest[0] // piece.parts
        part, rest = (slice(piece.part * size, (piece.part + 1) * size),), (size, *rest[1:])
    for number in range(shape[0] if counted else 1):
        yield ((number, *part) if counted else part), rest, number


def embedding_name(model: Model) -> str:
    """Name of the embedding's tensor, which a tied head shares."""
    conventions = family_of(model.config)
    path = conventions.rename(("model", "embed_tokens"))
    return conventions.name_in_files(f"{'.'.join(path)}.weight")


def is_of_others(name: str, model: Model) -> bool:
    """Whether a tensor in the files belongs to no part of the model (see ``Family``)."""
    pattern = family_of(model.config).other_tensors
    return pattern is not None and re.fullmatch(pattern, name) is not None


def head_name(model: Model) -> str:
    """Name of the tensor of a language model's untied head."""
    conventions = family_of(model.config)
    stored = conventions.stored.get("lm_head.kernel")
    return stored[0].name if stored else conventions.name_in_files("lm_head.weight")
