"""cuDNN's flash attention for NVIDIA GPUs, through ``jax.nn.dot_product_attention``.

It supports causal masks and sliding windows. A row that is one document, with or without padding
after it, needs no other mask: causality hides the padding. (The outputs at padding differ from
those of other backends; nothing reads them.) The type of the segment ids tells whether rows are of
this kind (``case.most_documents``): a switch on their values is a conditional in every layer, for
which the host waits and XLA copies operands.

Packed rows: the segment ids are encoded in ``CODE`` extra dimensions of queries and keys, two per
bit of the id. One is nonzero where the query's bit is 1 and the key's 0, the other where it is the
other way round. Within a document these products are zero and scores are unchanged; between
documents at least one product is so negative that the softmax weight is zero.

Why not cuDNN's own packed layout (offsets of documents, on Hopper): the public function does not
take it, and the private one is wrong for grouped queries in jax 0.10.2 (jax-ml/jax#39521). Why not
a mask: it would be a bias, quadratic in length, whose gradient is computed even if unused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.ops.attention import reference
from jlora.ops.attention.case import Case

# A head of 64 becomes 80 wide, one of 128 144. Whether cuDNN has execution plans for these is not
# known, hence `fault`.
BITS = 8
"""Bits of a segment id that are encoded."""
MOST_DOCUMENTS = 2**BITS - 1
CODE = 2 * BITS
"""Extra head dimensions that encode the segment id."""
# A power of two, so that bfloat16 holds it exactly.
FAR = 2**15
"""Magnitude of the code: scores between documents are lowered by its square times the scale, 1e8
for a head dimension of 64."""


def declines(case: Case) -> str | None:
    """Why cuDNN cannot compute this call; None if it can, also by trial on the GPU (``fault``)."""
    if case.dtype not in ("bfloat16", "float16"):
        return f"cuDNN computes in 16 bits, not in {case.dtype}"
    if case.capability is not None and case.capability < (8, 0):
        return "cuDNN's flash attention needs compute capability 8.0 (Ampere)"
    max_dim = _max_head_dim(case.capability)
    if case.head_dim % 8 or case.head_dim > max_dim:
        return f"cuDNN needs a head dimension of 8, 16, … {max_dim} here, not {case.head_dim}"
    if case.softcap:
        return "cuDNN has no soft cap"
    if case.sinks:
        return "cuDNN has no sinks"
    if case.traced_window:
        return "cuDNN needs a window that is the same in all layers that are scanned"
    packed = case.documents > 1
    if packed and case.dtype == "float16":
        # The gradients of the code would overflow, although nothing uses them.
        return "cuDNN computes packed rows in bfloat16, not in float16"
    if packed and case.head_dim + CODE > max_dim:
        return (
            f"a head in cuDNN has at most {max_dim} dimensions here, and packed rows need {CODE} "
            f"besides its {case.head_dim}"
        )
    return None if case.gpu_is_absent else fault(case.dtype, case.head_dim, packed)


@functools.cache
def fault(dtype: str, head_dim: int, packed: bool = False) -> str | None:
    """Why cuDNN's results on this process's GPU are unusable; None if they are right, or no GPU.

    Tried once per process: two short rows and their gradients are compared with the reference,
    because JAX does not test cuDNN's attention on CUDA 13 (jax-ml/jax#32430) and cuDNN has no
    execution plan for some head dimensions.
    """
    if capability() is None:
        return None
    # A thread of its own: the caller may be tracing, or have a mesh set, and both are per thread.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_try, jnp.dtype(dtype), head_dim, packed).result()


def _try(dtype: jnp.dtype, head_dim: int, packed: bool) -> str | None:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, 2, 2, 4)  # of queries, keys, values and the gradient of the result
    shapes = [(2, 128, n, head_dim) for n in heads]
    q, k, v, g = (jax.random.normal(*at, dtype) for at in zip(keys, shapes, strict=True))
    # 50 is no multiple of a kernel's tile, so that a document ends within one.
    ids = jnp.where(jnp.arange(128) < 50, 1, 1 + packed) * jnp.ones((2, 1), jnp.int32)
    scale = head_dim**-0.5

    def by_cudnn(q: Array, k: Array, v: Array) -> Array:
        operands = _with_document_code(q, k, v, ids) if packed else (q, k, v)
        return _causal(*operands, window=None, scale=scale)[..., :head_dim]

    def by_reference(q: Array, k: Array, v: Array) -> Array:
        return reference.attend(q, k, v, reference.row_mask(128, ids, None), scale)[0]

    def run(f: Callable[..., Array]) -> list[np.ndarray]:
        out, pull = jax.vjp(jax.jit(f), q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull(g))]

    try:
        got = run(by_cudnn)
    except Exception as error:  # of XLA's, of cuDNN's, or of JAX's checks
        return f"cuDNN fails on this GPU ({str(error).strip().splitlines()[0][:200]})"
    for a, b in zip(got, run(by_reference), strict=True):
        # Not `>`: a NaN has to count as a fault.
        if not np.abs(a - b).max() <= 0.05 * np.abs(b).max():
            return "cuDNN's numbers on this GPU are not those of the reference"
    return None


def _max_head_dim(capability: tuple[int, int] | None) -> int:
    # The limits that JAX checks: it raises for a larger head.
    return 256 if capability is not None and capability >= (9, 0) else 128


@functools.cache
def available() -> bool:
    """Whether calls of cuDNN can be traced: JAX's CUDA plugin is installed."""
    like = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(_causal, window=None, scale=1.0), like, like, like)
    except RuntimeError:  # cuDNN is not detected
        return False
    return True


