"""The KV cache: keys and values of the tokens that a row has processed so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.models.config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of all layers; a row's tokens are in slots 0 … length - 1."""

    k: Float[Array, "layers B S kv_heads dim"]
    v: Float[Array, "layers B S kv_heads dim"]
    length: Int[Array, "B"]


class KV(NamedTuple):
    """The two arrays of a KVCache, as the scan over layers carries them."""

    k: Array
    v: Array


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """An empty cache with room for ``length`` tokens per row."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def cache_slots(cache: KVCache, valid: Array) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """The cache slot of each new token, and the row lengths after they are appended.

    Valid tokens get the row's next free slots. The others get the slot beyond the end, where
    scatters with ``mode="drop"`` discard the write.
    """
    size = cache.k.shape[2]
    slots = cache.length[:, None] + jnp.cumsum(valid, axis=1) - 1
    return jnp.where(valid, slots, size), cache.length + jnp.sum(valid, axis=1, dtype=jnp.int32)
