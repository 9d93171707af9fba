"""Differentiable products of activations with one matrix: each saves what its gradients need.

A dense weight is saved as it is, a quantized one as its codes. Activations are saved only if the
weight's gradient is wanted, which that of a frozen weight is not.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jlora.ops.matmul import array_matmul, quantized_matmul


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_product(x: Array, w: Array, dtype: Any) -> Array:
    """``x @ w`` in ``dtype``, of an array (in, out)."""
    return array_matmul(x, w, 0, dtype)


def _dense_fwd(x, w, dtype):
    saved = saved_if(w.perturbed, x.value), saved_if(x.perturbed, w.value)
    return array_matmul(x.value, w.value, 0, dtype), saved


def saved_if(needed: bool, value: Array) -> Array:
    """The residual of a VJP for ``value``: itself if a wanted gradient needs it.

    Otherwise a scalar of the same dtype, not None: JAX requires as many residuals from every
    differentiation of a traced function, and another one may want other gradients.
    """
    return value if needed else jnp.zeros((), value.dtype)


def _dense_bwd(_, saved, g):
    x, w = saved
    if isinstance(g, SymbolicZero):
        return None, None
    # In the compute dtype, also where the result was float32 (logits): autodiff's own transpose
    # would multiply float32 by bf16, and convert the whole head to float32 in every backward pass.
    g = g.astype(x.dtype)
    dx = array_matmul(g, w, 1) if w.ndim else None
    return dx, _weight_gradient(x, g, w.dtype) if x.ndim else None


def _weight_gradient(x: Array, g: Array, dtype) -> Array:
    """``xᵀ @ g`` summed over all leading axes in float32."""
    batch = tuple(range(x.ndim - 1))
    dims = ((batch, batch), ((), ()))
    # XLA for CPU copies the left operand: for lora_A the narrow cotangent has to be the left one.
    narrow = 8 * g.shape[-1] <= x.shape[-1]
    sides = (g, x) if narrow else (x, g)
    out = jax.lax.dot_general(*sides, dims, preferred_element_type=jnp.float32)
    # The barrier keeps the transposition out of the product, for which XLA for CPU would then have
    # no fast routine, or none at all ("Unsupported element type for DotThunk").
    return (jax.lax.optimization_barrier(out).mT if narrow else out).astype(dtype)


# With symbolic_zeros the forward rule sees which inputs are differentiated. A plain custom_vjp
# saves x for a frozen weight's gradient, which nobody wants: one copy a layer under scan.
dense_product.defvjp(_dense_fwd, _dense_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_product(x: Array, w: Any, dtype: Any) -> Array:
    """``x @ w`` in ``dtype``, of a quantized matrix (in, out), which has no gradient.

    The residual is the codes: the gradient dequantizes them again, so that no dequantized weight
    outlives the forward pass.
    """
    return quantized_matmul(x, w, False, dtype)


def _quantized_fwd(x, w, dtype):
    # The gradient needs the dtype of x, not its values; a residual has to be an array.
    return quantized_product(x, w, dtype), (w, jnp.zeros((), x.dtype))


def _quantized_bwd(_, saved, g):
    w, like_x = saved
    # None, since the cotangent of uint8 codes would have to be float0.
    return quantized_matmul(g.astype(like_x.dtype), w, True), None


quantized_product.defvjp(_quantized_fwd, _quantized_bwd)
