"""Where arrays lie: the mesh, a layout for every leaf by its name, and placement.

The mesh has three axes. A batch is split over ``data`` and ``fsdp``; parameters are split over
``fsdp`` (gathered when they are used) and ``tensor`` (used in parts)::

    q_proj, gate_proj, lm_head, other kernels (…, in, out)    in: fsdp     out: tensor
    o_proj, down_proj, c_proj (…, in, out)                    in: tensor   out: fsdp
    embedding (vocabulary, dim)                               vocabulary: tensor, dim: fsdp
    lora_A (…, in, r), lora_B (…, r, out)                     as the base's in, and its out
    lora_embedding_A (vocabulary, r), lora_embedding_B (r, dim)        likewise
    experts' gate_up_proj, down_proj (…, out, in)             as up_proj and down_proj
    everything else                                           one copy on every device

An axis that does not divide its dimension is dropped there. A packed kernel's dimension along its
blocks counts in blocks, so that every shard holds whole ones; an axis that does not divide their
number splits the other dimension further. All axes are Auto: a layout changes
where values are computed, never which.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey
from jaxtyping import Array, Float

from jlora.config import MeshConfig
from jlora.errors import ConfigError
from jlora.quant.int8 import Int8Array
from jlora.quant.nf4 import NF4Array
from jlora.quant.params import QuantizedArray, is_quantized

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
MODULES = (
    (r"o_proj|down_proj|c_proj|out_proj|dense|dense_4h_to_h|fc2|wo", ("tensor", "fsdp")),
    (r"[Ee]mbed.*|wte|wpe", ("tensor", "fsdp")),
    (r".*", ("fsdp", "tensor")),
)
"""A module's last name → the axes of its matrix's two dimensions; the first that matches counts."""


EXPERT_AXES = {"gate_up_proj": ("tensor", "fsdp"), "down_proj": ("fsdp", "tensor")}
"""A leaf with a matrix [out, in] for every expert → the axes of the two dimensions."""


COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
    "gpu": {"xla_gpu_dot_merger_threshold_mb": "0"},
}
"""Platform → what XLA is told beside its defaults.

On CPUs XLA widens the slices of a bfloat16 array to float32, and this pass moves the widening out
of the loop over layers: all layers' weights and activations at once (seen in jaxlib 0.10.2).

On GPUs XLA makes one product of ``x @ W`` and ``x @ A``, for which it writes the two matrices side
by side anew in every layer: a sixth of all bytes that a LoRA step of an 8B model moves. Apart they
take 0.28 GiB more of temporaries there. By the compiled step; no GPU has timed it.
"""


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """XLA's options for programs that loop over layers on these devices, for ``jax.jit``."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) of all devices, in an order that suits their network.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise _does_not_fit(sizes, fixed, len(devices), free)
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def _does_not_fit(sizes: dict, fixed: int, count: int, free: list[str]) -> ConfigError:
    asked = " × ".join(f"{name} {'rest' if size == -1 else size}" for name, size in sizes.items())
    possible = [n for n in range(1, count + 1) if count % n == 0]
    numbers = ", ".join(map(str, possible))
    if free:
        others = " × ".join(name for name in AXES if name not in free)
        fix = f"choose {others} so that their product is one of {numbers}"
    else:
        fix = "set one axis, such as mesh.data, to -1: it takes the devices that are left"
        if fixed > count:
            fix = f"make the product {count}, or start more processes or devices"
    are = "is 1 device" if count == 1 else f"are {count} devices"
    return ConfigError(f"asks for {asked}, but there {are}", where="mesh", fix=fix)


