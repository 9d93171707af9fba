"""How many rows, steps and updates a run has, from its settings, its data and its devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import jax

from jlora.config import Config
from jlora.training.optim import frozen_kinds, warmup_steps

UPDATES_TO_REACH_ALL = 2
"""Updates by which every leaf has had a gradient: at first only B has one (it is zero, so A has
none), then A has one, too."""


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """The counts that follow from a run's settings, data and devices, and hold all through it."""

    rows_per_step: int
    eval_rows: int
    """Rows of an evaluation batch."""
    accumulation: int
    """Micro-batches of a step."""
    steps_per_epoch: float
    """The mean; a whole number unless sources have fractional weights."""
    total_steps: int
    fp16: bool
    """Computation is in float16: with loss scaling, and steps that may overflow."""
    all_learning_by: int
    """Updates by which every trainable leaf must have had a gradient."""
    frozen: tuple[str, ...] = ()
    """Kinds of trainable leaves that are frozen, such as ``lora_A`` in LoRA-FA."""

    @classmethod
    def of(
        cls,
        config: Config,
        mesh: jax.sharding.Mesh,
        steps_per_epoch: Callable[[int], int | Fraction],
    ) -> StepCounts:
        """The counts of a run; ``steps_per_epoch(rows_per_step)`` is the data's answer."""
        settings = config.train
        replicas = mesh.shape["data"] * mesh.shape["fsdp"]
        accumulation = settings.gradient_accumulation_steps
        rows = settings.per_device_train_batch_size * replicas * accumulation
        steps = steps_per_epoch(rows)
        total = settings.max_steps
        if total < 0:
            # Rounded first: 1.1 epochs of 50 steps are 55.00000000000001 in binary, which would be
            # 56 steps.
            total = math.ceil(round(settings.num_train_epochs * steps, 6))
        fp16 = config.compute_dtype == "float16"
        warm = warmup_steps(settings, total)
        # The first rate of a warm-up is zero, which delays A by one update. While the rates are
        # small, a tiny B may be zero in float16, and A then has no gradient.
        all_learning_by = UPDATES_TO_REACH_ALL + (warm > 0) + (warm if fp16 else 0)
        return cls(
            rows_per_step=rows,
            eval_rows=eval_batch_rows(config, mesh),
            accumulation=accumulation,
            steps_per_epoch=int(steps) if steps.denominator == 1 else float(steps),
            total_steps=total,
            fp16=fp16,
            all_learning_by=all_learning_by,
            frozen=frozen_kinds(settings),
        )


def eval_batch_rows(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Rows of an evaluation batch, over all devices."""
    settings = config.train
    per_device = settings.per_device_eval_batch_size or settings.per_device_train_batch_size
    return per_device * mesh.shape["data"] * mesh.shape["fsdp"]
