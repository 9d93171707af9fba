"""A weight whose gradient is statistics of the inputs it is multiplied with, for EVA."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jlora.lora.weight import WeightWrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputProbe(WeightWrapper):
    """Multiplies as ``base``; the gradient of ``slot`` is ``xᵀ[x@directions, 1, x²]`` of inputs x.

    These are the products of the inputs' scatter matrix with some directions, the sum of the inputs
    (second to last column) and of their squares (last). A gradient, since ``lax.scan`` then stacks
    the layers' statistics; the differentiated value has to depend on every product.
    """

    base: Any
    slot: Float[Array, "*layers in columns"]
    """Its values are not used, only its gradient."""
    directions: Float[Array, "*layers in k"]
    mask: Bool[Array, "*layers batch length"]
    """The inputs to include."""


@jax.custom_vjp
def observe(product: Array, x: Array, slot: Array, directions: Array, mask: Array) -> Array:
    """``product``, with the gradient of ``slot`` that ``InputProbe`` describes."""
    del x, slot, directions, mask
    return product


def _observe_fwd(product, x, slot, directions, mask):
    del slot
    return product, (x, directions, mask)


def _observe_bwd(saved, cotangent):
    x, directions, mask = saved
    x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1])
    projected = jnp.matmul(x, directions, precision="highest")
    # Two thin products: xᵀ @ x would be (in, in), for every layer at once under scan.
    sketch = jnp.matmul(x.T, projected, precision="highest")
    sums = jnp.stack([x.sum(0), (x * x).sum(0)], -1)
    return cotangent, None, jnp.concatenate([sketch, sums], -1), None, None


observe.defvjp(_observe_fwd, _observe_bwd)
