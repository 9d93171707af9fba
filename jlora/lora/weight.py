"""Leaves that wrap a weight of the base: ``LoraWeight`` and others, which ``dot`` multiplies by."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class WeightWrapper:
    """A leaf that takes the place of ``base`` in a tree, with its shape and dtype."""

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The base weight's shape."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """The base weight's rank."""
        return len(self.base.shape)

    @property
    def dtype(self):
        """The base weight's dtype."""
        return self.base.dtype

    def dequantize(self) -> Array:
        """The dense weight in the base's dtype, computed in float32 and rounded once."""
        return to_float32(self).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight(WeightWrapper):
    """A weight with a low-rank delta: ``(base + scale * lora_A @ lora_B) * gain``.

    All children may have a leading layer axis, which ``lax.scan`` slices off; ``matrices`` is the
    axis of experts. With ``adapter_ids``, lora_A, lora_B, scale and bias have an adapter axis after
    the layer axis, and row b of a batch uses adapter ``adapter_ids[b]``, or none if it is negative.
    """

    base: Any
    lora_A: Float[Array, "*layers *matrices in r"]
    lora_B: Float[Array, "*layers *matrices r out"]
    scale: Float[Array, "*layers"]
    gain: Float[Array, "*layers out"] | None = None
    """DoRA's factor of each column: magnitude over the norm of ``base + scale * A @ B``."""
    bias: Float[Array, "*layers out"] | None = None
    """``lora_bias``: added to the product; merging adds it to the module's bias."""
    adapter_ids: Int[Array, "*stack rows"] | None = None
    dropout_key: Array | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def scaled_A(self) -> Float[Array, "*matrices in r"]:
        """``scale * lora_A`` of one layer: scaling A costs less than scaling the activations."""
        return self.lora_A * self.scale.astype(self.lora_A.dtype)

    @property
    def mT(self) -> LoraWeight | Transposed:
        """The transpose of every matrix; a ``Transposed`` if the weight has a gain or a bias."""
        if self.gain is not None or self.bias is not None:
            return Transposed(self)
        assert self.adapter_ids is None, "each row has its own delta"
        a, b = self.lora_B.mT, self.lora_A.mT
        return dataclasses.replace(self, base=self.base.mT, lora_A=a, lora_B=b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """The transpose of ``mT``, for trees that store matrices as [out, in]."""

    mT: LoraWeight

    @property
    def shape(self) -> tuple[int, ...]:
        """(…, out, in)."""
        *lead, fan_in, fan_out = self.mT.shape
        return (*lead, fan_out, fan_in)

    @property
    def dtype(self):
        """The base weight's dtype."""
        return self.mT.dtype

    def dequantize(self) -> Array:
        """The dense sum, in the base's dtype."""
        return self.mT.dequantize().mT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenWeight(WeightWrapper):
    """An embedding with a few trained rows: ``rows[i]`` replaces row ``indices[i]`` of ``base``.

    If ``transposed``, it is an output head, (dim, vocabulary), and those are its columns.
    """

    base: Any
    rows: Float[Array, "n dim"]
    indices: Int[Array, " n"]
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def mT(self) -> TokenWeight:
        """The transpose: an output head."""
        return dataclasses.replace(self, base=self.base.mT, transposed=not self.transposed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplacedEmbedding(WeightWrapper):
    """An embedding that is trained in full (``modules_to_save``): ``value`` is looked up.

    ``base`` stays the weight of an output head that is tied to the embedding, as in PEFT.
    """

    base: Any
    value: Float[Array, "*layers vocabulary dim"]

    @property
    def mT(self) -> Array:
        """The transpose of the trained embedding."""
        return self.value.mT


def is_weight_leaf(leaf: Any) -> bool:
    """Whether a node of a tree is one weight though it is a pytree: quantized, or with an adapter.

    The ``is_leaf`` of ``jax.tree`` functions that count weights, not the arrays they consist of.
    """
    # By the method: this layer of the package does not know the classes of quantized arrays.
    return hasattr(leaf, "dequantize")


def base_of(leaf: Any) -> Any:
    """The base's own leaf below every adapter attached to it."""
    if isinstance(leaf, Transposed):
        return base_of(leaf.mT).mT
    return base_of(leaf.base) if isinstance(leaf, WeightWrapper) else leaf


def dense(leaf: Any) -> Any:
    """The leaf as one array in its dtype: dequantized, adapters included."""
    return leaf.dequantize() if is_weight_leaf(leaf) else leaf


def to_float32(leaf: Any) -> Float[Array, "..."]:
    """The dense weight in float32, adapters included."""
    if isinstance(leaf, LoraWeight):
        total = to_float32(leaf.base) + delta(leaf)
        return total if leaf.gain is None else total * leaf.gain[..., None, :]
    if isinstance(leaf, TokenWeight):
        table = to_float32(leaf.base)
        place = (..., leaf.indices) if leaf.transposed else leaf.indices
        return table.at[place].set(leaf.rows.mT if leaf.transposed else leaf.rows)
    if isinstance(leaf, ReplacedEmbedding):
        return leaf.value.astype(jnp.float32)
    if isinstance(leaf, WeightWrapper):
        return to_float32(leaf.base)
    return dense(leaf).astype(jnp.float32)


def delta(w: LoraWeight) -> Float[Array, "..."]:
    """``scale * lora_A @ lora_B``, dense, in float32."""
    assert w.adapter_ids is None, "each row has its own delta"
    # For merged files: the default of accelerators, TF32 or bfloat16, would add its own error.
    product = jnp.matmul(w.lora_A, w.lora_B, precision="highest")
    return product * w.scale.reshape(*w.scale.shape, *(1,) * (product.ndim - w.scale.ndim))
