"""What a run carries from step to step: nothing of the frozen base is in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

MAX_SCALE = 2.0**24
GROWTH_INTERVAL = 2000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16, by the rules of torch's GradScaler.

    The scale doubles after 2000 good steps in a row and halves on one that overflows, which is
    skipped. Unlike torch's it stays between 1 and 2**24.
    """

    scale: Any
    """float32 ()"""
    good_steps: Any
    """int32 ()"""

    def updated(self, finite: Bool[Array, ""]) -> LossScale:
        """The scale after a step whose gradients were finite, or not."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= GROWTH_INTERVAL
        grown = jnp.where(grow, jnp.minimum(self.scale * 2, MAX_SCALE), self.scale)
        scale = jnp.where(finite, grown, jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(grow, 0, good))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Optimizer steps taken, the trainable tree (an Adapter, or all parameters), optax's state.

    Fields are not typed as arrays: transforms put shapes or shardings in their places.
    """

    step: Any
    """int32 ()"""
    trainable: Any
    opt_state: Any
    loss_scale: Any = None
    """LossScale, or None when nothing is computed in float16."""


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, *, fp16: bool = False
) -> TrainState:
    """The state before the first step."""
    loss_scale = LossScale(jnp.float32(2.0**16), jnp.int32(0)) if fp16 else None
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), loss_scale)
