"""A weight that reports what it is multiplied with, in the gradient of an argument of its own."""

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
    """Stands for ``base``; the gradient of ``slot`` is ``xᵀ[x@directions, 1, x²]`` of the inputs x.

    That is: the products of x's scatter matrix with some directions, the sum of all x (second to
    last column) and of their squares (last). ``lax.scan`` slices the layers off and stacks what
    they report; whatever is differentiated has to depend on the product.
    """

    base: Any
    slot: Float[Array, "*layers in columns"]
    """Any values: only its gradient means something."""
    directions: Float[Array, "*layers in k"]
    mask: Bool[Array, "*layers batch length"]
    """Which of the inputs count."""


@jax.custom_vjp
def observe(product: Array, x: Array, slot: Array, directions: Array, mask: Array) -> Array:
    """``product`` itself; see ``InputProbe`` for what ``slot``'s gradient is."""
    del x, slot, directions, mask
    return product


def _observe_fwd(product, x, slot, directions, mask):
    del slot
    return product, (x, directions, mask)


def _observe_bwd(saved, cotangent):
    x, directions, mask = saved
    x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1])
    seen = jnp.matmul(x, directions, precision="highest")
    sketch = jnp.matmul(x.T, seen, precision="highest")
    sums = jnp.stack([x.sum(0), (x * x).sum(0)], -1)
    return cotangent, None, jnp.concatenate([sketch, sums], -1), None, None


observe.defvjp(_observe_fwd, _observe_bwd)
