"""The attention operations: ``attend`` for whole sequences, ``attend_cached`` for decoding.

In both a token attends to tokens of its document (equal ``segment_ids``) that are not after it and
among the last ``window``, itself included. Order and distance are by index in the row, so a
document in a packed row has the same outputs as alone. Padding is segment 0: it attends to padding
only, no document attends to it, and its outputs are finite.

Queries are (B, T, heads, dim), keys and values (B, S, kv_heads, dim) with heads a multiple of
kv_heads: query head ``h`` reads key head ``h // (heads // kv_heads)``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jlora.ops.attention import chunked, cudnn, reference, splash
from jlora.ops.attention.case import Case, most_documents
from jlora.ops.attention.choice import (
    KERNELS,
    check_backend,
    check_possible,
    fallback,
)
from jlora.ops.attention.split import on_each_device
from jlora.ops.remat import saveable


def attend(
    q: Float[Array, "B T heads dim"],
    k: Float[Array, "B T kv_heads dim"],
    v: Float[Array, "B T kv_heads dim"],
    *,
    scale: float | Float[Array, ""],
    segment_ids: Integer[Array, "B T"] | Bool[Array, "B T"] | None = None,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    backend: str = "auto",
    gpu_capability: tuple[int, int] | None = None,
) -> Float[Array, "B T heads dim"]:
    """Causal self-attention within documents, over a whole row.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: the factor on query-key products; a constant, without a gradient.
      segment_ids: the document of each token, 0 for padding; None is one document a row. The dtype
        may say that rows have few documents, see ``case.most_documents``.
      window: how many tokens back a token sees, itself included; None is all.
      softcap: bounds the scaled products: ``softcap * tanh(. / softcap)``; None is no bound.
      sinks: one more score a head, in the softmax's denominator only.
      backend: one of ``BACKENDS``.
      gpu_capability: the compute capability of an absent GPU that the program is compiled for;
        None: of this process's GPU, if it has one.
    """
    check_backend(backend)
    if isinstance(scale, jax.Array):
        # A scale that is looked up by layer is an array; the backward passes have no gradient for
        # it.
        scale = jax.lax.stop_gradient(scale)
    case = Case(
        dtype=q.dtype.name,
        length=q.shape[1],
        head_dim=q.shape[3],
        documents=most_documents(segment_ids),
        traced_window=isinstance(window, jax.Array),
        softcap=softcap is not None,
        sinks=sinks is not None,
        capability=gpu_capability or cudnn.capability(),
        gpu_is_absent=gpu_capability is not None,
    )
    check_possible(backend, case)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
    operands = q, k, v, segment_ids, sinks
    settings = {"scale": scale, "window": window, "softcap": softcap}
    compute = {name: functools.partial(f, **settings) for name, f in _COMPUTE.items()}
    compute["cudnn"] = functools.partial(compute["cudnn"], case=case)
    if backend != "auto":
        return compute[backend](*operands)
    plain = compute[fallback(case.length)]
    kernels = {
        platform: compute[name]
        for platform, (name, kernel) in KERNELS.items()
        if kernel.available() and kernel.declines(case) is None
    }
    if not kernels:
        return plain(*operands)
    # Chosen when the program is lowered, not by this process's devices: `plan` compiles for GPUs
    # and TPUs on machines that have none.
    return jax.lax.platform_dependent(*operands, default=plain, **kernels)


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
    """Attention of new tokens over a KV cache that already holds them, at indices ``slots``.

    The slots of a row are filled in order, so the causal mask also hides slots that are empty.
    """
    mask = reference.causal_mask(slots, jnp.arange(k.shape[1])[None], window)
    return _with_sinks(*reference.attend(q, k, v, mask, scale, softcap), sinks)


def _reference(q, k, v, segment_ids, sinks, *, scale, window, softcap):
    mask = reference.row_mask(q.shape[1], segment_ids, window)
    return saveable(_with_sinks(*reference.attend(q, k, v, mask, scale, softcap), sinks))


def _chunked(q, k, v, segment_ids, sinks, *, scale, window, softcap):
    return _with_sinks(*chunked.attend(q, k, v, segment_ids, window, scale, softcap), sinks)


def _cudnn(q, k, v, segment_ids, sinks, *, scale, window, softcap, case):
    def fall_back(q, k, v):
        compute = _COMPUTE[fallback(q.shape[1])]
        return compute(q, k, v, segment_ids, sinks, scale=scale, window=window, softcap=softcap)

    return cudnn.attend(q, k, v, segment_ids, window, scale, fall_back, documents=case.documents)


def _splash(q, k, v, segment_ids, sinks, *, scale, window, softcap):
    return splash.attend(q, k, v, segment_ids, window, scale, softcap, sinks)


_COMPUTE = {
    "reference": _reference,
    "chunked": _chunked,
    "cudnn": on_each_device(_cudnn),
    "splash": on_each_device(_splash),
}


def _with_sinks(
    out: Float[Array, "B T heads dim"],
    logsumexp: Float[Array, "B T heads"],
    sinks: Float[Array, " heads"] | None,
) -> Float[Array, "B T heads dim"]:
    """Rescales outputs as if ``exp(sink)`` were added to the softmax denominator."""
    if sinks is None:
        return out
    # exp(lse) / (exp(lse) + exp(sink)): a factor on finished outputs, so that a backend needs to
    # return log-sum-exps only. The sigmoid cannot overflow.
    share = jax.nn.sigmoid(logsumexp - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)
