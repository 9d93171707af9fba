"""Matrix products and their scheduling, without gradients: what ``products`` builds its rules on.

A quantized matrix is dequantized and then multiplied. On a TPU, with few enough rows of
activations, ``even_odd_matmul`` multiplies without interleaving its columns first.
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
from jlora.distributed.mesh import target_platform
from jlora.quant import nf4

EVEN_ODD_MAX_ROWS = 2048
"""The most rows on one device for which a TPU uses ``even_odd_matmul``.

From XLA's own estimates of cycles for a v5e (docs/log.md); not measured on a TPU.
"""


def barrier_after(value: Any, x: Array) -> Any:
    """``value``, a tree of arrays, which XLA does not compute before ``x``.

    XLA moves what does not depend on a scan's carry out of the scan and holds it during all steps:
    constants broadcast to the shape of activations, transposed weights, whole dequantized matrices.
    A barrier on the carry's own values (``jax.lax.optimization_barrier``) keeps them in their step.
    """
    # Without stop_gradient, the barrier's differentiation rule would give `value` a tangent because
    # x has one, and a frozen weight would count as differentiated.
    # For QLoRA of 7B at 1 × 512, compiled for an H200, barriers saved 0.3 of 5.2 GB.
    return jax.lax.optimization_barrier((jax.lax.stop_gradient(x), value))[1]


def array_matmul(x: Array, w: Array, w_axis: int, dtype: Any = None) -> Array:
    """Contracts the last axis of ``x`` with ``w_axis`` of ``w``; float32 accumulation."""
    dims = (((x.ndim - 1,), (w_axis,)), ((), ()))
    return rounded_product(x, w.astype(x.dtype), dims, x.dtype if dtype is None else dtype)


def rounded_product(x: Array, y: Array, dimension_numbers: Any, dtype: Any) -> Array:
    """``jax.lax.dot_general`` with float32 accumulation, rounded to ``dtype``."""
    # On CPUs a bf16 product with a float32 result is six times as fast as one with a bf16 result.
    # On GPUs cuBLAS accumulates in float32 in any case, and would write a float32 array that
    # another kernel rounds; with the result's own type it also adds to an earlier product.
    result = dtype if target_platform() == "gpu" else jnp.float32
    out = jax.lax.dot_general(x, y, dimension_numbers, preferred_element_type=result)
    return out.astype(dtype)


def quantized_matmul(x: Array, w: Any, transpose: bool, dtype: Any = None) -> Array:
    """``x @ w``, or ``x @ w.mT`` if ``transpose``, of a quantized matrix ``w``."""

    def dequantize_first(x, w):
        return array_matmul(x, dequantize_after(w, x), int(transpose), dtype)

    rows = math.prod(x.shape[:-1])
    # The rows of one device: what is interleaved there are its activations. At 4096 rows both ways
    # are equal by the compiler's estimate, at 8192 even-odd takes 5.4 s instead of 4.3.
    if not nf4.is_rowwise_matrix(w) or rows_per_device(rows) > EVEN_ODD_MAX_ROWS:
        return dequantize_first(x, w)
    # Chosen when the program is lowered: `plan` compiles for TPUs on machines that have none.
    on_tpu = functools.partial(even_odd_matmul, transpose=transpose, dtype=dtype)
    return jax.lax.platform_dependent(x, w, default=dequantize_first, tpu=on_tpu)


def even_odd_matmul(
    x: Float[Array, "*batch k"], q: nf4.NF4Array, transpose: bool, dtype: Any = None
) -> Float[Array, "*batch n"]:
    """``x @ q``, or ``x @ q.mT`` if ``transpose``, from the even and the odd columns of ``q``.

    Two neighbouring columns share a byte. Interleaving them takes most of the time that a TPU needs
    for a quantized matrix, and prevents fusing dequantization into the product; here the few rows
    of activations are interleaved instead.
    """
    # Codes stay in bitsandbytes' order. With a byte's two values half a row apart, 1024 rows take
    # 16 ms instead of 18 by the compiler, but 8192 rows 127, where dequantizing first takes 110: a
    # matrix that is decoded within a product is decoded anew for every tile of rows.
    even, odd = nf4.dequantize_even_odd(_absmax_after(q, x))
    if transpose == q.transposed:  # the result has an entry for each column
        # One product with the even and odd columns concatenated was not better.
        results = array_matmul(x, even, 0, dtype), array_matmul(x, odd, 0, dtype)
        return jnp.stack(results, axis=-1).reshape(*x.shape[:-1], -1)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even_sum = array_matmul(pairs[..., 0], even, 1, jnp.float32)
    odd_sum = array_matmul(pairs[..., 1], odd, 1, jnp.float32)
    # Float32 up to the sum: rounding each half as well would round three times where the ordinary
    # product rounds once.
    return (even_sum + odd_sum).astype(x.dtype if dtype is None else dtype)


def dequantize_after(w: Any, x: Array) -> Array:
    """The dense matrix, not computed before ``x``.

    Without this order XLA dequantizes all weights of a layer at once, and holds those of a
    rematerialised forward pass until its backward pass.
    """
    return _absmax_after(w, x).dequantize()


def _absmax_after(w: Any, x: Array) -> Any:
    # On absmax, the smallest array that the matrix depends on: a barrier on the codes would copy
    # them out of their stack.
    return dataclasses.replace(w, absmax=barrier_after(w.absmax, x))
