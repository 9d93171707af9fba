"""What a layer's forward pass leaves for the backward pass: the products, and nothing else.

Activations, norms, rotations and softmaxes are computed again from the products around them; that
costs less than writing them to memory and reading them back, and a fraction of the space.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

NAME = "kept"
"""The name of what is kept, for ``jax.checkpoint_policies``."""

KERNELS = ("dot_product_attention_fwd_wrapper",)
"""Primitives whose results are kept; cuDNN's attention takes no names."""


_named = jax.checkpoint_policies.save_only_these_names(NAME)


def keep(x: Array) -> Array:
    """``x``, which is kept in a layer whose gradient is wanted, if the gradient needs it."""
    return checkpoint_name(x, NAME)


def policy(primitive, *avals, **params) -> bool:
    """Whether the results of a primitive are kept; for ``jax.checkpoint``."""
    return primitive.name in KERNELS or _named(primitive, *avals, **params)
