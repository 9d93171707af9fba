"""``dot``, ``grouped_dot`` and ``embed``: the only functions that know every kind of weight.

Models are written in terms of them and do not know about adapters or quantization. A weight is

- an array (in, out);
- a quantized array (``NF4Array``, ``Int8Array``), dequantized for the product and again for its
  gradient, so that no dequantized matrix outlives the product;
- a ``LoraWeight`` on either: ``x @ W + scale * (dropout(x) @ A) @ B``, the delta kept factored;
- a ``TokenWeight`` (an embedding with trained rows), a ``ReplacedEmbedding`` (one trained in full)
  or an ``InputProbe`` (EVA) on either.

Products accumulate in float32 and have the dtype of ``x``. ``products`` and ``grouped`` have the
rules of differentiation, which save a frozen dense weight, or the codes of a quantized one, and the
activations only where a wanted gradient needs them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.errors import DataError
from jlora.lora import LoraWeight, ReplacedEmbedding, TokenWeight
from jlora.lora.probe import InputProbe, observe
from jlora.ops.dropout import drop, keep_scale
from jlora.ops.grouped import grouped_product, grouped_quantized_product, per_row_product
from jlora.ops.products import dense_product, quantized_product
from jlora.ops.remat import saveable
from jlora.ops.weights import Weight
from jlora.quant.params import is_quantized


def dot(x: Float[Array, "*batch in"], w: Weight, dtype: Any = None) -> Float[Array, "*batch out"]:
    """``x @ w`` for any kind of weight, with float32 accumulation.

    Args:
      x: activations (..., in), floating point.
      w: a weight whose logical shape is (in, out).
      dtype: of the result; None is ``x.dtype``. The products of the gradient have operands of
        ``x.dtype`` all the same: a float32 operand would first convert the weight to float32.

    Returns:
      (..., out) in ``dtype``. Differentiable in ``x``, in a dense ``w`` and in a LoraWeight's
      A and B; a quantized array is a constant.
    """
    if isinstance(w, LoraWeight):
        per_row = w.adapter_ids is not None
        return _row_adapters_dot(x, w, dtype) if per_row else _lora_dots(x, [w], dtype)[0]
    if isinstance(w, TokenWeight):
        return _token_dot(x, w, dtype)
    if isinstance(w, ReplacedEmbedding):
        return dot(x, w.value, dtype)
    if isinstance(w, InputProbe):
        return observe(dot(x, w.base, dtype), x, w.slot, w.directions, w.mask)
    if is_quantized(w):
        return quantized_product(x, w, jnp.dtype(x.dtype if dtype is None else dtype))
    return dense_product(x, w, jnp.dtype(x.dtype if dtype is None else dtype))


def dots(
    x: Float[Array, "*batch in"], weights: Sequence[Weight], dtype: Any = None
) -> list[Float[Array, "*batch _"]]:
    """``[dot(x, w) for w in weights]``, with one product for the As of all LoraWeights.

    Those with the same probability of dropout have one mask, drawn with the first one's key.
    """
    results: list[Any] = [None] * len(weights)
    groups: dict[Any, list[int]] = {}
    for i, w in enumerate(weights):
        if isinstance(w, LoraWeight) and w.adapter_ids is None:
            dropout = 0.0 if w.dropout_key is None else w.dropout
            groups.setdefault((dropout, jnp.dtype(w.lora_A.dtype)), []).append(i)
        else:
            results[i] = dot(x, w, dtype)
    for members in groups.values():
        products = _lora_dots(x, [weights[i] for i in members], dtype)
        for i, y in zip(members, products, strict=True):
            results[i] = y
    return results


def grouped_dot(
    x: Float[Array, "rows in"], w: Weight, sizes: Int[Array, " groups"]
) -> Float[Array, "rows out"]:
    """Each row times the matrix of its group, with float32 accumulation, in ``x.dtype``.

    Args:
      x: the first ``sizes[0]`` rows are of group 0, the next ``sizes[1]`` of group 1, and so on.
      w: a weight of shape (groups, in, out).
      sizes: the number of rows in each group; the sum is that of ``x``.

    Differentiable in ``x``, in a dense ``w`` and in a LoraWeight's A and B, which also have one
    matrix for each group; a quantized array is a constant.
    """
    if isinstance(w, LoraWeight):
        inner = saveable(grouped_dot(x, w.scaled_A, sizes))
        return grouped_dot(x, w.base, sizes) + grouped_dot(inner, w.lora_B, sizes)
    if is_quantized(w):
        return grouped_quantized_product(x, w, sizes)
    return grouped_product(x, w, sizes)


def embed(ids: Int[Array, "*batch"], w: Weight) -> Float[Array, "*batch dim"]:
    """Rows ``ids`` of an embedding (vocabulary, dim), in the embedding's dtype."""
    if isinstance(w, LoraWeight):
        return _lora_embed(ids, w)
    if isinstance(w, TokenWeight):
        return _token_embed(ids, w)
    if isinstance(w, ReplacedEmbedding):
        return embed(ids, w.value)
    return w.take(ids) if is_quantized(w) else jnp.take(w, ids, axis=0)


