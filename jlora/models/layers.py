"""The layers that decoders are made of: Flax NNX modules that multiply only through ``jlora.dot``.

Parameters may hold any pytree that stands for a weight (an array, an NF4 array, a weight with an
adapter), so modules read them with ``get_value()`` and never look inside.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.distributed.constraints import split_rows
from jlora.ops.dot import columns, dot, embed
from jlora.ops.matmul import barrier_after
from jlora.ops.remat import saveable
from jlora.ops.weights import Weight


class Linear(nnx.Module):
    """``x @ kernel + bias``: kernel (in, out), bias (out,) or none."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros((n_in, n_out), dtype))
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """The product plus the bias, in ``x.dtype``."""
        y = dot(x, self.kernel.get_value())
        return saveable(y if self.bias is None else y + self.bias.get_value().astype(y.dtype))


class Embedding(nnx.Module):
    """Rows of ``embedding`` (vocabulary, dim), in the dtype that the model computes in."""

    def __init__(self, n_rows: int, dim: int, *, dtype: jnp.dtype):
        self.embedding = nnx.Param(jnp.zeros((n_rows, dim), dtype))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T dim"]:
        """The rows ``ids``."""
        return split_rows(embed(ids, self.embedding.get_value()).astype(self.dtype))


Part = tuple[Int[Array, ""], int]
"""The first of some columns of a weight, and how many."""


def project(
    x: Float[Array, "*B dim"],
    w: Weight,
    bias: Float[Array, "vocabulary"] | None,
    part: Part | None = None,
    *,
    tied: bool = False,
) -> Float[Array, "*B vocabulary"]:
    """Logits in float32: ``x`` times an output head's weight, or a part of its columns.

    ``w`` is a kernel (dim, vocabulary), or an embedding (vocabulary, dim) that is ``tied`` to it.
    """
    if tied:
        # In a loop over parts of the sequence, XLA would hoist a transposed copy out of the loop.
        w = barrier_after(w, x).mT
    logits = dot(x, w if part is None else columns(w, *part), jnp.float32)
    if bias is None:
        return logits
    own = bias if part is None else jax.lax.dynamic_slice_in_dim(bias, *part)
    return logits + own.astype(jnp.float32)


class RMSNorm(nnx.Module):
    """``scale * x / rms(x)`` over the last axis; the mean square is float32 (arXiv 1910.07467).

    With ``offset`` the factor is ``1 + scale``, in float32, as in Gemma. A scale of several axes
    meets as many of the last axes of ``x``.
    """

    def __init__(self, *shape: int, eps: float, dtype: jnp.dtype, offset: bool = False):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*B dim"]) -> Float[Array, "*B dim"]:
        """The normed ``x``, in its dtype."""
        wide, scale = x.astype(jnp.float32), self.scale.get_value()
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """``scale * (x - mean) / std + bias`` over the last axis, in float32 (arXiv 1607.06450).

    The bias may be left out. A scale of several axes meets as many of the last axes of ``x``.
    """

    def __init__(self, *shape: int, eps: float, dtype: jnp.dtype, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*B dim"]) -> Float[Array, "*B dim"]:
        """The normed ``x``, in its dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + self.eps) * _float32(self.scale)
        return (scaled if self.bias is None else scaled + _float32(self.bias)).astype(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(kind: str, *shape: int, eps: float, dtype: jnp.dtype) -> Norm:
    """The norm that ``DecoderConfig.norm`` calls ``kind``."""
    if kind in ("rms", "rms_offset"):
        return RMSNorm(*shape, eps=eps, dtype=dtype, offset=kind == "rms_offset")
    return LayerNorm(*shape, eps=eps, dtype=dtype, bias=kind == "layer")


def _float32(param: nnx.Param) -> Array:
    return param.get_value().astype(jnp.float32)


def activation(name: str) -> Callable[[Array], Array]:
    """The function that transformers calls ``name`` (see ``config.ACTIVATIONS``).

    It computes in float32 and rounds once, as torch's do.
    """
    act = _ACTIVATIONS[name]
    return lambda x: act(x.astype(jnp.float32)).astype(x.dtype)


def _tanh_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
