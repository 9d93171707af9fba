"""``dot``, ``grouped_dot`` and ``embed``: the one seam between models and their weights.

A model is written in terms of these functions and never asks what a weight is. A weight may be

- an array (in, out);
- a packed array (``NF4Array``, ``Int8Array``), dequantized on the way into the product and again
  for the gradient, so that no dequantized matrix outlives the product;
- a ``LoraWeight`` over either: ``x @ W + scale * (dropout(x) @ A) @ B``, the delta kept factored.

Products accumulate in float32 and come out in ``x.dtype``. Each rule saves only what its gradients
need: nothing for a frozen dense weight but the weight itself, the codes for a packed one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jlora.errors import DataError
from jlora.lora import LoraWeight, TokenWeight
from jlora.lora.probe import InputProbe, observe
from jlora.ops.matmul import barrier_after, dequantize_after, packed_product, product
from jlora.ops.remat import saveable
from jlora.ops.weights import Weight
from jlora.quant.params import is_quantized


def dot(x: Float[Array, "*batch in"], w: Weight, dtype: Any = None) -> Float[Array, "*batch out"]:
    """``x @ w`` for any kind of weight, with float32 accumulation.

    Args:
      x: activations (..., in), floating point.
      w: a weight whose logical shape is (in, out).
      dtype: of the result; None is ``x.dtype``. The products of the gradients are between arrays
        of ``x.dtype`` all the same: a float32 one would widen the weight first.

    Returns:
      (..., out) in ``dtype``. Differentiable in ``x``, in a dense ``w`` and in a LoraWeight's
      A and B; a packed array is a constant.
    """
    if isinstance(w, LoraWeight):
        return _adapted(x, w, dtype)
    if isinstance(w, TokenWeight):
        return _tied(x, w, dtype)
    if isinstance(w, InputProbe):
        return observe(dot(x, w.base, dtype), x, w.slot, w.directions, w.mask)
    if is_quantized(w):
        return _packed(x, w, jnp.dtype(x.dtype if dtype is None else dtype))
    return _dense(x, w, jnp.dtype(x.dtype if dtype is None else dtype))


def grouped_dot(
    x: Float[Array, "rows in"], w: Weight, sizes: Int[Array, " groups"]
) -> Float[Array, "rows out"]:
    """Rows times the matrix of their group, with float32 accumulation, in ``x.dtype``.

    Args:
      x: the first ``sizes[0]`` rows are of group 0, the next ``sizes[1]`` of group 1, and so on.
      w: an array (groups, in, out) or a packed one.
      sizes: how many rows each group has, as many as ``x`` in all.

    Differentiable in ``x``, in a dense ``w`` and in a LoraWeight's A and B, of which each group has
    its own; a packed array is a constant.
    """
    if isinstance(w, LoraWeight):
        inner = saveable(grouped_dot(x, w.scaled_A, sizes))
        return grouped_dot(x, w.base, sizes) + grouped_dot(inner, w.lora_B, sizes)
    return _grouped_packed(x, w, sizes) if is_quantized(w) else _grouped(x, w, sizes)


def embed(ids: Int[Array, "*batch"], w: Weight) -> Float[Array, "*batch dim"]:
    """Rows ``ids`` of an embedding (vocabulary, dim), in the embedding's dtype."""
    if isinstance(w, LoraWeight):
        rows = embed(ids, w.base)
        if w.adapter_ids is not None:
            own = _row_by_row(_ids_of(ids, w), ids)
            return _with_own_deltas(rows, w.lora_A[own, ids], w)
        delta = w.scale * jnp.take(w.lora_A, ids, axis=0) @ w.lora_B
        if w.gain is not None:
            return ((rows.astype(jnp.float32) + delta) * w.gain).astype(rows.dtype)
        return rows + delta.astype(rows.dtype)
    if isinstance(w, TokenWeight):
        return _with_own_rows(ids, w)
    return w.take(ids) if is_quantized(w) else jnp.take(w, ids, axis=0)


def columns(w: Weight, start: Int[Array, ""], size: int) -> Weight:
    """Columns start … start + size of a weight (in, out): a weight (in, size).

    Of a packed weight only these are dequantized.
    """
    if isinstance(w, LoraWeight):
        b, gain, bias = (
            None if part is None else jax.lax.dynamic_slice_in_dim(part, start, size, axis=-1)
            for part in (w.lora_B, w.gain, w.bias)
        )
        base = columns(w.base, start, size)
        return dataclasses.replace(w, base=base, lora_B=b, gain=gain, bias=bias)
    if isinstance(w, TokenWeight):
        inside = (w.indices >= start) & (w.indices < start + size)
        indices = jnp.where(inside, w.indices - start, size)  # out of range: left out
        return dataclasses.replace(w, base=columns(w.base, start, size), indices=indices)
    if is_quantized(w):
        return w.mT.take(start + jnp.arange(size)).mT
    return jax.lax.dynamic_slice_in_dim(w, start, size, axis=-1)


