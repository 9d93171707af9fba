"""LoRA-FA (arXiv 2308.03303): A is frozen at its initial values, and B's gradient preconditioned.

Only A's gradient needs the layer's input in the backward pass; B's needs x·A. B's gradient is
multiplied by (AᵀA)⁻¹/s², so that the update s·A·dB is the projection of the weight's gradient onto
the span of A.

As PEFT's ``LoraFAOptimizer``, except for embeddings: their A is initially zero, so that B could not
learn, and they train as without LoRA-FA.
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
"""Added to the diagonal of AᵀA, as in PEFT."""


class PreconditionState(NamedTuple):
    """(AᵀA)⁻¹/s² (…, r, r) of every module, at the path of B; constant, since A is."""

    inverses: Any


def without_gradient_of_a(adapter: Adapter) -> Adapter:
    """The adapter with ``stop_gradient`` on every ``lora_A``."""

    def stop(path: paths.Path, leaf: Any) -> Any:
        return jax.lax.stop_gradient(leaf) if path[-1] == "lora_A" else leaf

    return dataclasses.replace(adapter, weights=paths.map_leaves(stop, adapter.weights))


def precondition_b() -> optax.GradientTransformation:
    """Multiplies the gradient of every ``lora_B`` by its module's (AᵀA)⁻¹/s².

    Parameters and updates are Adapters. The columns of A that a layer of lower rank does not use
    are zero, and the gradient of the corresponding rows of B stays zero.
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

        def multiply(path: paths.Path, gradient: Any) -> Any:
            if path not in inverses:
                return gradient
            return jnp.matmul(inverses[path], gradient, precision="highest")

        weights = paths.map_leaves(multiply, updates.weights)
        return dataclasses.replace(updates, weights=weights), state

    return optax.GradientTransformation(init, update)


def _inverse(a: jax.Array, scale: jax.Array) -> jax.Array:
    """(AᵀA + 1e-8·I)⁻¹/s² (…, r, r) for A (…, in, r) and s (), or one for each layer."""
    r = a.shape[-1]
    gram = jnp.matmul(a.mT, a, precision="highest") + RIDGE * jnp.eye(r, dtype=a.dtype)
    scale = scale.reshape(scale.shape + (1,) * (a.ndim - scale.ndim))
    # torch's tolerance (JAX's is ten times that): PEFT calls torch's pinv.
    return jnp.linalg.pinv(gram, rtol=r * jnp.finfo(a.dtype).eps, hermitian=True) / scale**2
