"""Attention in chunks of queries and keys, with memory linear in length (arXiv 2112.05682).

The softmax is accumulated over chunks of keys (online softmax, arXiv 2205.14135); the backward pass
recomputes the scores from queries, keys and the saved log-sum-exp. Chunks of keys that no query of
a chunk can see are skipped: those after it, beyond the window, or before the first token of its
documents. Packed rows and sliding windows therefore cost less than full causal attention.

First-order reverse-mode differentiation only.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.distributed.constraints import rows_per_device
from jlora.distributed.mesh import target_platform
from jlora.ops.attention.reference import MASKED, causal_mask, softcapped
from jlora.ops.remat import saveable

CHUNKS = {
    # 4 MiB of float32: larger intermediates leave the CPU's caches. Measured: 64 tokens for 8 rows
    # of 12 heads, 256 for one row; other sizes were slower from 512 tokens on (docs/log.md).
    "cpu": ((256, 128, 64), 2**20),
    # Every pair of chunks is some 20 launches, and the host waits for the loop's condition: as few
    # as 256 MiB of scores allow.
    "gpu": ((1024, 512, 256), 2**26),
    "tpu": ((256,), 2**26),
}
"""Platform → tokens per chunk, the first with at most so many scores per pair of chunks."""


class _Inputs(NamedTuple):
    """The differentiable and masking inputs of ``attend``."""

    q: Float[Array, "B T heads dim"]
    k: Float[Array, "B T kv_heads dim"]
    v: Float[Array, "B T kv_heads dim"]
    segment_ids: Int[Array, "B T"] | None
    window: int | Int[Array, ""] | None
    scale: float | Float[Array, ""]


class _Masks(NamedTuple):
    """What determines which keys a chunk of queries sees."""

    segment_ids: Int[Array, "chunks B C"] | None
    window: int | Int[Array, ""] | None
    first: Int[Array, " chunks"]
    """For each chunk of queries, the first chunk of keys that any of them sees."""


def attend(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B T kv_heads dim"],
    v: Float[Array, "B T kv_heads dim"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    scale: float | Float[Array, ""],
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T heads dim"], Float[Array, "B T heads"]]:
    """Outputs and log-sum-exps of the scores; both are differentiable.

    ``chunk`` is the number of tokens per chunk; None chooses it by device.
    """
    if chunk is None:
        chunk = chunk_size(rows_per_device(q.shape[0]), q.shape[2], target_platform())
    return _attend(_Inputs(q, k, v, segment_ids, window, scale), softcap, min(chunk, q.shape[1]))


def chunk_size(rows: int, heads: int, platform: str) -> int:
    """Tokens per chunk on a platform, for so many rows on one device and query heads."""
    sizes, most = CHUNKS.get(platform, CHUNKS["tpu"])
    return next((c for c in sizes if rows * heads * c * c <= most), sizes[-1])


def _masks(inputs: _Inputs, chunk: int) -> _Masks:
    starts, window = jnp.arange(0, inputs.q.shape[1], chunk), inputs.window
    first = jnp.zeros_like(starts) if window is None else jnp.maximum(starts - window + 1, 0)
    segment_ids = inputs.segment_ids
    if segment_ids is not None:
        segment_ids = _padded(segment_ids, chunk)
        # Also over the rows of the batch, since the loop over keys has one start for all of them.
        documents = _chunks(_document_start(segment_ids), chunk).min(axis=(1, 2))
        first = jnp.maximum(first, documents)
        segment_ids = _chunks(segment_ids, chunk)
    return _Masks(segment_ids, window, first // chunk)


def _document_start(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """For each token, the index of the first token with its id; ids need not be contiguous."""
    # Stable, so that the first of equal ids in this order is the first token with that id.
    order = jnp.argsort(ids, axis=1, stable=True)
    place = jax.vmap(jnp.searchsorted)(jnp.take_along_axis(ids, order, axis=1), ids)
    return jnp.take_along_axis(order, place, axis=1)


def _padded(x: Array, chunk: int) -> Array:
    """Pads axis 1 with zeros; causality hides these keys, and segment id 0 marks padding."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % chunk)
    return jnp.pad(x, widths)


def _chunks(x: Array, chunk: int) -> Array:
    """(B, T, …), padded, to (chunks, B, C, …)."""
    x = _padded(x, chunk)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _key_chunks(x: Array, chunk: int) -> Array:
    """(B, T, kv_heads, …) to (chunks, B, kv_heads, C, …)."""
    return jnp.moveaxis(_chunks(x, chunk), 3, 2)


def _query_chunks(x: Array, kv_heads: int, chunk: int) -> Array:
    """(B, T, heads, …) to (chunks, B, kv_heads, rows, …) with rows = group * C.

    The query heads of one key head become rows of one matrix product (C: tokens per chunk).
    """
    x = _key_chunks(x, chunk)
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[4:])


