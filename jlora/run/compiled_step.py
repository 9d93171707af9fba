"""The training step of a run as a program: the same whether arrays are there or only described."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.distributed import sharding
from jlora.distributed.mesh import compiler_options
from jlora.run.job import Job
from jlora.run.progress import Plan
from jlora.training.optim import make_optimizer
from jlora.training.state import init_state
from jlora.training.step import make_train_step

NAMES = ("input_ids", "labels", "positions", "segment_ids")
"""The arrays of a batch."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's step, and what it is compiled for.

    ``step`` and ``start`` are jitted; ``state`` and ``batch`` are shapes that know where they lie.
    """

    job: Job
    step: Callable[[Any, Any, Any], Any]
    """(state, frozen, batch) → (state, metrics)."""
    start: Callable[[Any], Any]
    """What is trained → the state before the first step, each leaf where it belongs. The state
    takes the place of what is given: there is no second copy while the run trains."""
    state: Any
    batch: Any

    @classmethod
    def of(cls, job: Job, plan: Plan, length: int) -> Program:
        """The step of ``job``, which may be described, on rows of ``length`` tokens."""
        settings, mesh = job.config.train, job.mesh
        optimizer = make_optimizer(settings, plan.total_steps, job.trainable)
        start = functools.partial(init_state, optimizer=optimizer, fp16=plan.fp16)
        start = jax.vmap(start) if job.adapters else start
        state = sharding.abstract_arrays(sharding.output_types(start, job.trainable), mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(
            job.model,
            job.bind,
            optimizer,
            seed=settings.seed,
            state_shardings=places,
            multi_adapter=bool(job.adapters),
            compiler_options=compiler_options(mesh),
        )
        start = jax.jit(start, out_shardings=places, donate_argnums=0)
        return cls(job, step, start, state, _batch(job, plan, length))

    @property
    def best(self) -> Any:
        """The tree that early stopping keeps beside the state, as shapes; None without it."""
        return self.state.trainable if self.job.config.train.early_stopping_patience else None

    def compile(self) -> jax.stages.Compiled:
        """The executable of the step."""
        with jax.set_mesh(self.job.mesh):
            return self.step.lower(self.state, self.job.frozen, self.batch).compile()  # pyright: ignore


def _batch(job: Job, plan: Plan, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What ``batches`` makes for every step: (adapters, accumulation, B, T) without the first."""
    shape = (plan.accumulation, plan.rows_per_step // plan.accumulation, length)
    at = sharding.batch_sharding(job.mesh, multi_adapter=bool(job.adapters))
    several = (len(job.adapters),) if job.adapters else ()
    like = jax.ShapeDtypeStruct((*several, *shape), jnp.int32, sharding=at)
    return dict.fromkeys(NAMES, like)
