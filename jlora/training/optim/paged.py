"""Moments that live in the host's memory and visit the device for their update only.

What a memory kind is: a device's arrays lie in its own memory (``device``) or in the host's, where
the device can reach them (``pinned_host``). All backends have both, the CPU's included.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def paged(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` with the arrays of its state in host memory before and after every step.

    The state is ``inner``'s, leaf for leaf, and so are the numbers. Inside the jitted step each
    array is copied to the device, updated and copied back; every copy is an operation of its own
    that XLA schedules around the others. Scalars, such as the step's count, stay on the device.

    Where the state begins is up to the caller: ``sharding.shardings`` reads from the types of the
    state's leaves which of them belong to the host.
    """

    def init(params: Any) -> Any:
        return _move(inner.init(params), HOST)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # From the host, said again: without it XLA's TPU compiler mistakes the layout of uint8.
        state = _move(_move(state, HOST), DEVICE)
        updates, state = inner.update(updates, state, params)
        return updates, _move(state, HOST)

    return optax.GradientTransformation(init, update)


def _move(state: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)
