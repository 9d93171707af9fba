"""Differentiable products in which rows have matrices of their own: experts, and stacked adapters.

``grouped_product`` is for rows sorted by the index of their matrix, ``per_row_product`` for a batch
whose rows name theirs. Both save what ``products`` saves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jlora.ops.matmul import dequantize_after, rounded_product
from jlora.ops.products import saved_if


@jax.custom_vjp
def grouped_product(x: Array, w: Array, sizes: Array) -> Array:
    """Rows of ``x`` (rows, in) times their group's matrix in ``w`` (groups, in, out)."""
    return _grouped_matmul(x, w, sizes, 1)


def _grouped_matmul(x: Array, w: Array, sizes: Array, w_axis: int) -> Array:
    """Contracts the last axis of ``x`` with ``w_axis`` of the matrix of each row's group."""
    return _ragged(x, w.astype(x.dtype), sizes, (1, w_axis), groups=[0]).astype(x.dtype)


def _ragged(x: Array, y: Array, sizes: Array, axes: tuple[int, int], groups: list[int]) -> Array:
    """Contracts ``axes`` of ``x``, whose rows are sorted by group, and of ``y``, in float32.

    ``groups`` is the group axis of ``y``. If it is empty, the rows of ``y`` are sorted by group
    too, and the result has one matrix for each group.
    """
    # One instruction on TPUs. For GPUs and CPUs jax 0.10.2 compiles one masked product over all
    # experts: correct, with E times the work and 2.1 GB of temporaries for 4096 rows of 8 Mixtral
    # experts. The flag for a Triton lowering fails (its module is not in the wheel), and XLA's two
    # experimental options change nothing. The general form, since w's gradient contracts the ragged
    # axis.
    return jax.lax.ragged_dot_general(
        x,
        y,
        sizes,
        ragged_dot_dimension_numbers=jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((axes[0],), (axes[1],)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=groups,
        ),
        preferred_element_type=jnp.float32,
    )


def _grouped_fwd(x, w, sizes):
    saved = saved_if(w.perturbed, x.value), saved_if(x.perturbed, w.value), sizes.value
    return _grouped_matmul(x.value, w.value, sizes.value, 1), saved


def _grouped_bwd(saved, g):
    x, w, sizes = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    dx = _grouped_matmul(g, w, sizes, 2) if w.ndim else None
    dw = _ragged(x, g, sizes, (0, 0), groups=[]).astype(w.dtype) if x.ndim else None
    return dx, dw, None


grouped_product.defvjp(_grouped_fwd, _grouped_bwd, symbolic_zeros=True)


@jax.custom_vjp
def grouped_quantized_product(x: Array, w: Any, sizes: Array) -> Array:
    """``grouped_product`` of quantized matrices, which have no gradient."""
    return _grouped_matmul(x, dequantize_after(w, x), sizes, 1)


def _grouped_quantized_fwd(x, w, sizes):
    return grouped_quantized_product(x, w, sizes), (w, sizes)


def _grouped_quantized_bwd(saved, g):
    w, sizes = saved
    return _grouped_matmul(g, dequantize_after(w, g), sizes, 2), None, None


grouped_quantized_product.defvjp(_grouped_quantized_fwd, _grouped_quantized_bwd)


@jax.custom_vjp
def per_row_product(x: Array, w: Array, ids: Array) -> Array:
    """``x[b] @ w[ids[b]]`` of x (rows, …, in) and w (matrices, in, out), in ``x.dtype``.

    A negative id selects an arbitrary matrix, and passes no gradient to any.
    """
    return _per_row_matmul(x, w, ids, 1)


def _per_row_matmul(x: Array, w: Array, ids: Array, w_axis: int) -> Array:
    """Contracts the last axis of ``x`` (rows, …) with ``w_axis`` of each row's matrix."""
    dims = (((x.ndim - 1,), (w_axis,)), ((0,), (0,)))
    # Gathered by row: 7.8 ms a layer on two cores. A product with all adapters concatenated, then
    # masked, takes 10.7, a loop over rows 10.2, and one adapter for all rows 9.9.
    return rounded_product(x, w.astype(x.dtype)[ids], dims, x.dtype)


def _per_row_fwd(x, w, ids):
    saved = saved_if(w.perturbed, x.value), saved_if(x.perturbed, w.value)
    # The last residual tells the gradient how many matrices there are, and their dtype: w itself is
    # saved only if x is differentiated.
    return _per_row_matmul(x.value, w.value, ids.value, 1), (*saved, ids.value, w.value[:, 0, 0])


def _per_row_bwd(saved, g):
    x, w, ids, like_w = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    dx = _per_row_matmul(g, w, ids, 2) if w.ndim else None
    if not x.ndim:
        return dx, None, None
    middle = tuple(range(1, x.ndim - 1))
    dims = ((middle, middle), ((0,), (0,)))
    row_gradients = jax.lax.dot_general(x, g, dims, preferred_element_type=jnp.float32)
    # A masked sum, no scatter: the order of a scatter's sums on a GPU is not fixed.
    selected = (ids == jnp.arange(like_w.size)[:, None])[..., None, None]
    dw = jnp.sum(jnp.where(selected, row_gradients, 0.0), axis=1)
    return dx, dw.astype(like_w.dtype), None


per_row_product.defvjp(_per_row_fwd, _per_row_bwd, symbolic_zeros=True)
