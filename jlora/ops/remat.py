"""What a layer's forward pass leaves for the backward pass: the products, and nothing else.

Activations, norms, rotations and softmaxes are computed again from the products around them; that
costs less than writing them to memory and reading them back, and a fraction of the space. With
checkpointing a layer leaves its input alone, on the device or on the host.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

SAVED = "saved"
"""The name of what is kept, for ``jax.checkpoint_policies``."""

INPUT = "layer input"
"""The name of what a checkpointed layer is computed again from."""

KERNELS = ("dot_product_attention_fwd_wrapper",)
"""Primitives whose results are kept; cuDNN's attention takes no names."""


_named = jax.checkpoint_policies.save_only_these_names(SAVED)


def saveable(x: Array) -> Array:
    """``x``, which is kept in a layer whose gradient is wanted, if the gradient needs it."""
    return checkpoint_name(x, SAVED)


offloaded = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)
"""Of a checkpointed layer the input, in the host's memory; for ``jax.checkpoint``."""


def policy(primitive, *avals, **params) -> bool:
    """Whether the results of a primitive are kept; for ``jax.checkpoint``."""
    return primitive.name in KERNELS or _named(primitive, *avals, **params)
