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

from jlora.dot import Weight, after, columns, dot, embed
from jlora.sharding import split_rows


class Linear(nnx.Module):
    """``x @ kernel + bias``: kernel (in, out), bias (out,) or none."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros((n_in, n_out), dtype))
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """The product plus the bias, in ``x.dtype``."""
        y = dot(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


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
    x: Float[Array, "*B dim"], w: Weight, part: Part | None = None, *, tied: bool = False
) -> Float[Array, "*B vocabulary"]:
    """Logits in float32: ``x`` times an output head's weight, or a part of its columns.

    ``w`` is a kernel (dim, vocabulary), or an embedding (vocabulary, dim) that is ``tied`` to it.
    """
    if tied:
        w = after(x, w).mT  # in a loop over parts of the sequence, no transposed copy precedes it
    return dot(x, w if part is None else columns(w, *part), jnp.float32)


class RMSNorm(nnx.Module):
    """``scale * x / rms(x)`` over the last axis; the mean square is float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B dim"]) -> Float[Array, "*B dim"]:
        """The normed ``x``, in its dtype."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale.get_value().astype(x.dtype)


class LayerNorm(nnx.Module):
    """``scale * (x - mean) / std + bias`` over the last axis, in float32 (arXiv 1607.06450)."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B dim"]) -> Float[Array, "*B dim"]:
        """The normed ``x``, in its dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        scale, bias = (p.get_value().astype(jnp.float32) for p in (self.scale, self.bias))
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


def activation(name: str) -> Callable[[Array], Array]:
    """The function that transformers calls ``name`` (see ``config.ACTIVATIONS``)."""
    return _ACTIVATIONS[name]


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
