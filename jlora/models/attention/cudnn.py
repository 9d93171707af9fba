"""cuDNN's flash attention for NVIDIA GPUs, through ``jax.nn.dot_product_attention``.

It knows causality and windows. Rows that hold one document, padded at the end or not at all, need
no more: padding comes after all that could see it. (What padding itself sees differs from the other
backends, and nothing reads it.) Whether rows are such is known when they are there, so segment ids
make a branch of the program, and rows that are not go another way.

cuDNN could do packed rows on Hopper, given the documents' offsets. The public function does not
take them, and what it is made of is wrong for grouped queries in jax 0.10.2 (jax-ml/jax#39521).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.models.attention.case import Case


def declines(case: Case) -> str | None:
    """Why cuDNN cannot do this; None if it can. JAX checks the same, except for old GPUs."""
    if case.dtype not in ("bfloat16", "float16"):
        return f"cuDNN computes in 16 bits, not in {case.dtype}"
    if case.capability is not None and case.capability < (8, 0):
        return "cuDNN's flash attention needs compute capability 8.0 (Ampere)"
    widest = 256 if case.capability is not None and case.capability >= (9, 0) else 128
    if case.head_dim % 8 or case.head_dim > widest:
        return f"cuDNN needs a head dimension of 8, 16, … {widest} here, not {case.head_dim}"
    if case.softcap:
        return "cuDNN has no soft cap"
    if case.sinks:
        return "cuDNN has no sinks"
    if case.traced_window:
        return "cuDNN needs a window that is the same in all layers that are scanned"
    return None


@functools.cache
def available() -> bool:
    """Whether a program can hold a call of cuDNN: JAX's CUDA plugin is installed."""
    like = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(_causal, window=None, scale=1.0), like, like, like)
    except RuntimeError:  # cuDNN is not detected
        return False
    return True


@functools.cache
def capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPUs, as ``Case`` has it."""
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def attend(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B T kv_heads dim"],
    v: Float[Array, "B T kv_heads dim"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
    scale: float | Float[Array, ""],
    otherwise: Callable[[Array, Array, Array], Array],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T heads dim"]:
    """Results; those of ``otherwise(q, k, v)`` if a row of the batch holds several documents.

    ``implementation`` is JAX's: "xla" gives the same numbers on any device.
    """
    if not isinstance(scale, float | int):
        q, scale = q * scale.astype(q.dtype), 1.0
    ours = functools.partial(_causal, window=window, scale=scale, implementation=implementation)
    if segment_ids is None:
        return ours(q, k, v)
    return jax.lax.cond(jnp.all(one_document(segment_ids)), ours, otherwise, q, k, v)


def one_document(segment_ids: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """Whether a row is one document with nothing before it, then padding."""
    index = jnp.arange(segment_ids.shape[1])
    last = jnp.max(jnp.where(segment_ids != 0, index, -1), axis=1, keepdims=True)
    return jnp.all((segment_ids == segment_ids[:, :1]) | (index > last), axis=1)


def _causal(
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """JAX counts the tokens to the left without the token itself."""
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=local,
        implementation=implementation,
    )
