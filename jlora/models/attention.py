"""Attention behind one door: ``attend`` for whole sequences, ``attend_cached`` for decoding.

What a token sees, in both: tokens of its own document (equal ``segment_ids``), not after it, and
at most ``window`` back, itself included. Order and distance are by index in the row, so a packed
document computes what it computes alone. Padding is segment 0: it sees other padding only and is
seen by no document, and its results are finite.

Queries are (B, T, heads, dim), keys and values (B, S, kv_heads, dim) with heads a multiple of
kv_heads: query head ``h`` reads key head ``h // (heads // kv_heads)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.errors import ConfigError, did_you_mean

BACKENDS = ("auto", "reference")
"""Values of ``model.attention``; ``auto`` picks a backend (here always the reference)."""

MASKED = -1e30
"""Stands for minus infinity: a row that sees nothing becomes uniform instead of NaN."""


def check_backend(name: str) -> str:
    """``name`` itself; ConfigError when there is no such backend."""
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no attention {name!r}",
            where="model.attention",
            fix=did_you_mean(name, BACKENDS) or f"one of {', '.join(BACKENDS)}",
        )
    return name


def attend(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B T kv_heads dim"],
    v: Float[Array, "B T kv_heads dim"],
    *,
    scale: float | Float[Array, ""],
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | Int[Array, ""] | None = None,
    backend: str = "auto",
) -> Float[Array, "B T heads dim"]:
    """Causal self-attention within documents, over a whole row.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: the factor on query-key products.
      segment_ids: the document of each token, 0 for padding; None is one document a row.
      window: how many tokens back a token sees, itself included; None is all.
      backend: one of ``BACKENDS``.
    """
    check_backend(backend)
    index = jnp.arange(q.shape[1])[None]
    mask = _causal(index, index, window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return _reference(q, k, v, mask, scale)


def attend_cached(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B S kv_heads dim"],
    v: Float[Array, "B S kv_heads dim"],
    *,
    slots: Int[Array, "B T"],
    scale: float | Float[Array, ""],
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B T heads dim"]:
    """Attention of tokens in cache slots ``slots`` over a cache that holds them and what precedes.

    Slots of a row are filled in order, so that a slot after the query's own is not yet filled.
    """
    mask = _causal(slots, jnp.arange(k.shape[1])[None], window)
    return _reference(q, k, v, mask, scale)


def _causal(
    query: Int[Array, "B T"], key: Int[Array, "b S"], window: int | Array | None
) -> Bool[Array, "B T S"]:
    distance = query[:, :, None] - key[:, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _reference(q: Array, k: Array, v: Array, mask: Array, scale: float | Array) -> Array:
    """Two products and a masked softmax, in float32; memory grows with T * S.

    ``jax.nn.dot_product_attention`` computes the same, four times slower on CPU.
    """
    B, T, heads, dim = q.shape
    grouped = q.reshape(B, T, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    # Of the shape (B, T, S) before it meets the heads: all layers share it, and keep no more.
    bias = jnp.where(mask, 0.0, MASKED)
    weights = jax.nn.softmax(scores * scale + bias[:, None, None], axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(B, T, heads, dim)
