"""What runs the blocks: the scan over stacked layers, rematerialisation and the KV cache.

A block is called as ``block(x, call, index, kv) → (x, kv)``: ``call`` says how this forward pass
rotates and attends, ``index`` is the layer's number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlora.distributed.constraints import gather_quantized
from jlora.errors import ConfigError, did_you_mean
from jlora.models.config import DecoderConfig
from jlora.models.rope import rotate
from jlora.ops import remat
from jlora.ops.attention import attend, attend_cached, needs_static_window

REMAT = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
"""Names of ``jax.checkpoint_policies`` that ``gradient_checkpointing`` may be, besides a bool."""

OFFLOAD = "offload"
"""Checkpointing with the layers' inputs in the host's memory."""

FAR = 2**30
"""A window that reaches everything, for layers without one among layers with one."""


Tables = tuple[Float[Array, "ropes B T half"], Float[Array, "ropes B T half"]]
"""Cosines and sines (``rope.Table``) of several ropes."""


class Cache(NamedTuple):
    """ConfigReader and values of the tokens so far, a row's tokens in slots 0 … length - 1."""

    k: Float[Array, "layers B S kv_heads dim"]
    v: Float[Array, "layers B S kv_heads dim"]
    length: Int[Array, "B"]


class KV(NamedTuple):
    """The two arrays of a Cache, as the layer scan carries them."""

    k: Array
    v: Array


@dataclasses.dataclass(frozen=True)
class Call:
    """How the layers of one forward pass attend and where their tokens stand.

    ``slots`` are the tokens' places in the cache (its length for tokens to be dropped), or None for
    a pass over whole rows without a cache. What differs between layers is looked up by the layer's
    number, so that one layer's code serves all.
    """

    config: DecoderConfig
    backend: str
    tables: Tables | None = None  # of the distinct entries of config.ropes
    segment_ids: Array | None = None
    slots: Array | None = None

    def at_positions(self, positions: Int[Array, "B T"]) -> Call:
        """The same call with what rotates queries and keys at these positions."""
        ropes = _distinct(self.config.ropes)
        turns = {rope: rope.table(positions, self.segment_ids) for rope in ropes if rope}
        if not turns:
            return self
        cos, sin = next(iter(turns.values()))
        turns[None] = jnp.ones_like(cos), jnp.zeros_like(sin)
        tables = jax.tree.map(lambda *each: jnp.stack(each), *(turns[rope] for rope in ropes))
        return dataclasses.replace(self, tables=tables)

    def rotate(self, x: Array, index: Array) -> Array:
        """Queries or keys (B, T, heads, dim) rotated as layer ``index`` does."""
        if self.tables is None:
            return x
        which = _which(self.config.ropes, index)
        table = jax.tree.map(lambda each: each[which], self.tables)
        return rotate(x, table, self.config.interleaved_rope)

    def attend(
        self, q: Array, k: Array, v: Array, index: Array, kv: KV | None, sinks: Array | None
    ):
        """(B, T, heads, dim) results of layer ``index``, and the cache with its new tokens."""
        scale = _of_layer(self.config.scales, index)
        window = _of_layer(self.config.windows, index, default=FAR)
        how = {"scale": scale, "softcap": self.config.attention_softcap, "sinks": sinks}
        if kv is None or self.slots is None:
            return self._attend_rows(q, k, v, index, window, how), kv
        rows = jnp.arange(q.shape[0])[:, None]
        kv = KV(
            kv.k.at[index, rows, self.slots].set(k.astype(kv.k.dtype), mode="drop"),
            kv.v.at[index, rows, self.slots].set(v.astype(kv.v.dtype), mode="drop"),
        )
        keys, values = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in kv)
        return attend_cached(q, keys, values, slots=self.slots, window=window, **how), kv

    def _attend_rows(
        self, q: Array, k: Array, v: Array, index: Array, window: Any, how: dict[str, Any]
    ) -> Array:
        """Attention over whole rows; kernels that need static windows get a branch for each."""

        def run(window: Any) -> Array:
            ids, backend = self.segment_ids, self.backend
            return attend(q, k, v, segment_ids=ids, window=window, backend=backend, **how)

        windows = _distinct(self.config.windows)
        if len(windows) == 1 or not needs_static_window(self.backend):
            return run(window)
        branches = [functools.partial(run, each) for each in windows]
        return jax.lax.switch(_which(self.config.windows, index), branches)


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _which(values: Sequence[Any], index: Array) -> Any:
    """The place of ``values[index]`` among the distinct ones."""
    distinct = _distinct(values)
    return _of_layer([distinct.index(value) for value in values], index)


def _of_layer(values: Sequence[Any], index: Array, default: Any = None) -> Any:
    """``values[index]``: the Python value where all layers agree, so that it stays static."""
    if len(set(values)) == 1:
        return values[0]
    return jnp.asarray([default if value is None else value for value in values])[index]


def stack(block: Callable[[], nnx.Module], layers: int) -> nnx.Module:
    """A module whose parameters are those of ``layers`` blocks, stacked on a leading axis."""
    return nnx.vmap(lambda _: block(), in_axes=0)(jnp.arange(layers))


def scan_layers(
    layers: nnx.Module, x: Array, call: Call, kv: KV | None, checkpointing: bool | str
) -> tuple[Array, KV | None]:
    """Runs stacked layers in order: one layer's code is compiled, whatever the depth.

    ``checkpointing`` says what the backward pass recomputes: True all but the layer's input, False
    what lies between the products (see ``remat``), OFFLOAD as True with the inputs on the host;
    another name is that policy of ``jax.checkpoint_policies``.
    """
    graph, state = nnx.split(layers)

    def body(carry, layer):
        index, weights = layer
        block = nnx.merge(graph, gather_quantized(weights))
        x, kv = block(checkpoint_name(carry[0], remat.INPUT), call, index, carry[1])
        return (x, kv), None

    # Within a scan nothing can be merged across the barrier that prevent_cse puts up.
    body = jax.checkpoint(body, policy=policy(checkpointing), prevent_cse=False)
    index = jnp.arange(call.config.num_hidden_layers)
    (x, kv), _ = jax.lax.scan(body, (x, kv), (index, state))
    return x, kv


def policy(name: bool | str) -> Callable | None:
    """What a rematerialised layer keeps; ConfigError for an unknown name."""
    if isinstance(name, bool):
        return None if name else remat.policy
    if name == OFFLOAD:
        return remat.offloaded
    names = (OFFLOAD, *REMAT)
    if name not in REMAT:
        raise ConfigError(
            f"there is no rematerialisation policy {name!r}",
            where="gradient_checkpointing",
            fix=did_you_mean(name, names) or f"true, false or one of {', '.join(names)}",
        )
    return getattr(jax.checkpoint_policies, name)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """An empty cache with room for ``length`` tokens a row."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def cache_slots(cache: Cache, valid: Array) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """The slot of each new token, and the rows' lengths after them.

    Valid tokens go to the row's next free slots; the others get a slot beyond the end, where writes
    are dropped.
    """
    size = cache.k.shape[2]
    order = cache.length[:, None] + jnp.cumsum(valid, axis=1) - 1
    return jnp.where(valid, order, size), cache.length + jnp.sum(valid, axis=1, dtype=jnp.int32)
