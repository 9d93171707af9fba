"""Rematerialisation policy: save matmul results, recompute the rest in the backward pass.

Activation functions, norms, rotary embeddings and softmaxes are recomputed from the saved products:
that takes less time than writing their results to memory and reading them back, and saves most of
the memory. With gradient checkpointing only a layer's input is saved, on the device or the host.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

SAVED = "saved"
"""The ``checkpoint_name`` of saved values, for ``jax.checkpoint_policies``."""

INPUT = "layer input"
"""The ``checkpoint_name`` of a layer's input, from which a checkpointed layer is recomputed."""

SAVED_PRIMITIVES = ("dot_product_attention_fwd_wrapper",)
"""Primitives whose results are saved: a name cannot be put inside cuDNN's attention."""

_named = jax.checkpoint_policies.save_only_these_names(SAVED)


def saveable(x: Array) -> Array:
    """``x``, marked to be saved by ``policy`` if a gradient needs it."""
    return checkpoint_name(x, SAVED)


offloaded = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)
"""Policy of ``jax.checkpoint``: save a layer's input only, in host memory."""


def policy(primitive, *avals, **params) -> bool:
    """Policy of ``jax.checkpoint``: save what ``saveable`` marked, and the results of kernels."""
    # By name, not everything that is a product: saving the residuals of all operations took 1081 MB
    # and a tenth more time in a 63M model's step, the named ones 454 MB.
    return primitive.name in SAVED_PRIMITIVES or _named(primitive, *avals, **params)