def columns(w: Weight, start: Int[Array, ""], size: int) -> Weight:
    """Columns start … start + size of a weight (in, out), as a weight (in, size).

    Of a quantized weight only these are dequantized.
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
        # Not a negative index, which JAX counts from the end.
        indices = jnp.where(inside, w.indices - start, size)  # out of range: dropped
        return dataclasses.replace(w, base=columns(w.base, start, size), indices=indices)
    if is_quantized(w):
        # Stored [out, in] as in torch, so that these columns are rows there, which can be
        # dequantized alone.
        return w.mT.take(start + jnp.arange(size)).mT
    return jax.lax.dynamic_slice_in_dim(w, start, size, axis=-1)


def _lora_dots(x: Array, weights: Sequence[LoraWeight], dtype: Any) -> list[Array]:
    """The products with weights whose dropout is the same, and so their mask."""
    first, dropped, kept = weights[0], x, 1.0
    if first.dropout_key is not None and first.dropout:
        dropped, kept = drop(x, first.dropout_key, first.dropout), keep_scale(first.dropout)
    # The scales are on A. On the delta, their gradient is one more pass over the output's gradient;
    # on x @ A, a GPU's temporaries grow (84 MiB for 8B at 2048 tokens).
    scaled = [kept * w.scaled_A for w in weights]
    inner = saveable(dot(dropped, jnp.concatenate(scaled, -1) if len(scaled) > 1 else scaled[0]))
    ends = itertools.accumulate(a.shape[-1] for a in scaled)
    inners = jnp.split(inner, list(ends)[:-1], axis=-1)
    return [
        _lora_product(x, dropped, kept, inner, w, dtype)
        for inner, w in zip(inners, weights, strict=True)
    ]


def _lora_product(
    x: Array, dropped: Array, kept: float, inner: Array, w: LoraWeight, dtype: Any
) -> Array:
    """``(x @ W + scale * (dropout(x) @ A) @ B) * gain`` (LoRA, arXiv 2106.09685; DoRA, 2402.09353).

    With dropout, DoRA rescales ``dropout(x) @ W`` instead of ``x @ W``, as in PEFT.

    Args:
      x: the input.
      dropped: ``dropout(x)`` without its factor, or ``x`` itself.
      kept: the factor.
      inner: ``scale * dropout(x) @ A``.
      w: the weight.
      dtype: of the result.
    """
    # Two products: with B as further rows of W it would be one, but the concatenations cost as much
    # as the second product.
    base, delta = dot(x, w.base, dtype), dot(inner, w.lora_B)
    if w.bias is not None:
        delta = delta + w.bias.astype(delta.dtype)
    if w.gain is None:
        # Added in the compute dtype: float32 rounds once instead of three times, but was no faster
        # and held 8 MB more of a 63M model's step.
        return base + delta.astype(base.dtype)
    # Saved, since the gain's gradient needs both terms: the base's product is the expensive one.
    # Recomputing it, DoRA's step took 1.39 of LoRA's; with it saved 1.15. In float32, since the
    # gain is so close to 1 that in bfloat16 it is 1 for most columns.
    base, delta = saveable(base).astype(jnp.float32), delta.astype(jnp.float32)
    # Without dropout both products with the base are the same one.
    if dropped is x:
        return ((base + delta) * w.gain).astype(x.dtype if dtype is None else dtype)
    dropped_base = saveable(kept * dot(dropped, w.base, jnp.float32))
    total = base + (w.gain - 1) * dropped_base + w.gain * delta
    return total.astype(x.dtype if dtype is None else dtype)


def _row_adapters_dot(x: Array, w: LoraWeight, dtype: Any) -> Array:
    """The product with a stack of adapters, of which each row has one."""
    inner = saveable(per_row_product(x, w.lora_A, _row_ids(x, w)))
    return _add_row_deltas(dot(x, w.base, dtype), inner, w)


def _lora_embed(ids: Array, w: LoraWeight) -> Array:
    rows = embed(ids, w.base)
    if w.adapter_ids is not None:
        adapters = _expand_rows(_row_ids(ids, w), ids)
        return _add_row_deltas(rows, w.lora_A[adapters, ids], w)
    delta = w.scale * jnp.take(w.lora_A, ids, axis=0) @ w.lora_B
    if w.gain is not None:
        return ((rows.astype(jnp.float32) + delta) * w.gain).astype(rows.dtype)
    return rows + delta.astype(rows.dtype)


def _add_row_deltas(base: Array, inner: Array, w: LoraWeight) -> Array:
    """``base + scale * inner @ B``, each row with its adapter's B; ``base`` in rows without one."""
    ids = w.adapter_ids
    assert ids is not None
    # The r columns are scaled, not A: each row has its own scale, and A is gathered by row.
    scaled = inner * _expand_rows(w.scale[ids], inner).astype(inner.dtype)
    delta = per_row_product(scaled, w.lora_B, ids)
    if w.bias is not None:
        delta = delta + _expand_rows(w.bias[ids], base).astype(delta.dtype)
    # Selected, not multiplied by zero: rows without an adapter are the base model's, bitwise.
    return jnp.where(_expand_rows(ids >= 0, base), base + delta.astype(base.dtype), base)


