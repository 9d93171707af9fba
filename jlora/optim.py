"""Optimizers and learning-rate schedules from the settings, as optax transformations.

Names, defaults and formulas are transformers' (``TrainingArguments``, ``optimization.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.config import TrainConfig

NO_DECAY = ("bias", "scale")
"""Leaf names that weight decay leaves alone: biases and norm scales, as transformers does."""


def make_optimizer(
    config: TrainConfig, total_steps: int, trainable: Any
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer, weight decay off for biases and norms.

    Args:
      config: the ``train`` section.
      total_steps: optimizer steps of the whole run; the schedule ends there.
      trainable: the tree to be trained (or its shapes), which decides the groups.
    """
    rate = schedule(config, total_steps)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "decay": OPTIMIZERS[config.optim](config, rate, config.weight_decay),
        "no_decay": OPTIMIZERS[config.optim](config, rate, 0.0),
    }
    clip = (
        optax.clip_by_global_norm(config.max_grad_norm)
        if config.max_grad_norm
        else optax.identity()
    )
    return optax.chain(clip, optax.partition(groups, decay_groups(trainable)))


def decay_groups(trainable: Any) -> Any:
    """The tree with ``"decay"`` or ``"no_decay"`` in place of every leaf."""

    def label(path, _):
        name = str(getattr(path[-1], "key", path[-1]))
        return "no_decay" if name in NO_DECAY else "decay"

    return jax.tree_util.tree_map_with_path(label, trainable)


def _adamw(config: TrainConfig, rate: optax.Schedule, decay: float):
    b1, b2 = config.adam_beta1, config.adam_beta2
    return optax.adamw(rate, b1=b1, b2=b2, eps=config.adam_epsilon, weight_decay=decay)


def _lion(config: TrainConfig, rate: optax.Schedule, decay: float):
    return optax.lion(rate, b1=config.adam_beta1, b2=config.adam_beta2, weight_decay=decay)


def _sgd(config: TrainConfig, rate: optax.Schedule, decay: float):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


def _adafactor(config: TrainConfig, rate: optax.Schedule, decay: float):
    # Without a rate of its own, so that the decay is scaled by it too, as transformers does.
    scaled = optax.adafactor(None, multiply_by_parameter_scale=False, clipping_threshold=1.0)
    decayed = optax.chain(optax.scale(-1.0), optax.add_decayed_weights(decay))
    return optax.chain(scaled, decayed, optax.scale_by_learning_rate(rate))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
    "adafactor": _adafactor,
}


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """``warmup_steps`` when it is given, else ``warmup_ratio`` of the run, rounded up."""
    return config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)


def schedule(config: TrainConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of step 0, 1, … as a function of the step: warm-up, then decay."""
    warm = warmup_steps(config, total_steps)
    decay = SCHEDULES[config.lr_scheduler_type]
    kwargs = dict(config.lr_scheduler_kwargs)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warm) / max(1, total_steps - warm), 0.0, 1.0)
        rising = step / max(1, warm)
        factor = decay(config, step, progress, warm, **kwargs)
        if config.lr_scheduler_type == "constant":
            return jnp.asarray(config.learning_rate, jnp.float32)
        return config.learning_rate * jnp.where(step < warm, rising, factor)

    return rate


def _constant(config, step, progress, warm):
    return jnp.ones_like(progress)


def _linear(config, step, progress, warm):
    return 1.0 - progress


def _cosine(config, step, progress, warm, num_cycles: float = 0.5):
    return jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(2 * math.pi * num_cycles * progress)))


def _cosine_with_min_lr(config, step, progress, warm, min_lr=None, min_lr_rate=0.0, num_cycles=0.5):
    floor = min_lr_rate if min_lr is None else min_lr / config.learning_rate
    return floor + (1.0 - floor) * _cosine(config, step, progress, warm, num_cycles)


def _polynomial(config, step, progress, warm, lr_end: float = 1e-7, power: float = 1.0):
    end = lr_end / config.learning_rate
    return end + (1.0 - end) * (1.0 - progress) ** power


def _inverse_sqrt(config, step, progress, warm, timescale: float | None = None):
    timescale = timescale or warm or 10_000
    return 1.0 / jnp.sqrt((step + timescale - warm) / timescale)


SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
}
