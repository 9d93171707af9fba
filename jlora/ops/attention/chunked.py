"""Attention in chunks of queries and keys, with memory linear in length (arXiv 2112.05682).

The softmax is summed up on the way over the keys (arXiv 2205.14135), and the backward pass computes
the scores again from the queries, the keys and each softmax's denominator. A chunk of queries
meets only the chunks of keys that it can see: none after it, none beyond the window, none before
the first token of its documents. Packed rows and sliding windows cost accordingly less.

Reverse mode only, once: neither forward mode nor second derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.ops.attention.reference import MASKED, seen, softcapped
from jlora.ops.remat import saveable

CHUNK = 256
"""Tokens that are computed at once, on an accelerator."""

CPU_CHUNKS = (256, 128, 64)
"""And on a CPU: the first of them that computes no more than ``CPU_SCORES`` scores at once."""

CPU_SCORES = 2**20
"""4 MiB of float32, which stay in a CPU's caches (docs/log.md)."""


class _Given(NamedTuple):
    """What attention is asked for, see ``attend``."""

    q: Float[Array, "B T heads dim"]
    k: Float[Array, "B T kv_heads dim"]
    v: Float[Array, "B T kv_heads dim"]
    segment_ids: Int[Array, "B T"] | None
    window: int | Int[Array, ""] | None
    scale: float | Float[Array, ""]


class _Masks(NamedTuple):
    """What a chunk of queries sees."""

    segment_ids: Int[Array, "chunks B C"] | None
    window: int | Int[Array, ""] | None
    first: Int[Array, " chunks"]
    """The first chunk of keys that any query of each chunk sees."""


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
    """Results, and the logarithm of each softmax's denominator; both are differentiable.

    ``chunk`` is how many tokens are computed at once; None is what suits the device.
    """
    return _attend(_Given(q, k, v, segment_ids, window, scale), softcap, chunk)


def _by_device(compute: Callable[..., Any], chunk: int | None, given: _Given, *others: Any) -> Any:
    """``compute(chunk, given, *others)`` with the chunk that is asked for, or suits the device."""
    B, T, heads, _ = given.q.shape
    fits = (c for c in CPU_CHUNKS if B * heads * c * c <= CPU_SCORES)
    on_cpu = min(chunk or next(fits, CPU_CHUNKS[-1]), T)
    elsewhere = min(chunk or CHUNK, T)
    if on_cpu == elsewhere:
        return compute(on_cpu, given, *others)
    cpu, default = (functools.partial(compute, c) for c in (on_cpu, elsewhere))
    return jax.lax.platform_dependent(given, *others, cpu=cpu, default=default)


