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
from jaxtyping import Array, Float, Int

from jlora.errors import ConfigError, did_you_mean
from jlora.models.attention import chunked, reference

BACKENDS = ("auto", "reference", "chunked")
"""Values of ``model.attention``; ``auto`` picks a backend (here always the reference)."""


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
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    backend: str = "auto",
) -> Float[Array, "B T heads dim"]:
    """Causal self-attention within documents, over a whole row.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: the factor on query-key products; a constant, without a gradient.
      segment_ids: the document of each token, 0 for padding; None is one document a row.
      window: how many tokens back a token sees, itself included; None is all.
      softcap: bounds the scaled products: ``softcap * tanh(. / softcap)``; None is no bound.
      sinks: one more score a head, in the softmax's denominator only.
      backend: one of ``BACKENDS``.
    """
    check_backend(backend)
    if isinstance(scale, jax.Array):
        scale = jax.lax.stop_gradient(scale)
    if backend == "chunked":
        out, logsumexp = chunked.attend(q, k, v, segment_ids, window, scale, softcap)
        return _with_sinks(out, logsumexp, sinks)
    index = jnp.arange(q.shape[1])[None]
    mask = reference.seen(index, index, window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return _with_sinks(*reference.attend(q, k, v, mask, scale, softcap), sinks)


def attend_cached(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B S kv_heads dim"],
    v: Float[Array, "B S kv_heads dim"],
    *,
    slots: Int[Array, "B T"],
    scale: float | Float[Array, ""],
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "B T heads dim"]:
    """Attention of tokens in cache slots ``slots`` over a cache that holds them and what precedes.

    Slots of a row are filled in order, so that a slot after the query's own is not yet filled.
    """
    mask = reference.seen(slots, jnp.arange(k.shape[1])[None], window)
    return _with_sinks(*reference.attend(q, k, v, mask, scale, softcap), sinks)


def _with_sinks(
    out: Float[Array, "B T heads dim"],
    logsumexp: Float[Array, "B T heads"],
    sinks: Float[Array, " heads"] | None,
) -> Float[Array, "B T heads dim"]:
    """The results of a softmax whose denominator has ``exp(sink)`` in it besides."""
    if sinks is None:
        return out
    share = jax.nn.sigmoid(logsumexp - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)


def needs_static_window(backend: str) -> bool:
    """Whether what ``backend`` may run cannot take a traced window."""
    return False
