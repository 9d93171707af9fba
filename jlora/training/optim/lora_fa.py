"""LoRA-FA (arXiv 2308.03303): A stays as it was drawn, and B follows the full weight's gradient.

A's gradient is what a backward pass needs the layer's input for; without it x·A is enough. B's
gradient is multiplied by (AᵀA)⁻¹/s², so that the step s·A·dB comes as near to the gradient of the
weight itself as it can within A's span.

As peft's ``LoraFAOptimizer``, but for an embedding's pair: its A starts at zero, where B could
learn nothing, so it trains as without LoRA-FA.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.lora import Adapter, scaling
from jlora.tree import paths

RIDGE = 1e-8
"""Added to the diagonal of AᵀA, as peft does."""


class PreconditionState(NamedTuple):
    """(AᵀA)⁻¹/s² of every module, (…, r, r), at B's place: A never changes, so neither does it."""

    inverses: Any


def without_gradient_of_a(adapter: Adapter) -> Adapter:
    """The same adapter, no gradient flowing to ``lora_A``."""

    def keep(path: paths.Path, leaf: Any) -> Any:
        return jax.lax.stop_gradient(leaf) if path[-1] == "lora_A" else leaf

    return dataclasses.replace(adapter, weights=paths.map_leaves(keep, adapter.weights))


def precondition_b() -> optax.GradientTransformation:
    """Multiplies the gradient of every ``lora_B`` by its module's (AᵀA)⁻¹/s².

    Both trees are Adapters, as ``init_adapter`` makes them. Columns that a layer of lower rank does
    not use are zero in A; their rows in B have no gradient and get none.
    """

    def init(params: Any) -> PreconditionState:
        found = {}
        for leaf in paths.leaves(params.weights):
            if leaf.kind == "lora_A":
                scale = scaling(params.config, leaf.modules_at(leaf.path[:-1]))
                found[(*leaf.path[:-1], "lora_B")] = _inverse(leaf.value, jnp.asarray(scale))
        return PreconditionState(paths.nest(found))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        inverses = dict(paths.walk(state.inverses))

        def one(path: paths.Path, gradient: Any) -> Any:
            if path not in inverses:
                return gradient
            return jnp.matmul(inverses[path], gradient, precision="highest")

        weights = paths.map_leaves(one, updates.weights)
        return dataclasses.replace(updates, weights=weights), state

    return optax.GradientTransformation(init, update)


def _inverse(a: jax.Array, scale: jax.Array) -> jax.Array:
    """(AᵀA + 1e-8·I)⁻¹/s² (…, r, r) for A (…, in, r) and s (), or one for each layer."""
    r = a.shape[-1]
    gram = jnp.matmul(a.mT, a, precision="highest") + RIDGE * jnp.eye(r, dtype=a.dtype)
    scale = scale.reshape(scale.shape + (1,) * (a.ndim - scale.ndim))
    return jnp.linalg.pinv(gram, rtol=r * jnp.finfo(a.dtype).eps, hermitian=True) / scale**2
