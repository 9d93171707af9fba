"""cuDNN's flash attention for NVIDIA GPUs, through ``jax.nn.dot_product_attention``.

It knows causality and windows. Rows that hold one document, padded at the end or not at all, need
no more: padding comes after all that could see it. (What padding itself sees differs from the other
backends, and nothing reads it.) Whether rows are such is known when they are there, so segment ids
make a branch of the program.

Packed rows say which document a token is of in ``CODE`` more dimensions of its query and its key:
for each bit of the segment id, one where a query has the bit and a key may not, and one where it is
the other way round. Between tokens of a document all products in them are zero, and the score is
what it was; between others one at least is so far below every score that its weight is zero.
(cuDNN could be given the documents' offsets, on Hopper, but the public function does not take them,
and what it is made of is wrong for grouped queries in jax 0.10.2, jax-ml/jax#39521. A mask would be
a bias, quadratic in length and with a gradient that is computed whether or not it is wanted.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jlora.ops.attention import reference
from jlora.ops.attention.case import Case

BITS = 8
"""Of the segment ids that packed rows may have: fewer than 256 documents a row."""
CODE = 2 * BITS
"""Dimensions that tell documents apart."""
FAR = 2**15
"""The square, times the scale, is how far below all others a score is that is not to count: 1e8 for
a head of 64."""


def declines(case: Case) -> str | None:
    """Why cuDNN cannot do this; None if it can, so far as is known and was tried (``fault``)."""
    if case.dtype not in ("bfloat16", "float16"):
        return f"cuDNN computes in 16 bits, not in {case.dtype}"
    if case.capability is not None and case.capability < (8, 0):
        return "cuDNN's flash attention needs compute capability 8.0 (Ampere)"
    widest = _widest(case.capability)
    if case.head_dim % 8 or case.head_dim > widest:
        return f"cuDNN needs a head dimension of 8, 16, … {widest} here, not {case.head_dim}"
    if case.softcap:
        return "cuDNN has no soft cap"
    if case.sinks:
        return "cuDNN has no sinks"
    if case.traced_window:
        return "cuDNN needs a window that is the same in all layers that are scanned"
    return fault(case.dtype, case.head_dim)


def packs(dtype: str, head_dim: int, capability: tuple[int, int] | None) -> bool:
    """Whether there is room for the code of documents beside a head.

    In float16 the gradients of the code, which nothing reads, would overflow: that is not tested.
    """
    has_room = dtype != "float16" and head_dim + CODE <= _widest(capability)
    return has_room and fault(dtype, head_dim, packed=True) is None


@functools.cache
def fault(dtype: str, head_dim: int, packed: bool = False) -> str | None:
    """What is wrong with cuDNN on this process's GPU; None if nothing is, or there is no GPU.

    Found by trying: two short rows and their gradients against the reference. JAX does not test
    cuDNN's attention on CUDA 13 (jax-ml/jax#32430), and not all widths of heads have a plan.
    """
    if capability() is None:
        return None
    with ThreadPoolExecutor(1) as clean:  # whose thread knows no trace and no mesh of the caller's
        return clean.submit(_try, jnp.dtype(dtype), head_dim, packed).result()


def _try(dtype: jnp.dtype, head_dim: int, packed: bool) -> str | None:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, 2, 2, 4)  # of queries, keys, values and the gradient of the result
    shapes = [(2, 128, n, head_dim) for n in heads]
    q, k, v, g = (jax.random.normal(*at, dtype) for at in zip(keys, shapes, strict=True))
    ids = jnp.where(jnp.arange(128) < 50, 1, 1 + packed) * jnp.ones((2, 1), jnp.int32)
    scale = head_dim**-0.5

    def ours(q: Array, k: Array, v: Array) -> Array:
        coded = _coded(q, k, v, ids) if packed else (q, k, v)
        return _causal(*coded, window=None, scale=scale)[..., :head_dim]

    def theirs(q: Array, k: Array, v: Array) -> Array:
        return reference.attend(q, k, v, reference.seen_in_rows(128, ids, None), scale)[0]

    def run(f: Callable[..., Array]) -> list[np.ndarray]:
        out, pull = jax.vjp(jax.jit(f), q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull(g))]

    try:
        got = run(ours)
    except Exception as error:  # of XLA's, of cuDNN's, or of JAX's checks
        return f"cuDNN fails on this GPU ({str(error).strip().splitlines()[0][:200]})"
    for a, b in zip(got, run(theirs), strict=True):
        if not np.abs(a - b).max() <= 0.05 * np.abs(b).max():
            return "cuDNN's numbers on this GPU are not those of the reference"
    return None


def _widest(capability: tuple[int, int] | None) -> int:
    return 256 if capability is not None and capability >= (9, 0) else 128


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
    """Results; those of ``otherwise(q, k, v)`` for packed rows that are not done here.

    ``implementation`` is JAX's: "xla" gives the same numbers on any device.
    """
    if not isinstance(scale, float | int):
        q, scale = q * scale.astype(q.dtype), 1.0
    ours = functools.partial(_causal, window=window, scale=scale, implementation=implementation)
    if segment_ids is None:
        return ours(q, k, v)

    def packed(q: Array, k: Array, v: Array) -> Array:
        return ours(*_coded(q, k, v, segment_ids))[..., : q.shape[3]]

    ways = [ours, otherwise]
    way = jnp.where(jnp.all(one_document(segment_ids)), 0, 1)
    if packs(q.dtype.name, q.shape[3], capability()):
        ways.append(packed)
        has_code = jnp.all((segment_ids >= 0) & (segment_ids < 2**BITS))
        way = jnp.where((way == 1) & has_code, 2, way)
    return jax.lax.switch(way, ways, q, k, v)


def _coded(
    q: Array, k: Array, v: Array, segment_ids: Int[Array, "B T"]
) -> tuple[Array, Array, Array]:
    """Queries and keys of which those of different documents are far apart, and values as wide."""
    bits = (segment_ids[..., None] >> jnp.arange(BITS)) & 1
    queries = jnp.concatenate([bits, 1 - bits], axis=-1)

    def beside(x: Array, code: Array) -> Array:
        code = jnp.broadcast_to(code[:, :, None].astype(x.dtype), (*x.shape[:3], CODE))
        return jnp.concatenate([x, code], axis=-1)

    return (
        beside(q, FAR * queries),
        beside(k, -FAR * (1 - queries)),
        beside(v, jnp.zeros_like(queries)),
    )


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
