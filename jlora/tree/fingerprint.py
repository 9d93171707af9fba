"""A cheap digest of parameters: tells whether a checkpoint belongs to this base model."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint(params: Any) -> str:
    """32 hex digits of all leaves' names, shapes, dtypes and contents.

    The contents enter as a position-weighted sum modulo 2³², computed where the leaf lies: the same
    for every sharding and number of processes, and no leaf is gathered. Any single changed element
    changes it. It guards against mistakes, not against an adversary.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    sums = [_checksum(leaf) for _, leaf in leaves]  # all dispatched before the first is fetched
    digest = hashlib.sha256()
    for (path, leaf), value in zip(leaves, sums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        line = f"{name} {leaf.dtype} {list(leaf.shape)} {int(np.asarray(value))}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:32]


@jax.jit
def _checksum(leaf: Array) -> UInt32[Array, ""]:
    """Σ bits · weight(position), each weight odd, so that no single change can cancel."""
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    if bits.dtype.itemsize > 4:
        bits = lax.bitcast_convert_type(bits, jnp.uint32)  # adds an axis of two
    bits = lax.bitcast_convert_type(bits, UNSIGNED[bits.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):  # no reshape: it would gather a sharded leaf
        # Modulo 2³² like everything here: a longer stride is no uint32.
        stride = math.prod(bits.shape[axis + 1 :]) & 0xFFFFFFFF
        position += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    # 2³² over the golden ratio: neighbours get weights that are far apart.
    weight = (position * jnp.uint32(0x9E3779B1) ^ (position >> 15)) | jnp.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)
