"""Attention kernels on a mesh: XLA cannot partition them, so they run in a ``shard_map``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jlora.distributed.mesh import BATCH_AXES


def on_each_device(compute: Callable[..., Array]) -> Callable[..., Array]:
    """``compute(q, k, v, segment_ids, sinks, …)``, run per device on its rows and heads.

    Rows are sharded over ``data`` and ``fsdp`` and heads over ``tensor``, as the projections'
    outputs are; a dimension that its axes do not divide is replicated. Without the ``shard_map``
    XLA gathers the operands of cuDNN within ``lax.cond``, or fails to partition it (docs/log.md).
    """

    @functools.wraps(compute)
    def split(q, k, v, segment_ids, sinks, **settings):
        mesh = jax.sharding.get_abstract_mesh()
        part = functools.partial(compute, **settings)
        if mesh.size <= 1:
            return part(q, k, v, segment_ids, sinks)
        rows = _dividing(BATCH_AXES, q.shape[0], mesh)
        # By the key heads: where the axis divides the query heads only, a device's query heads
        # would lack their key head.
        heads = _dividing(("tensor",), k.shape[2], mesh)
        whole = PartitionSpec(rows, None, heads)
        given = whole, whole, whole, PartitionSpec(rows), PartitionSpec(heads)
        # No check: Pallas kernels do not declare over which mesh axes their results vary.
        part = jax.shard_map(part, in_specs=given, out_specs=whole, check_vma=False)
        return part(q, k, v, segment_ids, sinks)

    return split


def _dividing(axes: tuple[str, ...], size: int, mesh: Any) -> tuple[str, ...] | None:
    present = tuple(axis for axis in axes if axis in mesh.shape)
    return present if size % math.prod(mesh.shape[axis] for axis in present) == 0 else None