@functools.cache
def capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; None without one."""
    device = jax.devices()[0]
    # Not by `device.platform`: AMD's GPUs are "gpu" as well.
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
    fall_back: Callable[[Array, Array, Array], Array],
    *,
    documents: int,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T heads dim"]:
    """Attention outputs.

    ``documents`` is the most documents in a row (``case.most_documents``). Where it is not known,
    rows whose segment ids do not fit into ``BITS`` bits are computed by ``fall_back(q, k, v)``.
    ``implementation`` is that of ``jax.nn.dot_product_attention``: "xla" computes the same on any
    device, for tests.
    """
    if not isinstance(scale, float | int):
        # JAX's scale has to be a Python number; one that is looked up by layer is traced.
        q, scale = q * scale.astype(q.dtype), 1.0
    causal = functools.partial(_causal, window=window, scale=scale, implementation=implementation)
    if segment_ids is None or documents == 1:
        return causal(q, k, v)

    def with_documents(q: Array, k: Array, v: Array) -> Array:
        return causal(*_with_document_code(q, k, v, segment_ids))[..., : q.shape[3]]

    if documents <= MOST_DOCUMENTS:
        return with_documents(q, k, v)
    # For all rows at once: a condition on each would be computed both ways under vmap.
    has_code = jnp.all((segment_ids >= 0) & (segment_ids <= MOST_DOCUMENTS))
    return jax.lax.cond(has_code, with_documents, fall_back, q, k, v)


def _with_document_code(
    q: Array, k: Array, v: Array, segment_ids: Int[Array, "B T"]
) -> tuple[Array, Array, Array]:
    """Queries and keys with the document code appended, and values padded to the same width."""
    bits = (segment_ids[..., None] >> jnp.arange(BITS)) & 1
    query_code = jnp.concatenate([bits, 1 - bits], axis=-1)

    def append(x: Array, code: Array) -> Array:
        code = jnp.broadcast_to(code[:, :, None].astype(x.dtype), (*x.shape[:3], CODE))
        return jnp.concatenate([x, code], axis=-1)

    return (
        append(q, FAR * query_code),
        append(k, -FAR * (1 - query_code)),
        append(v, jnp.zeros_like(query_code)),
    )


def _causal(
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    # JAX's window counts the tokens to the left, without the query's own.
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