def _adapted(x: Array, w: LoraWeight, dtype: Any) -> Array:
    """``x @ W + scale * (dropout(x) @ A) @ B`` (LoRA, arXiv 2106.09685), its columns times gain.

    Where there is dropout, DoRA's change of the base's columns is to what it leaves, as in peft.
    """
    base, kept = dot(x, w.base, dtype), _dropout(x, w)
    if w.adapter_ids is not None:
        return _with_own_deltas(base, saveable(_each(x, w.lora_A, _ids_of(x, w))), w)
    delta = dot(saveable(dot(kept, w.scaled_A)), w.lora_B)
    if w.bias is not None:
        delta = delta + w.bias.astype(delta.dtype)
    if w.gain is None:
        return base + delta.astype(base.dtype)
    # The gain's gradient needs both addends; the base's product is not to be computed again.
    base, delta = saveable(base).astype(jnp.float32), delta.astype(jnp.float32)
    if kept is x:
        return ((base + delta) * w.gain).astype(x.dtype if dtype is None else dtype)
    left = saveable(dot(kept, w.base, jnp.float32))
    total = base + (w.gain - 1) * left + w.gain * delta
    return total.astype(x.dtype if dtype is None else dtype)


def _with_own_deltas(base: Array, inner: Array, w: LoraWeight) -> Array:
    """``base + scale * inner @ B`` with each row's own B; ``base`` itself in rows without one."""
    ids = w.adapter_ids
    assert ids is not None
    delta = _each(inner * _row_by_row(w.scale[ids], inner).astype(inner.dtype), w.lora_B, ids)
    if w.bias is not None:
        delta = delta + _row_by_row(w.bias[ids], base).astype(delta.dtype)
    return jnp.where(_row_by_row(ids >= 0, base), base + delta.astype(base.dtype), base)


def _ids_of(batch: Array, w: LoraWeight) -> Array:
    """The adapter of each row of a batch."""
    ids = w.adapter_ids
    assert ids is not None
    if ids.shape[0] != batch.shape[0]:
        rows = f"{ids.shape[0]} ids for a batch of {batch.shape[0]} rows"
        raise DataError(rows, where="adapter_ids", fix="give one to each row")
    return ids


def _row_by_row(values: Array, like: Array) -> Array:
    """One value, or a vector of the last axis, for every row of a batch, to meet ``like``."""
    return values.reshape(values.shape[0], *(1,) * (like.ndim - values.ndim), *values.shape[1:])


def _dropout(x: Array, w: LoraWeight) -> Array:
    """``x`` with some of its elements zero and the others larger; ``x`` itself without a key."""
    if w.dropout_key is None or not w.dropout:
        return x
    left = saveable(jax.random.bernoulli(w.dropout_key, 1 - w.dropout, x.shape))
    return jnp.where(left, x / (1 - w.dropout), barrier_after(jnp.zeros((), x.dtype), x))


def _tied(x: Array, w: TokenWeight, dtype: Any) -> Array:
    """Logits of an output head that is tied to an embedding with some rows of its own."""
    logits = dot(x, w.base, dtype)
    own = dot(x, w.rows.mT, dtype)
    return logits.at[..., w.indices].set(own, mode="drop")


def _with_own_rows(ids: Array, w: TokenWeight) -> Array:
    """Rows of an embedding, or the trained ones in their place."""
    rows, order = embed(ids, w.base), jnp.argsort(w.indices)
    place = jnp.searchsorted(w.indices, ids, sorter=order).clip(max=w.indices.size - 1)
    which = order[place]
    own = jnp.take(w.rows, which, axis=0).astype(rows.dtype)
    return jnp.where((w.indices[which] == ids)[..., None], own, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: Array, w: Array, dtype: Any) -> Array:
    return product(x, w, 0, dtype)


def _dense_fwd(x, w, dtype):
    saved = _kept(x.value, w.perturbed), _kept(w.value, x.perturbed)
    return product(x.value, w.value, 0, dtype), saved


def _kept(value: Array, needed: bool) -> Array:
    """What is saved of a value: itself only where a wanted gradient needs it.

    A frozen weight asks for no activations. The rest is a scalar of the same dtype, not None: JAX
    keeps the number of saved arrays from one differentiation of a traced program to the next, whose
    wanted gradients may be others.
    """
    return value if needed else jnp.zeros((), value.dtype)


def _dense_bwd(_, saved, g):
    x, w = saved
    if isinstance(g, SymbolicZero):
        return None, None
    g = g.astype(x.dtype)
    dx = product(g, w, 1) if w.ndim else None
    return dx, _weight_gradient(x, g, w.dtype) if x.ndim else None


