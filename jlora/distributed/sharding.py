"""How arrays are sharded: a layout for every leaf by its name, and placement on the devices.

The mesh has three axes. A batch is split over ``data`` and ``fsdp``; parameters are split over
``fsdp`` (gathered when they are used) and ``tensor`` (each device computes with its part)::

    q_proj, gate_proj, lm_head, other kernels (…, in, out)    in: fsdp     out: tensor
    o_proj, down_proj, c_proj (…, in, out)                    in: tensor   out: fsdp
    embedding (vocabulary, dim)                               vocabulary: tensor, dim: fsdp
    lora_A (…, in, r), lora_B (…, r, out)                     in and out as in the base's kernel
    lora_embedding_A (vocabulary, r), lora_embedding_B (r, dim)        likewise
    experts' gate_up_proj, down_proj (…, out, in)             as up_proj and down_proj
    everything else                                           replicated

An axis whose size does not divide the dimension is dropped there. The dimension of a quantized
kernel that its blocks run along is counted in blocks, so that every shard holds whole ones; an axis
that does not divide their number splits the other dimension further.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from jlora.distributed.mesh import BATCH_AXES, make_mesh
from jlora.quant.int8 import Int8Array
from jlora.quant.nf4 import NF4Array
from jlora.quant.params import QuantizedArray, is_quantized

__all__ = [
    "LayoutRow",
    "abstract_arrays",
    "batch_sharding",
    "describe",
    "gather",
    "make_mesh",
    "mapping_keys",
    "output_types",
    "place",
    "quantized_spec",
    "shardings",
    "spec",
]

# In pairs, as in Megatron-LM (arXiv 1909.08053): what q, k, v, gate and up compute is split as
# o_proj and down_proj read it, so that `tensor` reduces activations only twice a layer.
MODULE_AXES = (
    (r"o_proj|down_proj|c_proj|out_proj|dense|dense_4h_to_h|fc2|wo", ("tensor", "fsdp")),
    (r"[Ee]mbed.*|wte|wpe", ("tensor", "fsdp")),
    (r".*", ("fsdp", "tensor")),
)
"""Pattern of a module's last name → the axes of its matrix's two dimensions; first match wins."""

EXPERT_AXES = {"gate_up_proj": ("tensor", "fsdp"), "down_proj": ("fsdp", "tensor")}
"""Leaf with a matrix [out, in] for every expert → the axes of its last two dimensions."""


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The same tree with a NamedSharding for every array, including those in quantized leaves.

    The layout follows from the mapping keys on a leaf's path, whatever containers are between them:
    parameters, adapters, or a TrainState, whose optimizer moments mirror the adapter. Shapes are
    enough; but only arrays and traced types say that a leaf is in host memory, where it then stays.
    """

    def layout(path: tuple, leaf: Any) -> Any:
        if not is_quantized(leaf):
            partition = spec(mapping_keys(path), np.shape(leaf), mesh)
            return NamedSharding(mesh, partition, memory_kind=_memory_kind(leaf))
        specs = quantized_spec(mapping_keys(path), leaf, mesh)
        return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=_is_spec)

    return jax.tree_util.tree_map_with_path(layout, tree, is_leaf=is_quantized)


def batch_sharding(mesh: Mesh, multi_adapter: bool = False) -> NamedSharding:
    """The sharding of batch arrays (accumulation, B, …): B is split over ``data`` and ``fsdp``.

    With ``multi_adapter`` the arrays have a leading axis of adapters.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * multi_adapter, None, BATCH_AXES))


def spec(path: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of an array of ``shape`` at ``path``; leading axes (layers) stay whole."""
    axes = _matrix_axes(path)
    if axes is None or len(shape) < 2:
        return PartitionSpec()
    last_two = [_if_divides(axis, size, mesh) for axis, size in zip(axes, shape[-2:], strict=True)]
    # Were the layer axis split, a layer would lie on a part of the devices, and the scan would send
    # it to the others before it computes with it.
    return PartitionSpec(*[None] * (len(shape) - 2), *last_two)


def quantized_spec(
    path: Sequence[str], q: QuantizedArray, mesh: Any, without: frozenset[str] = frozenset()
) -> QuantizedArray:
    """A quantized array with a PartitionSpec in place of each of its arrays.

    Codes and the scales they share are split alike, so that each device can dequantize what it
    holds. What cannot be split in this way is replicated: ``nested_absmax`` and ``nested_offset``
    (its 256 blocks may belong to several devices), and the ``absmax`` of blocks that straddle rows.

    Args:
      path: the mapping keys of the leaf.
      q: the array, or its shapes.
      mesh: a concrete or an abstract mesh.
      without: axes that nothing is split over.
    """
    axes = _matrix_axes(path)
    if axes is not None:
        axes = tuple(None if axis in without else axis for axis in axes)
    rows, cols = q.codes.shape[-2:]
    lead, replicated = [None] * len(q.lead), PartitionSpec()
    if isinstance(q, NF4Array) and q.rowwise:
        cols //= q.block_size // 2
    last_two = (None, None)
    if axes is not None and len(q.shape) == len(q.lead) + 2:
        stored_order = tuple(reversed(axes)) if q.transposed else axes
        last_two = _split_matrix(stored_order, (rows, cols), mesh)
    codes = PartitionSpec(*lead, *last_two)
    if isinstance(q, Int8Array):
        return dataclasses.replace(q, codes=codes, absmax=PartitionSpec(*lead, last_two[0]))
    nested = None if q.nested_absmax is None else replicated
    absmax = codes if q.rowwise else replicated
    return dataclasses.replace(
        q, codes=codes, absmax=absmax, nested_absmax=nested, nested_offset=nested
    )


