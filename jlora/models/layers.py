"""Layers of the decoder: Flax NNX modules that multiply only through ``ops.dot``.

A parameter may be any weight pytree (array, quantized array, weight with an adapter), so modules
pass ``get_value()`` on and never inspect it: indexing a Param raises for pytree values.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.distributed.constraints import split_rows
from jlora.ops.dot import columns, dot, dots, embed
from jlora.ops.matmul import barrier_after
from jlora.ops.remat import saveable
from jlora.ops.weights import Weight


class Linear(nnx.Module):
    """``x @ kernel + bias``: kernel (in, out), bias (out,) or none."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, dtype: jnp.dtype):
        # Never allocated: models are built under eval_shape (`Model.shapes`).
        self.kernel = nnx.Param(jnp.zeros((n_in, n_out), dtype))
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """The product plus the bias, in ``x.dtype``."""
        return self.with_bias(dot(x, self.kernel.get_value()))

    def with_bias(self, y: Float[Array, "*B out"]) -> Float[Array, "*B out"]:
        """The layer's result for its product ``y``, saved for the backward pass."""
        # Named after the bias is added, so that the backward pass does not add it again.
        return saveable(y if self.bias is None else y + self.bias.get_value().astype(y.dtype))


def project(x: Float[Array, "*B in"], *layers: Linear) -> list[Float[Array, "*B _"]]:
    """``[layer(x) for layer in layers]``, with the products that ``dots`` shares."""
    products = dots(x, [layer.kernel.get_value() for layer in layers])
    return [layer.with_bias(y) for layer, y in zip(layers, products, strict=True)]


class Embedding(nnx.Module):
    """Look-up in ``embedding`` (vocabulary, dim); the result has the compute dtype."""

    def __init__(self, n_rows: int, dim: int, *, dtype: jnp.dtype):
        self.embedding = nnx.Param(jnp.zeros((n_rows, dim), dtype))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T dim"]:
        """The embeddings of ``ids``."""
        return split_rows(embed(ids, self.embedding.get_value()).astype(self.dtype))


HeadColumns = tuple[Int[Array, ""], int]
"""Index of the first column of a weight (may be traced), and the number of columns."""


def output_logits(
    x: Float[Array, "*B dim"],
    w: Weight,
    bias: Float[Array, "vocabulary"] | None,
    column_range: HeadColumns | None = None,
    *,
    tied: bool = False,
) -> Float[Array, "*B vocabulary"]:
    """Logits in float32: ``x`` times the output head's weight, or a range of its columns.

    ``w`` is a kernel (dim, vocabulary), or, if ``tied``, the embedding (vocabulary, dim).
    """
    if tied:
        # In a loop over chunks of the sequence, XLA would store a transposed copy of the whole
        # embedding outside the loop; the barrier ties it to the loop's own input.
        w = barrier_after(w, x).mT
    # The product accumulates in float32 anyway; rounded to bfloat16 a logit of 20 is off by up to
    # 0.06.
    logits = dot(x, w if column_range is None else columns(w, *column_range), jnp.float32)
    if bias is None:
        return logits
    if column_range is not None:
        bias = jax.lax.dynamic_slice_in_dim(bias, *column_range)
    return logits + bias.astype(jnp.float32)


class RMSNorm(nnx.Module):
    """``scale * x / rms(x)`` over the last axis; the mean square is float32 (arXiv 1910.07467).

    With ``offset`` the factor is ``1 + scale``, in float32, as in Gemma. A scale of several axes
    broadcasts against the last axes of ``x``.
    """

    def __init__(self, *shape: int, eps: float, dtype: jnp.dtype, offset: bool = False):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*B dim"]) -> Float[Array, "*B dim"]:
        """The normalised ``x``, in its dtype."""
        x32, scale = x.astype(jnp.float32), self.scale.get_value()
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        # Rounded before it is scaled, as in transformers' LlamaRMSNorm; Gemma's rounds after.
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """``scale * (x - mean) / std + bias`` over the last axis, in float32 (arXiv 1607.06450).

    The bias is optional. A scale of several axes broadcasts against the last axes of ``x``.
    """

    def __init__(self, *shape: int, eps: float, dtype: jnp.dtype, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*B dim"]) -> Float[Array, "*B dim"]:
        """The normalised ``x``, in its dtype."""
        x32 = x.astype(jnp.float32)
        # In two passes: mean(x²) - mean(x)² cancels where the mean is large.
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        # Scaled in float32, too, and rounded once at the end, as in torch's layer_norm.
        scaled = centred * jax.lax.rsqrt(variance + self.eps) * _float32(self.scale)
        return (scaled if self.bias is None else scaled + _float32(self.bias)).astype(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(kind: str, *shape: int, eps: float, dtype: jnp.dtype) -> Norm:
    """The norm layer for a value of ``DecoderConfig.norm``."""
    if kind in ("rms", "rms_offset"):
        return RMSNorm(*shape, eps=eps, dtype=dtype, offset=kind == "rms_offset")
    return LayerNorm(*shape, eps=eps, dtype=dtype, bias=kind == "layer")


def _float32(param: nnx.Param) -> Array:
    return param.get_value().astype(jnp.float32)


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function that transformers calls ``name`` (see ``config.ACTIVATIONS``).

    It computes in float32 and rounds once, as torch does: bfloat16 silu would round five times.
    """
    act = _ACTIVATIONS[name]
    # It is faster, too: silu of 4 million values and their product take 2.8 ms on a CPU instead of
    # 4.7.
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