def _weight_gradient(x: Array, g: Array, dtype) -> Array:
    """``xᵀ @ g`` over all leading axes, accumulated in float32 and not rounded on the way."""
    batch = tuple(range(x.ndim - 1))
    dims = ((batch, batch), ((), ()))
    narrow = 8 * g.shape[-1] <= x.shape[-1]  # lora_A's: CPUs copy the side on the left
    sides = (g, x) if narrow else (x, g)
    out = jax.lax.dot_general(*sides, dims, preferred_element_type=jnp.float32)
    # The barrier keeps the transposition out of the product, which XLA for CPU then cannot do.
    return (jax.lax.optimization_barrier(out).mT if narrow else out).astype(dtype)


_dense.defvjp(_dense_fwd, _dense_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _packed(x: Array, w: Any, dtype: Any) -> Array:
    return packed_product(x, w, False, dtype)


def _packed_fwd(x, w, dtype):
    return _packed(x, w, dtype), (w, jnp.zeros((), x.dtype))


def _packed_bwd(_, saved, g):
    w, like = saved
    return packed_product(g.astype(like.dtype), w, True), None


_packed.defvjp(_packed_fwd, _packed_bwd)


def _grouped_product(x: Array, w: Array, sizes: Array, w_axis: int) -> Array:
    """Contracts the last axis of ``x`` with ``w_axis`` of each row's own matrix in ``w``."""
    return _ragged(x, w.astype(x.dtype), sizes, (1, w_axis), groups=[0]).astype(x.dtype)


def _ragged(x: Array, y: Array, sizes: Array, axes: tuple[int, int], groups: list[int]) -> Array:
    """Contracts ``axes`` of ``x``, whose rows are of groups, and of ``y``, in float32.

    ``groups`` is the axis of ``y`` that counts groups; without one the rows of ``y`` are of groups
    too, and so is the result.
    """
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


@jax.custom_vjp
def _grouped(x: Array, w: Array, sizes: Array) -> Array:
    return _grouped_product(x, w, sizes, 1)


def _grouped_fwd(x, w, sizes):
    saved = _kept(x.value, w.perturbed), _kept(w.value, x.perturbed), sizes.value
    return _grouped_product(x.value, w.value, sizes.value, 1), saved


def _grouped_bwd(saved, g):
    x, w, sizes = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    dx = _grouped_product(g, w, sizes, 2) if w.ndim else None
    dw = _ragged(x, g, sizes, (0, 0), groups=[]).astype(w.dtype) if x.ndim else None
    return dx, dw, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd, symbolic_zeros=True)


def _each_product(x: Array, w: Array, ids: Array, w_axis: int) -> Array:
    """Contracts the last axis of ``x`` (rows, …) with ``w_axis`` of each row's own matrix."""
    dims = (((x.ndim - 1,), (w_axis,)), ((0,), (0,)))
    own = w.astype(x.dtype)[ids]
    out = jax.lax.dot_general(x, own, dims, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


@jax.custom_vjp
def _each(x: Array, w: Array, ids: Array) -> Array:
    """``x[b] @ w[ids[b]]`` of x (rows, …, in) and w (matrices, in, out), in ``x.dtype``.

    A matrix that no row names has no gradient; a negative id names none.
    """
    return _each_product(x, w, ids, 1)


def _each_fwd(x, w, ids):
    saved = _kept(x.value, w.perturbed), _kept(w.value, x.perturbed)
    return _each_product(x.value, w.value, ids.value, 1), (*saved, ids.value, w.value[:, 0, 0])


def _each_bwd(saved, g):
    x, w, ids, like = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    dx = _each_product(g, w, ids, 2) if w.ndim else None
    if not x.ndim:
        return dx, None, None
    middle = tuple(range(1, x.ndim - 1))
    dims = ((middle, middle), ((0,), (0,)))
    each = jax.lax.dot_general(x, g, dims, preferred_element_type=jnp.float32)
    # A sum that is masked, not scattered: GPUs scatter in no fixed order.
    named = (ids == jnp.arange(like.size)[:, None])[..., None, None]
    return dx, jnp.sum(jnp.where(named, each, 0.0), axis=1).astype(like.dtype), None


_each.defvjp(_each_fwd, _each_bwd, symbolic_zeros=True)


@jax.custom_vjp
def _grouped_packed(x: Array, w: Any, sizes: Array) -> Array:
    return _grouped_product(x, dequantize_after(x, w), sizes, 1)


def _grouped_packed_fwd(x, w, sizes):
    return _grouped_packed(x, w, sizes), (w, sizes)


def _grouped_packed_bwd(saved, g):
    w, sizes = saved
    return _grouped_product(g, dequantize_after(g, w), sizes, 2), None, None


_grouped_packed.defvjp(_grouped_packed_fwd, _grouped_packed_bwd)