def abstract_arrays(tree: Any, mesh: Mesh) -> Any:
    """A ``jax.ShapeDtypeStruct`` for every array of a tree (or of its types), with its sharding."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings(tree, mesh),
    )


def output_types(function: Any, *arguments: Any) -> Any:
    """The types of a function's outputs: ``jax.eval_shape`` that also knows their memory space.

    ``eval_shape`` does not say that optimizer moments are paged to the host; the traced types do.
    """
    # Traced, not compiled: this costs as much as eval_shape.
    traced = jax.jit(function).trace(*arguments)
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), traced.jaxpr.out_avals)


def place(tree: Any, shardings: Any) -> Any:
    """The tree on its devices.

    With several processes every one calls this with the same values and keeps what its own devices
    hold. An array that already spans processes is only resharded.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place_across_processes, tree, shardings)


def gather(tree: Any) -> Any:
    """The whole tree as NumPy arrays, on every process; all processes must call it."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


class LayoutRow(NamedTuple):
    """All leaves of one kind and layout: their total bytes, and the bytes on each device."""

    kind: str
    layout: str
    leaves: int
    total_bytes: int
    device_bytes: int


def describe(tree: Any, mesh: Mesh) -> list[LayoutRow]:
    """What each device holds, by kind of leaf and layout, largest first, for the run header.

    A layout names the axes that split the leaf's last two dimensions, as in ``fsdp × tensor``.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]
    layouts = jax.tree.leaves(shardings(tree, mesh), is_leaf=is_quantized)
    for (path, leaf), layout in zip(leaves, layouts, strict=True):
        arrays, array_shardings = jax.tree.leaves(leaf), jax.tree.leaves(layout)
        kind = mapping_keys(path)[-1] + (f" ({_data_type(leaf)})" if is_quantized(leaf) else "")
        group = groups.setdefault((kind, _layout_name(array_shardings[0], mesh)), [0, 0, 0])
        group[0] += 1
        for array, sharding in zip(arrays, array_shardings, strict=True):
            itemsize = np.dtype(array.dtype).itemsize
            group[1] += itemsize * math.prod(array.shape)
            group[2] += itemsize * math.prod(sharding.shard_shape(tuple(array.shape)))
    rows = [LayoutRow(*key, *sizes) for key, sizes in groups.items()]
    return sorted(rows, key=lambda row: -row.total_bytes)


def mapping_keys(path: tuple) -> list[str]:
    """The mapping keys of a leaf's key path, without the containers between them."""
    return [str(key.key) for key in path if isinstance(key, DictKey)] or ["other"]


def _place_across_processes(value: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    # Not device_put, which would compare the values of all processes first.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _split_matrix(axes: Sequence[str | None], sizes: Sequence[int], mesh: Any) -> tuple[Any, Any]:
    """What splits the two dimensions of a quantized matrix; see the module's docstring."""
    (a, b), (rows, cols) = axes, sizes
    first, second = _if_divides(a, rows, mesh), _if_divides(b, cols, mesh)
    if a and b and not (first and second):
        both = mesh.shape[a] * mesh.shape[b]
        if first and rows % both == 0:
            return (a, b), None
        if second and cols % both == 0:
            return None, (b, a)
    return first, second


def _matrix_axes(path: Sequence[str]) -> tuple[str | None, str | None] | None:
    """The mesh axes of a leaf's last two dimensions; None for replicated leaves."""
    kind, module = path[-1] if path else "", path[-2] if len(path) > 1 else ""
    rows, cols = next(axes for names, axes in MODULE_AXES if re.fullmatch(names, module))
    matrix = (rows, cols)
    return {
        "kernel": matrix,
        "embedding": matrix,
        "lora_A": (rows, None),
        "lora_B": (None, cols),
        "lora_embedding_A": (rows, None),
        "lora_embedding_B": (None, cols),
        **EXPERT_AXES,
    }.get(kind)


def _if_divides(axis: str | None, size: int, mesh: Any) -> str | None:
    """The axis, or None if its size does not divide the dimension's."""
    return axis if axis is not None and size % mesh.shape[axis] == 0 else None


def _memory_kind(leaf: Any) -> str | None:
    """``pinned_host`` for a leaf in host memory; None, the device's default, for all others."""
    if isinstance(leaf, jax.Array):
        leaf = jax.typeof(leaf)
    space = getattr(leaf, "memory_space", None)
    return "pinned_host" if space == jax.memory.Space.Host else None


def _layout_name(layout: NamedSharding, mesh: Mesh) -> str:
    axes = [
        axis for axes in layout.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())
    ]
    return " × ".join(axis for axis in axes if mesh.shape[axis] > 1) or "replicated"


def _data_type(leaf: QuantizedArray) -> str:
    return "int8" if isinstance(leaf, Int8Array) else leaf.quant_type.upper()


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
