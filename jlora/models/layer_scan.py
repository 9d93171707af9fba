"""The scan over stacked decoder blocks, with rematerialisation.

A block is called as ``block(x, context, index, kv) → (x, kv)`` with the forward pass's
AttentionContext, the layer's index and the arrays of the KV cache, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from jlora.distributed.constraints import gather_quantized
from jlora.errors import ConfigError, did_you_mean
from jlora.models.attention_context import AttentionContext
from jlora.models.kv_cache import KV
from jlora.ops import remat

REMAT = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
"""Names of ``jax.checkpoint_policies`` that ``gradient_checkpointing`` accepts, besides a bool."""

OFFLOAD = "offload"
"""Full rematerialisation, with the inputs of the layers offloaded to host memory."""


def stack_layers(block: Callable[[], nnx.Module], layers: int) -> nnx.Module:
    """A module with the parameters of ``layers`` blocks, stacked on a leading layer axis."""
    # The argument only says how many layers there are.
    return nnx.vmap(lambda _: block(), in_axes=0)(jnp.arange(layers))


def scan_layers(
    layers: nnx.Module,
    run: range,
    x: Array,
    context: AttentionContext,
    kv: KV | None,
    checkpointing: bool | str,
) -> tuple[Array, KV | None]:
    """Computes the stacked layers of a run in order; one is compiled, whatever the depth.

    ``checkpointing`` says what the backward pass recomputes of each layer: True everything from its
    input, False only what lies between its matrix products (``ops.remat``), OFFLOAD as True with
    the inputs in host memory; another name is that policy of ``jax.checkpoint_policies``.
    """
    graph, state = nnx.split(layers)

    def body(carry, layer):
        index, weights = layer
        block = nnx.merge(graph, gather_quantized(weights))
        # The name lets a policy save or offload the layer's input. It has to be given in here: a
        # plain argument of the checkpointed function is never offloaded.
        x, kv = block(checkpoint_name(carry[0], remat.INPUT), context, index, carry[1])
        return (x, kv), None

    # Within a scan, XLA cannot merge the recomputation with the forward pass, so the barrier that
    # prevent_cse adds is not needed.
    body = jax.checkpoint(body, policy=checkpoint_policy(checkpointing), prevent_cse=False)
    # The cache is a carry, and so updated in place; as the scan's input and output it would exist
    # twice. Not unrolled: that, or a Python loop, took 1.02 to 1.04 times as long on a CPU, with up
    # to 1.7 times the memory.
    (x, kv), _ = jax.lax.scan(body, (x, kv), (jnp.arange(run.start, run.stop), state))
    return x, kv


def checkpoint_policy(name: bool | str) -> Callable | None:
    """The ``jax.checkpoint`` policy of a setting; ConfigError for an unknown name."""
    if isinstance(name, bool):
        return None if name else remat.policy
    if name == OFFLOAD:
        return remat.offloaded
    names = (OFFLOAD, *REMAT)
    if name not in REMAT:
        raise ConfigError(
            f"there is no rematerialisation policy {name!r}",
            where="gradient_checkpointing",
            fix=did_you_mean(name, names) or f"true, false or one of {', '.join(names)}",
        )
    return getattr(jax.checkpoint_policies, name)