def _rows(x: Array, chunk: int, length: int) -> Array:
    """Inverse of ``_query_chunks`` and ``_key_chunks``: back to (B, length, heads, …)."""
    x = x.reshape(*x.shape[:2], -1, chunk, *x.shape[4:])
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _scores(
    q: Array, k: Array, masks: _Masks, scale: float | Array, softcap: float | None, pair: tuple
) -> tuple[Array, Array | float]:
    """Masked scores (B, kv_heads, rows, C) of a pair of chunks, and their derivative by q @ k."""
    # Transposed scores would spare the backward pass transposed products, but were slower overall
    # on a CPU; so was a loop over heads, from 1024 tokens on.
    chunk = k.shape[2]
    scores = softcapped(_product("bhqd,bhkd->bhqk", q, k) * scale, softcap)
    slope = scale if softcap is None else scale * (1 - (scores / softcap) ** 2)
    query, key = (chunk * i + jnp.arange(chunk)[None] for i in pair)
    mask = causal_mask(query, key, masks.window)
    if masks.segment_ids is not None:
        ids, key_ids = (masks.segment_ids[i] for i in pair)
        mask = mask & (ids[:, :, None] == key_ids[:, None, :])
    # The mask is tiled, not the scores reshaped: a reshape between elementwise operations keeps
    # XLA's CPU backend from vectorising them (four times slower, docs/log.md).
    mask = jnp.tile(mask, (1, scores.shape[2] // chunk, 1))
    return jnp.where(mask[:, None], scores, MASKED), slope


def _forward(softcap: float | None, chunk: int, inputs: _Inputs) -> tuple[Array, Array]:
    q, k, v, *_, scale = inputs
    length, kv_heads = k.shape[1:3]
    masks = _masks(inputs, chunk)
    queries = _query_chunks(q, kv_heads, chunk)
    keys, values = (_key_chunks(x, chunk) for x in (k, v))

    def of_queries(_, i):
        def add(j, so_far):
            total, denominator, peak = so_far
            scores, _ = _scores(queries[i], keys[j], masks, scale, softcap, (i, j))
            higher = jnp.maximum(peak, scores.max(axis=-1))
            decay, weights = jnp.exp(peak - higher), jnp.exp(scores - higher[..., None])
            added = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), values[j])
            # Of the unrounded weights; only the product with the values has 16-bit operands.
            denominator = denominator * decay + weights.sum(axis=-1)
            return total * decay[..., None] + added, denominator, higher

        nothing = jnp.zeros(queries.shape[1:], jnp.float32)
        # In a chunk of which a query sees nothing its weights are exp(MASKED - MASKED) = 1. The
        # next chunk's decay multiplies them by 0; the last one always has the query's own token.
        start = nothing, nothing[..., 0], nothing[..., 0] + MASKED
        # The bounds are traced, so JAX cannot differentiate the loop in reverse: hence the
        # custom_vjp.
        total, denominator, peak = jax.lax.fori_loop(masks.first[i], i + 1, add, start)
        out = (total / denominator[..., None]).astype(q.dtype)
        return None, (out, peak + jnp.log(denominator))

    _, (out, logsumexp) = jax.lax.scan(of_queries, None, jnp.arange(len(queries)))
    return _rows(out, chunk, length), _rows(logsumexp, chunk, length)


def _forward_saving(inputs, softcap, chunk):
    # Named here because a name inside a custom_vjp counts in its forward rule only.
    out, logsumexp = map(saveable, _attend(inputs, softcap, chunk))
    return (out, logsumexp), (inputs, out, logsumexp)


def _backward(softcap, chunk, saved, gradients):
    inputs, out, logsumexp = saved
    d_out, d_logsumexp = gradients
    # Both terms are one number for each query that the gradient of its scores subtracts, so that
    # the sum over keys is not needed in the loop (FlashAttention's backward pass).
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_logsumexp
    dq, dk, dv = _gradients(softcap, chunk, inputs, logsumexp, mean, d_out)
    return (inputs._replace(q=dq, k=dk, v=dv, segment_ids=None, window=None, scale=None),)


def _gradients(
    softcap: float | None, chunk: int, inputs: _Inputs, logsumexp: Array, mean: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    q, k, v, *_, scale = inputs
    length, kv_heads = k.shape[1:3]
    masks = _masks(inputs, chunk)
    queries, d_outs, means, logs = (
        _query_chunks(x, kv_heads, chunk) for x in (q, d_out, mean, logsumexp)
    )
    keys, values = (_key_chunks(x, chunk) for x in (k, v))
    # XLA's CPU backend has no fast product that contracts rows (63 ms a step, where products of
    # this size take 24): transpose once, before the loops. The barrier keeps XLA from folding the
    # transpositions back into the products.
    queries_T, d_outs_T = jax.lax.optimization_barrier((queries.mT, d_outs.mT))

    def of_queries(so_far, i):
        def add(j, so_far):
            dq, dk, dv = so_far
            scores, slope = _scores(queries[i], keys[j], masks, scale, softcap, (i, j))
            weights = jnp.exp(scores - logs[i][..., None])
            d_weights = _product("bhqd,bhkd->bhqk", d_outs[i], values[j])
            d_scores = (weights * (d_weights - means[i][..., None]) * slope).astype(q.dtype)
            dv = dv.at[j].add(_product("bhdq,bhqk->bhdk", d_outs_T[i], weights.astype(q.dtype)))
            dk = dk.at[j].add(_product("bhdq,bhqk->bhdk", queries_T[i], d_scores))
            return dq + _product("bhqk,bhkd->bhqd", d_scores, keys[j]), dk, dv

        start = jnp.zeros(queries.shape[1:], jnp.float32), *so_far
        dq, *so_far = jax.lax.fori_loop(masks.first[i], i + 1, add, start)
        return tuple(so_far), dq.astype(q.dtype)

    # In float32 up to the end, since every chunk of queries adds to them; dq is whole, and rounded,
    # after its own loop.
    start = jnp.zeros(keys.mT.shape, jnp.float32), jnp.zeros(values.mT.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(of_queries, start, jnp.arange(len(queries)))
    dq, dk, dv = (_rows(x, chunk, length) for x in (dq, dk.mT, dv.mT))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(inputs, softcap, chunk):
    return _forward(softcap, chunk, inputs)


_attend.defvjp(_forward_saving, _backward)