def _row_ids(batch: Array, w: LoraWeight) -> Array:
    """The adapter of each row of a batch."""
    ids = w.adapter_ids
    assert ids is not None
    if ids.shape[0] != batch.shape[0]:
        rows = f"{ids.shape[0]} ids for a batch of {batch.shape[0]} rows"
        raise DataError(rows, where="adapter_ids", fix="give one to each row")
    return ids


def _expand_rows(values: Array, like: Array) -> Array:
    """A scalar or a vector for each row, with axes inserted to broadcast against ``like``."""
    return values.reshape(values.shape[0], *(1,) * (like.ndim - values.ndim), *values.shape[1:])


def _token_dot(x: Array, w: TokenWeight, dtype: Any) -> Array:
    """Logits of an output head with trained columns: its own, or a tied embedding's rows."""
    logits = dot(x, w.base, dtype)
    trained = dot(x, w.rows.mT, dtype)
    # Logits are replaced, not columns of the weight, which would copy the whole head. Dropped are
    # the tokens outside of a range of columns (`columns`).
    return logits.at[..., w.indices].set(trained, mode="drop")


def _token_embed(ids: Array, w: TokenWeight) -> Array:
    """Rows of an embedding, the trained ones in place of the base's."""
    # Found by bisection for each token: writing the rows into the table first would copy the whole
    # table, and is impossible in a quantized one.
    rows, order = embed(ids, w.base), jnp.argsort(w.indices)
    # The place of an id above all trained ones is one past the end.
    place = jnp.searchsorted(w.indices, ids, sorter=order).clip(max=w.indices.size - 1)
    nearest = order[place]
    trained = jnp.take(w.rows, nearest, axis=0).astype(rows.dtype)
    return jnp.where((w.indices[nearest] == ids)[..., None], trained, rows)