def _masks(given: _Given, chunk: int) -> _Masks:
    starts, window = jnp.arange(0, given.q.shape[1], chunk), given.window
    first = jnp.zeros_like(starts) if window is None else jnp.maximum(starts - window + 1, 0)
    segment_ids = given.segment_ids
    if segment_ids is not None:
        segment_ids = _padded(segment_ids, chunk)
        documents = _chunks(_document_start(segment_ids), chunk).min(axis=(1, 2))
        first = jnp.maximum(first, documents)
        segment_ids = _chunks(segment_ids, chunk)
    return _Masks(segment_ids, window, first // chunk)


def _document_start(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The index of the first token with the same id, wherever the others are."""
    order = jnp.argsort(ids, axis=1, stable=True)
    place = jax.vmap(jnp.searchsorted)(jnp.take_along_axis(ids, order, axis=1), ids)
    return jnp.take_along_axis(order, place, axis=1)


def _padded(x: Array, chunk: int) -> Array:
    """Zeros at the end of axis 1: causality hides them, as segment 0 they are padding."""
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
    """(B, T, heads, …) to (chunks, B, kv_heads, rows, …): a key head's queries are its rows.

    There are group * C of them, for a chunk of C tokens.
    """
    x = _key_chunks(x, chunk)
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[4:])


def _rows(x: Array, chunk: int, length: int) -> Array:
    """The inverse of both: (chunks, B, kv_heads, rows, …) to (B, T, heads, …), T the length."""
    x = x.reshape(*x.shape[:2], -1, chunk, *x.shape[4:])
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _scores(
    q: Array, k: Array, masks: _Masks, scale: float | Array, softcap: float | None, pair: tuple
) -> tuple[Array, Array | float]:
    """Masked scores (B, kv_heads, rows, C) of a pair of chunks, and their slope: d/d(q @ k)."""
    chunk = k.shape[2]
    scores = softcapped(_product("bhqd,bhkd->bhqk", q, k) * scale, softcap)
    slope = scale if softcap is None else scale * (1 - (scores / softcap) ** 2)
    query, key = (chunk * i + jnp.arange(chunk)[None] for i in pair)
    mask = seen(query, key, masks.window)
    if masks.segment_ids is not None:
        ids, key_ids = (masks.segment_ids[i] for i in pair)
        mask = mask & (ids[:, :, None] == key_ids[:, None, :])
    # A reshape between two elementwise operations would cost CPUs their vector instructions.
    mask = jnp.tile(mask, (1, scores.shape[2] // chunk, 1))
    return jnp.where(mask[:, None], scores, MASKED), slope


def _forward(softcap: float | None, chunk: int, given: _Given) -> tuple[Array, Array]:
    q, k, v, *_, scale = given
    length, kv_heads = k.shape[1:3]
    masks = _masks(given, chunk)
    queries = _query_chunks(q, kv_heads, chunk)
    keys, values = (_key_chunks(x, chunk) for x in (k, v))

    def of_queries(_, i):
        def add(j, so_far):
            total, denominator, peak = so_far
            scores, _ = _scores(queries[i], keys[j], masks, scale, softcap, (i, j))
            higher = jnp.maximum(peak, scores.max(axis=-1))
            decay, weights = jnp.exp(peak - higher), jnp.exp(scores - higher[..., None])
            added = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), values[j])
            denominator = denominator * decay + weights.sum(axis=-1)
            return total * decay[..., None] + added, denominator, higher

        nothing = jnp.zeros(queries.shape[1:], jnp.float32)
        start = nothing, nothing[..., 0], nothing[..., 0] + MASKED
        total, denominator, peak = jax.lax.fori_loop(masks.first[i], i + 1, add, start)
        out = (total / denominator[..., None]).astype(q.dtype)
        return None, (out, peak + jnp.log(denominator))

    _, (out, logsumexp) = jax.lax.scan(of_queries, None, jnp.arange(len(queries)))
    return _rows(out, chunk, length), _rows(logsumexp, chunk, length)


def _forward_saving(given, softcap, chunk):
    out, logsumexp = map(saveable, _attend(given, softcap, chunk))
    return (out, logsumexp), (given, out, logsumexp)


def _backward(softcap, chunk, saved, gradients):
    given, out, logsumexp = saved
    d_out, d_logsumexp = gradients
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_logsumexp
    compute = functools.partial(_gradients, softcap)
    dq, dk, dv = _by_device(compute, chunk, given, logsumexp, mean, d_out)
    return (given._replace(q=dq, k=dk, v=dv, segment_ids=None, window=None, scale=None),)


def _gradients(
    softcap: float | None, chunk: int, given: _Given, logsumexp: Array, mean: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    q, k, v, *_, scale = given
    length, kv_heads = k.shape[1:3]
    masks = _masks(given, chunk)
    queries, d_outs, means, logs = (
        _query_chunks(x, kv_heads, chunk) for x in (q, d_out, mean, logsumexp)
    )
    keys, values = (_key_chunks(x, chunk) for x in (k, v))
    # CPUs have no fast product that sums over rows: these two are turned once instead.
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

    start = jnp.zeros(keys.mT.shape, jnp.float32), jnp.zeros(values.mT.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(of_queries, start, jnp.arange(len(queries)))
    dq, dk, dv = (_rows(x, chunk, length) for x in (dq, dk.mT, dv.mT))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(given, softcap, chunk):
    return _by_device(functools.partial(_forward, softcap), chunk, given)


_attend.defvjp(_forward_saving, _backward)
