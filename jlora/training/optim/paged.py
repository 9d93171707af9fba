"""Optimizer moments in host memory, copied to the device for their update only.

JAX's memory kinds: an array is in the device's memory (``device``) or in host memory that the
device can access (``pinned_host``). All backends have both, including the CPU.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def paged(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` with the arrays of its state in host memory between steps.

    The state and its values are those of ``inner``. Inside the jitted step each array is copied to
    the device, updated and copied back; XLA schedules each copy separately. Scalars, such as the
    step count, stay on the device.

    The caller places the initial state: ``sharding.shardings`` finds the leaves for host memory by
    the memory space in their types.
    """

    def init(params: Any) -> Any:
        return _move(inner.init(params), HOST)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # The redundant move to the host: without it XLA for TPU assumes a wrong layout of uint8.
        # Even with it, 8-bit Lion with fp16 does not compile for TPU (libtpu 0.0.42).
        state = _move(_move(state, HOST), DEVICE)
        updates, state = inner.update(updates, state, params)
        # On GPUs XLA streams the moments one by one. For TPUs it fetches all ahead of the step;
        # chains of optimization_barrier did not hold it back; a scan over layers was not tried.
        return updates, _move(state, HOST)

    return optax.GradientTransformation(init, update)


def _move(state: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)
