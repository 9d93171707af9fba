"""Sharding constraints inside jit: rows of a batch, and the quantized weights of one layer.

All of these read the mesh that is set (``jax.set_mesh``) and change nothing without one, or where
the mesh does not divide the rows. They change where values are computed, never which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.distributed.mesh import BATCH_AXES
from jlora.distributed.sharding import mapping_keys, quantized_spec, spec
from jlora.quant.params import is_quantized


def rows_per_device(rows: int) -> int:
    """How many of a batch's rows one device computes; all of them if they are not split."""
    return rows // (_row_shards(rows) or 1)


def split_rows(x: Float[Array, "B T dim"]) -> Float[Array, "B T dim"]:
    """Embedding vectors with their rows split over ``data`` and ``fsdp``.

    Everything computed from them inherits this. Without it XLA may keep all rows on every device
    and split the features as the weights are split: activations are then gathered in every layer,
    which is not FSDP.

    The first constraint leaves the look-up where it is natural, with ``fsdp`` on the table's
    feature dimension, and the second moves the rows. With the second alone XLA materializes the
    whole array on every device ("involuntary full rematerialization").
    """
    if _row_shards(x.shape[0]) is None:
        return x
    x = jax.lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp"))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def shard_map_rows(
    f: Callable[[Array, Any], Array], x: Float[Array, "B ..."], weights: Any
) -> Array:
    """``f(x, weights)``, computed by each device on its own rows only.

    For functions that sort tokens of all rows, as expert routing does: partitioning a sort, XLA
    makes every device sort, and compute, all rows.
    """
    if _row_shards(x.shape[0]) is None:
        return f(x, weights)
    # Only these axes are manual: over `tensor` XLA still partitions the matrices.
    rows, axes = PartitionSpec(BATCH_AXES), set(BATCH_AXES)
    specs = {"in_specs": (rows, PartitionSpec()), "out_specs": rows}
    return jax.shard_map(f, **specs, axis_names=axes, check_vma=False)(x, weights)


def gather_quantized(tree: Any) -> Any:
    """The tree with its quantized weights no longer split over ``fsdp``, for use in one layer.

    This gathers the codes. Without it XLA dequantizes the shards and gathers the result: for 4-bit
    codes and float32 values, eight times the bytes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree

    def unsplit(path: tuple, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        specs = quantized_spec(mapping_keys(path), leaf, mesh, frozenset({"fsdp"}))
        return jax.tree.map(jax.lax.with_sharding_constraint, leaf, specs)

    return jax.tree_util.tree_map_with_path(unsplit, tree, is_leaf=is_quantized)


def gather_dense(tree: Any) -> Any:
    """The tree with its dense weights no longer split over ``fsdp``, for use in a loop.

    XLA gathers a weight where it is used: within a loop over chunks once for every chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree

    def unsplit(path: tuple, leaf: Any) -> Any:
        if is_quantized(leaf):
            return leaf
        axes = spec(mapping_keys(path), leaf.shape, mesh)
        if "fsdp" not in axes:
            return leaf
        without = PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes))
        return jax.lax.with_sharding_constraint(leaf, without)

    return jax.tree_util.tree_map_with_path(unsplit, tree, is_leaf=is_quantized)


def _row_shards(rows: int) -> int | None:
    """Into how many shards the mesh splits this many rows; None if it does not split them."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    return None if mesh.empty or rows % shards else shards
