"""Learning-rate schedules, from the settings.

Names, defaults and formulas are transformers' (``TrainingArguments``, ``optimization.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jlora.config import TrainConfig
from jlora.errors import ConfigError

MOST_STEPS = 10_000_000
"""The table of their learning rates is a constant in the step's program: 40 MB."""


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """``warmup_steps`` if it is set, else ``warmup_ratio`` of the run, rounded up."""
    return config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)


def schedule(config: TrainConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the step, from 0: ``rates`` at it."""
    table = rates(config, total_steps)
    if config.lr_scheduler_type == "constant":
        # Without the table, runs of any length have the same program.
        return lambda step: jnp.asarray(table[0])
    return lambda step: jnp.asarray(table)[jnp.asarray(step, jnp.int32)]


def rates(config: TrainConfig, total_steps: int) -> Float32[np.ndarray, " steps"]:
    """The learning rate of each step, from 0 to ``total_steps``: warm-up, then decay.

    Raises ConfigError for more than ``MOST_STEPS``.

    A table, so that the log has the optimizer's rate to the bit, and without a device. The formula
    in a compiled program differs in its last bits from one program to another.
    """
    if total_steps > MOST_STEPS:
        steps = f"{total_steps:,} steps, at most {MOST_STEPS:,} are possible"
        fix = "set it to the steps that are wanted: warm-up and decay depend on it"
        raise ConfigError(steps, where="train.max_steps", fix=fix)
    warm = warmup_steps(config, total_steps)
    if config.lr_scheduler_type == "constant":
        # As in transformers, it has no warm-up, even with warmup_steps.
        return np.full(total_steps + 1, config.learning_rate, np.float32)
    step = np.arange(total_steps + 1, dtype=np.float64)
    progress = np.clip((step - warm) / max(1, total_steps - warm), 0.0, 1.0)
    # From 0: the first step of a warm-up changes nothing, as in transformers.
    factor = step / max(1, warm)
    decaying = step >= warm
    decay = SCHEDULES[config.lr_scheduler_type]
    kwargs = dict(config.lr_scheduler_kwargs)
    factor[decaying] = decay(config, step[decaying], progress[decaying], warm, **kwargs)
    return (config.learning_rate * factor).astype(np.float32)


def _constant(config, step, progress, warm):
    return np.ones_like(progress)


def _linear(config, step, progress, warm):
    return 1.0 - progress


def _cosine(config, step, progress, warm, num_cycles: float = 0.5):
    return np.maximum(0.0, 0.5 * (1.0 + np.cos(2 * math.pi * num_cycles * progress)))


def _cosine_with_min_lr(config, step, progress, warm, min_lr=None, min_lr_rate=0.0, num_cycles=0.5):
    floor = min_lr_rate if min_lr is None else min_lr / config.learning_rate
    return floor + (1.0 - floor) * _cosine(config, step, progress, warm, num_cycles)


def _polynomial(config, step, progress, warm, lr_end: float = 1e-7, power: float = 1.0):
    end = lr_end / config.learning_rate
    return end + (1.0 - end) * (1.0 - progress) ** power


def _inverse_sqrt(config, step, progress, warm, timescale: float | None = None):
    timescale = timescale or warm or 10_000
    return 1.0 / np.sqrt((step + timescale - warm) / timescale)


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "constant_with_warmup": _constant,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
}