def spec(path: Sequence[str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The layout of an array of ``shape`` at ``path``; leading axes (layers) stay whole."""
    axes = _matrix_axes(path)
    if axes is None or len(shape) < 2:
        return PartitionSpec()
    kept = [_fit(axis, size, mesh) for axis, size in zip(axes, shape[-2:], strict=True)]
    return PartitionSpec(*[None] * (len(shape) - 2), *kept)


def quantized_spec(
    path: Sequence[str], q: QuantizedArray, mesh: Any, without: frozenset[str] = frozenset()
) -> QuantizedArray:
    """The layouts of a packed array's children, in their places.

    Values and the scales they share are split alike, so that each device can dequantize what it
    holds. What cannot be split so lies on every device: ``nested_absmax`` and ``nested_offset``
    (256 blocks need not be on one), and the ``absmax`` of blocks that straddle rows. Nothing is
    split over the axes in ``without``.
    """
    axes = _matrix_axes(path)
    if axes is not None:
        axes = tuple(None if axis in without else axis for axis in axes)
    rows, cols = q.codes.shape[-2:]
    lead, whole = [None] * len(q.lead), PartitionSpec()
    if isinstance(q, NF4Array) and q.rowwise:
        cols //= q.block_size // 2
    along = (None, None)
    if axes is not None and len(q.shape) == len(q.lead) + 2:
        along = _split(tuple(reversed(axes)) if q.transposed else axes, (rows, cols), mesh)
    codes = PartitionSpec(*lead, *along)
    if isinstance(q, Int8Array):
        return dataclasses.replace(q, codes=codes, absmax=PartitionSpec(*lead, along[0]))
    nested = None if q.nested_absmax is None else whole
    absmax = codes if q.rowwise else whole
    return dataclasses.replace(
        q, codes=codes, absmax=absmax, nested_absmax=nested, nested_offset=nested
    )


def _row_parts(rows: int) -> int | None:
    """Into how many parts the mesh splits so many rows, under jit; None where it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape.get(axis, 1) for axis in BATCH)
    return None if mesh.empty or rows % parts else parts


def rows_each(rows: int) -> int:
    """How many of a batch's rows one device computes, under jit; all where they do not split."""
    return rows // (_row_parts(rows) or 1)


def split_rows(x: Float[Array, "B T dim"]) -> Float[Array, "B T dim"]:
    """What was looked up in an embedding, under jit: rows split over ``data`` and ``fsdp``.

    All that follows keeps this; without it XLA may keep all rows on every device and split their
    features as the weights are. The look-up is where ``fsdp`` splits the table's dim, and then the
    rows move: asked for both at once, XLA makes the whole on every device.
    """
    if _row_parts(x.shape[0]) is None:
        return x
    x = jax.lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp"))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH))


def by_rows(f: Callable[[Array, Any], Array], x: Float[Array, "B ..."], weights: Any) -> Array:
    """``f(x, weights)`` under jit, where each device computes its own rows of the batch by itself.

    For what orders tokens across rows: XLA would have every device order, and compute, all of them.
    """
    if _row_parts(x.shape[0]) is None:
        return f(x, weights)
    rows, axes = PartitionSpec(BATCH), set(BATCH)
    specs = {"in_specs": (rows, PartitionSpec()), "out_specs": rows}
    return jax.shard_map(f, **specs, axis_names=axes, check_vma=False)(x, weights)


def gather_quantized(tree: Any) -> Any:
    """The same values under jit, packed arrays no longer split over ``fsdp``: for one layer's use.

    Without it XLA dequantizes the shards and gathers those, at eight times the bytes of the codes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree

    def whole(path: tuple, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        specs = quantized_spec(_keys(path), leaf, mesh, frozenset({"fsdp"}))
        return jax.tree.map(jax.lax.with_sharding_constraint, leaf, specs)

    return jax.tree_util.tree_map_with_path(whole, tree, is_leaf=is_quantized)


def _split(axes: Sequence[str | None], sizes: Sequence[int], mesh: Any) -> tuple[Any, Any]:
    """What splits the two dimensions of a packed matrix; see the module's header."""
    (a, b), (rows, cols) = axes, sizes
    first, second = _fit(a, rows, mesh), _fit(b, cols, mesh)
    if a and b and not (first and second):
        both = mesh.shape[a] * mesh.shape[b]
        if first and rows % both == 0:
            return (a, b), None
        if second and cols % both == 0:
            return None, (b, a)
    return first, second


def _matrix_axes(path: Sequence[str]) -> tuple[str | None, str | None] | None:
    """The mesh axes of a leaf's last two dimensions; None for what lies on every device."""
    kind, module = path[-1] if path else "", path[-2] if len(path) > 1 else ""
    rows, cols = next(axes for names, axes in MODULES if re.fullmatch(names, module))
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


def _fit(axis: str | None, size: int, mesh: Any) -> str | None:
    return axis if axis is not None and size % mesh.shape[axis] == 0 else None


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The same tree with a NamedSharding for every array, those inside packed ones included.

    Leaves go by the mapping keys on the way to them, whatever else is around: parameters,
    adapters, a TrainState with moments that mirror the adapter. Shapes are enough, but only arrays
    and traced types say that a leaf is in the host's memory, where it then stays.
    """

    def layout(path: tuple, leaf: Any) -> Any:
        if not is_quantized(leaf):
            at = spec(_keys(path), np.shape(leaf), mesh)
            return NamedSharding(mesh, at, memory_kind=_memory_kind(leaf))
        specs = quantized_spec(_keys(path), leaf, mesh)
        return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=_is_spec)

    return jax.tree_util.tree_map_with_path(layout, tree, is_leaf=is_quantized)


def typed(function: Any, *arguments: Any) -> Any:
    """What a function would return, as types: eval_shape, and which memory a leaf is in."""
    traced = jax.jit(function).trace(*arguments)
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), traced.jaxpr.out_avals)


def _memory_kind(leaf: Any) -> str | None:
    """``pinned_host`` for what lies in the host's memory; None is the device's own."""
    if isinstance(leaf, jax.Array):
        leaf = jax.typeof(leaf)
    space = getattr(leaf, "memory_space", None)
    return "pinned_host" if space == jax.memory.Space.Host else None


def adapter_shardings(adapter: Any, mesh: Mesh) -> Any:
    """``shardings`` of an adapter: A is split as its base's in, B as its base's out."""
    return shardings(adapter, mesh)


def described(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree's arrays, or of its types, each with the place that it belongs to."""
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        tree,
        shardings(tree, mesh),
    )


