"""What a training step updates. Nothing of the frozen base is part of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

INITIAL_SCALE = 2.0**16
MAX_SCALE = 2.0**24
GROWTH_INTERVAL = 2000
"""Steps without overflow after which the scale doubles."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16, by the rules of torch's GradScaler.

    The scale doubles after 2000 steps in a row without overflow, and halves after one that
    overflows, whose update is skipped. Unlike torch's it stays between 1 and 2**24.
    """

    scale: Any
    """float32 ()."""
    good_steps: Any
    """int32 (): steps since the last overflow or doubling."""

    def updated(self, finite: Bool[Array, ""]) -> LossScale:
        """The scale after a step whose gradients were finite, or not."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= GROWTH_INTERVAL
        grown = jnp.where(grow, jnp.minimum(self.scale * 2, MAX_SCALE), self.scale)
        # Below 1 it would not be the scale that overflows: the run has diverged.
        scale = jnp.where(finite, grown, jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(grow, 0, good))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The step, the trainable tree and the optimizer's state, a pytree.

    Fields are not typed as arrays, because transforms put shapes or shardings in their places.
    """

    step: Any
    """int32 (): steps taken."""
    trainable: Any
    """An Adapter; or all parameters, in full fine-tuning."""
    opt_state: Any
    """The state of the optax optimizer."""
    loss_scale: Any = None
    """A LossScale; None unless the compute dtype is float16."""


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, *, fp16: bool = False
) -> TrainState:
    """The state before the first step."""
    loss_scale = LossScale(jnp.float32(INITIAL_SCALE), jnp.int32(0)) if fp16 else None
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), loss_scale)
