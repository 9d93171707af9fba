"""Splash attention for TPUs: JAX's Pallas kernel, which skips fully masked blocks.

Pallas takes a third of a second to import, so ``attend`` imports it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.ops.attention.case import Case
from jlora.ops.remat import SAVED

BLOCKS = (512, 256, 128)
"""Block sizes in tokens: the first that divides the row; the kernel's minimum is 128."""


def declines(case: Case) -> str | None:
    """Why splash attention cannot compute this call; None if it can."""
    if case.dtype not in ("bfloat16", "float32"):
        return f"splash attention computes in bfloat16 or float32, not in {case.dtype}"
    if case.traced_window:
        return "splash attention needs a window that is the same in all layers that are scanned"
    return None


@functools.cache
def available() -> bool:
    """Whether programs can be compiled for TPUs: libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def attend(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B T kv_heads dim"],
    v: Float[Array, "B T kv_heads dim"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
    scale: float | Float[Array, ""],
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T heads dim"]:
    """Attention outputs; ``interpret`` interprets the kernel on any device, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # The kernel has no scale, and takes sinks of the queries' type only (jax 0.10.2).
    q = q * jnp.asarray(scale, q.dtype)
    sinks = None if sinks is None else sinks.astype(q.dtype)
    length = q.shape[1]
    # Causality hides the padding at the end, and segment id 0 marks it.
    q, k, v = (_padded(x) for x in (q, k, v))
    T, heads = q.shape[1:3]
    mask = splash.CausalMask((T, T))
    if window is not None and window < T:
        # JAX's window counts the tokens to the left, without the query's own.
        mask = splash.LocalMask((T, T), (window - 1, 0), 0)
    block = next(block for block in BLOCKS if T % block == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        # Within on_each_device the kernel sees one device's heads and whole rows.
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        # The rematerialisation policy cannot see residuals inside the kernel unless they are named.
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def of_row(q: Array, k: Array, v: Array, ids: Array | None) -> Any:
        segments = None if ids is None else splash.SegmentIds(ids, ids)
        return kernel(q, k, v, segments, sinks)

    ids = None if segment_ids is None else _padded(segment_ids)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.vmap(of_row)(q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)[:, :length]


def _padded(x: Array) -> Array:
    """Pads axis 1 with zeros to a multiple of the smallest block."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % BLOCKS[-1])
    return jnp.pad(x, widths)