def batch_sharding(mesh: Mesh, several: bool = False) -> NamedSharding:
    """For arrays (accumulation, B, …): rows split over ``data`` and ``fsdp``.

    With ``several`` they have a leading axis, of adapters.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * several, None, BATCH))


def place(tree: Any, shardings: Any) -> Any:
    """The tree on its devices.

    With several processes every one calls this with the same values, of which each keeps what its
    own devices hold. An array that lies across processes already is only moved.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place_across_processes, tree, shardings)


def _place_across_processes(value: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather(tree: Any) -> Any:
    """The whole tree as NumPy, on every process: what ``place`` took apart. All must call it."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


class Row(NamedTuple):
    """Leaves of one kind and layout: their bytes in all, and on each device."""

    kind: str
    layout: str
    leaves: int
    total_bytes: int
    device_bytes: int


def describe(tree: Any, mesh: Mesh) -> list[Row]:
    """What lies on each device, by kind of leaf and layout, largest first, for a run's header.

    A layout names the axes that split the leaf's last two dimensions, as in ``fsdp × tensor``.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]
    layouts = jax.tree.leaves(shardings(tree, mesh), is_leaf=is_quantized)
    for (path, leaf), layout in zip(leaves, layouts, strict=True):
        arrays, parts = jax.tree.leaves(leaf), jax.tree.leaves(layout)
        kind = _keys(path)[-1] + (f" ({_code(leaf)})" if is_quantized(leaf) else "")
        group = groups.setdefault((kind, _name(parts[0], mesh)), [0, 0, 0])
        group[0] += 1
        for array, part in zip(arrays, parts, strict=True):
            size = np.dtype(array.dtype).itemsize
            group[1] += size * math.prod(array.shape)
            group[2] += size * math.prod(part.shard_shape(tuple(array.shape)))
    rows = [Row(*key, *sizes) for key, sizes in groups.items()]
    return sorted(rows, key=lambda row: -row.total_bytes)


def _keys(path: tuple) -> list[str]:
    """The mapping keys of a leaf's path, whatever containers are between them."""
    return [str(key.key) for key in path if isinstance(key, DictKey)] or ["other"]


def _name(layout: NamedSharding, mesh: Mesh) -> str:
    axes = [
        axis for axes in layout.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())
    ]
    return " × ".join(axis for axis in axes if mesh.shape[axis] > 1) or "nothing"


def _code(leaf: QuantizedArray) -> str:
    return "int8" if isinstance(leaf, Int8Array) else leaf.quant_type.upper()


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
