"""Products of activations with matrices, dense and packed, for ``dot``'s rules: not differentiated.

A packed matrix is dequantized first and multiplied then, except

- on a TPU, with few enough rows, by halves: see ``even_odd_matmul``;
- where a kernel that dequantizes tile by tile is known to win: see ``nf4_kernel``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.distributed.constraints import rows_per_device
from jlora.quant import nf4, nf4_kernel

EVEN_ODD_MAX_ROWS = 2048
"""Up to how many rows of a device a TPU multiplies by halves: by XLA's own estimate of cycles for
a v5e (docs/log.md), no TPU has measured it."""


def barrier_after(value: Any, x: Array) -> Any:
    """``value`` itself, a tree of arrays, but not before ``x`` is there.

    JAX computes what does not depend on a scan's carry once, before the scan, and keeps it for all
    its steps: scalars and masks spread to the shape of activations, transposes of weights, whole
    dequantized matrices. What comes after the carry's own values exists in its step only.
    """
    return jax.lax.optimization_barrier((jax.lax.stop_gradient(x), value))[1]


def product(x: Array, w: Array, w_axis: int, dtype: Any = None) -> Array:
    """Contracts the last axis of ``x`` with ``w_axis`` of ``w``; float32 accumulation.

    bf16 products on CPU are six times faster when asked for a float32 result.
    """
    dims = (((x.ndim - 1,), (w_axis,)), ((), ()))
    out = jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=jnp.float32)
    return out.astype(x.dtype if dtype is None else dtype)


def packed_product(x: Array, w: Any, transpose: bool, dtype: Any = None) -> Array:
    """``x @ w`` or ``x @ w.mT`` in the way that suits the platform."""
    rows = math.prod(x.shape[:-1])
    ways = {}
    if nf4.is_rowwise_matrix(w) and rows_per_device(rows) <= EVEN_ODD_MAX_ROWS:
        ways["tpu"] = functools.partial(even_odd_matmul, transpose=transpose, dtype=dtype)
    for platform in nf4_kernel.MEASURED:
        if nf4_kernel.fused_wins(platform, rows, w):
            ways[platform] = functools.partial(
                nf4_kernel.matmul, transpose=transpose, dtype=dtype, platform=platform
            )

    def dequantized(x, w):
        return product(x, dequantize_after(x, w), int(transpose), dtype)

    if not ways:
        return dequantized(x, w)
    return jax.lax.platform_dependent(x, w, default=dequantized, **ways)


def even_odd_matmul(
    x: Float[Array, "*batch k"], q: nf4.NF4Array, transpose: bool, dtype: Any = None
) -> Float[Array, "*batch n"]:
    """``x @ q`` or ``x @ q.mT``: the columns of even and of odd index each for themselves.

    Two neighbours share a byte. Putting them side by side is most of a TPU's work with a packed
    matrix, and keeps it from dequantizing within the product; here it is done to the rows of
    activations, which are few.
    """
    even, odd = nf4.dequantize_even_odd(_absmax_after(q, x))
    if transpose == q.transposed:  # the results lie along the columns
        results = product(x, even, 0, dtype), product(x, odd, 0, dtype)
        return jnp.stack(results, axis=-1).reshape(*x.shape[:-1], -1)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    of_even = product(pairs[..., 0], even, 1, jnp.float32)
    of_odd = product(pairs[..., 1], odd, 1, jnp.float32)
    return (of_even + of_odd).astype(x.dtype if dtype is None else dtype)


def dequantize_after(x: Array, w: Any) -> Array:
    """The dense matrix, not made before ``x`` is there.

    Without this order the compiler dequantizes all weights of a layer at once, and keeps those of
    a rematerialised forward pass for the backward pass.
    """
    return _absmax_after(w, x).dequantize()


def _absmax_after(w: Any, x: Array) -> Any:
    """``absmax`` is the smallest array that the matrix depends on: the codes themselves would be
    copied out of their stack.
    """
    return dataclasses.replace(w, absmax=barrier_after(w.absmax, x))
