"""What attention needs besides queries, keys and values: rotary tables, masks and cache slots.

Windows, ropes and scales may differ between layers. They are looked up by the layer's index, so
that one compiled layer serves all of them in the scan (``layer_scan``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.models.config import DecoderConfig
from jlora.models.kv_cache import KV
from jlora.models.rope import rotate
from jlora.ops.attention import attend, attend_cached, needs_static_window

UNLIMITED_WINDOW = 2**30
"""Stands for no window in models where only some layers have one."""

Tables = tuple[Float[Array, "ropes B T half"], Float[Array, "ropes B T half"]]
"""Cosines and sines (``rope.Table``) of several ropes, stacked."""


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """The inputs that the attention layers of one forward pass share.

    ``slots`` are the new tokens' places in the KV cache (the cache's size for tokens that are not
    stored), or None for a pass over whole rows without a cache.
    """

    config: DecoderConfig
    backend: str
    gpu_capability: tuple[int, int] | None = None  # see ``Model``
    tables: Tables | None = None  # of the distinct entries of config.ropes
    segment_ids: Array | None = None
    slots: Array | None = None

    def at_positions(self, positions: Int[Array, "B T"]) -> AttentionContext:
        """The same context with rotary tables for these positions."""
        ropes, ids = _distinct(self.config.ropes), self.segment_ids
        ids = None if ids is None else ids.astype(jnp.int32)
        by_rope = {rope: rope.table(positions, ids) for rope in ropes if rope}
        if not by_rope:
            return self
        cos, sin = next(iter(by_rope.values()))
        by_rope[None] = jnp.ones_like(cos), jnp.zeros_like(sin)  # layers without rope: identity
        tables = jax.tree.map(lambda *table: jnp.stack(table), *(by_rope[rope] for rope in ropes))
        return dataclasses.replace(self, tables=tables)

    def rotate(self, x: Array, index: Array) -> Array:
        """Queries or keys (B, T, heads, dim) with the rotary embedding of layer ``index``."""
        if self.tables is None:
            return x
        which = _distinct_index(self.config.ropes, index)
        table = jax.tree.map(lambda stacked: stacked[which], self.tables)
        return rotate(x, table, self.config.interleaved_rope)

    def attend(
        self, q: Array, k: Array, v: Array, index: Array, kv: KV | None, sinks: Array | None
    ):
        """Attention outputs (B, T, heads, dim) of layer ``index``, and the updated cache."""
        scale = _of_layer(self.config.scales, index)
        window = _of_layer(self.config.windows, index, default=UNLIMITED_WINDOW)
        options = {"scale": scale, "softcap": self.config.attention_softcap, "sinks": sinks}
        if kv is None or self.slots is None:
            return self._attend_rows(q, k, v, index, window, options), kv
        rows = jnp.arange(q.shape[0])[:, None]
        kv = KV(
            # Dropped: padding has the slot after the last one (`cache_slots`).
            kv.k.at[index, rows, self.slots].set(k.astype(kv.k.dtype), mode="drop"),
            kv.v.at[index, rows, self.slots].set(v.astype(kv.v.dtype), mode="drop"),
        )
        keys, values = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in kv)
        return attend_cached(q, keys, values, slots=self.slots, window=window, **options), kv

    def _attend_rows(
        self, q: Array, k: Array, v: Array, index: Array, window: Any, options: dict[str, Any]
    ) -> Array:
        """Attention over whole rows; backends with static windows get one branch per window.

        A scan over periods of the layer pattern would avoid the branches, but compile every layer
        of a period and copy the weights where the depth is not a multiple of it.
        """

        def run(window: Any) -> Array:
            return attend(
                q,
                k,
                v,
                segment_ids=self.segment_ids,
                window=window,
                backend=self.backend,
                gpu_capability=self.gpu_capability,
                **options,
            )

        windows = _distinct(self.config.windows)
        if len(windows) == 1 or not needs_static_window(self.backend):
            return run(window)
        branches = [functools.partial(run, static) for static in windows]
        return jax.lax.switch(_distinct_index(self.config.windows, index), branches)


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _distinct_index(values: Sequence[Any], index: Array) -> Any:
    """The position of ``values[index]`` in ``_distinct(values)``."""
    distinct = _distinct(values)
    return _of_layer([distinct.index(value) for value in values], index)


def _of_layer(values: Sequence[Any], index: Array, default: Any = None) -> Any:
    """``values[index]``; a Python value if all layers agree, so that it stays static under jit."""
    if len(set(values)) == 1:
        return values[0]
    return jnp.asarray([default if value is None else value for value in values])[index]
