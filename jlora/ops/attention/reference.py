"""Attention as two products and a masked softmax: the oracle of the other backends' tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""In place of minus infinity: a query that sees no key gets uniform weights instead of NaN."""


def causal_mask(
    query: Int[Array, "b T"], key: Int[Array, "c S"], window: int | Int[Array, ""] | None
) -> Bool[Array, "d T S"]:
    """The causal mask, with a sliding window: 0 <= query - key < window, by index in the row."""
    distance = query[:, :, None] - key[:, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def row_mask(
    length: int, segment_ids: Int[Array, "B T"] | None, window: int | Int[Array, ""] | None
) -> Bool[Array, "d T T"]:
    """The mask of whole rows: causal, within the window, and within each document."""
    index = jnp.arange(length)[None]
    mask = causal_mask(index, index, window)
    if segment_ids is None:
        return mask
    return mask & (segment_ids[:, :, None] == segment_ids[:, None, :])


def softcapped(scores: Float[Array, "*batch"], softcap: float | None) -> Float[Array, "*batch"]:
    """``softcap * tanh(scores / softcap)`` (gemma2, arXiv 2408.00118); None is no cap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B S kv_heads dim"],
    v: Float[Array, "B S kv_heads dim"],
    mask: Bool[Array, "#B T S"],
    scale: float | Float[Array, ""],
    softcap: float | None = None,
) -> tuple[Float[Array, "B T heads dim"], Float[Array, "B T heads"]]:
    """Outputs and log-sum-exps of the scores; memory grows with T * S.

    ``jax.nn.dot_product_attention`` computes the same and was four times slower on CPU.
    """
    B, T, heads, dim = q.shape
    # Queries are grouped by their key head; repeating keys and values instead would copy them.
    grouped = q.reshape(B, T, k.shape[2], heads // k.shape[2], dim)
    # Float32 scores: a bfloat16 score near 100 is off by up to 0.25, its weight by a quarter.
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    # A bias of shape (B, T, S), without heads: it is all that the scanned layers save of the mask.
    bias = jnp.where(mask, 0.0, MASKED)
    scores = softcapped(scores * scale, softcap) + bias[:, None, None]
    # Normalised in float32 and then rounded, as in transformers' eager attention.
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    logsumexp = jnp.moveaxis(jax.nn.logsumexp(scores, axis=-1), -1, 1)
    return out.astype(q.dtype).reshape(q.shape), logsumexp.reshape(B, T, heads)
