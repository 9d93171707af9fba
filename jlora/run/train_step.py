"""A training step with everything it is compiled for; the same for real and abstract jobs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.data.packing import segment_dtype
from jlora.distributed import sharding
from jlora.distributed.mesh import compiler_options
from jlora.run.job import Job
from jlora.run.step_counts import StepCounts
from jlora.training.optim import make_optimizer
from jlora.training.state import init_state
from jlora.training.step import make_train_step

INT32_ARRAYS = ("input_ids", "labels", "positions")


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A run's jitted training step, with the shapes and shardings that it is compiled for."""

    job: Job
    step: Callable[[Any, Any, Any], Any]
    """Jitted: (state, frozen, batch) → (state, metrics)."""
    init_state: Callable[[Any], Any]
    """Jitted: what is trained → the state before the first step. Its argument is donated to the
    state: a second copy of what is trained would stay on the devices for the whole run."""
    state: Any
    """The TrainState as ``jax.ShapeDtypeStruct``."""
    batch: Any
    """A step's batch as ``jax.ShapeDtypeStruct``."""

    @classmethod
    def of(cls, job: Job, counts: StepCounts, length: int, documents: int) -> TrainStep:
        """The step of ``job``, which may be abstract.

        Args:
          job: what is trained.
          counts: rows per step, and steps.
          length: tokens in a row.
          documents: the most documents in a row, which decides the dtype of ``segment_ids``.
        """
        settings, mesh = job.config.train, job.mesh
        optimizer = make_optimizer(settings, counts.total_steps, job.trainable)
        init = functools.partial(init_state, optimizer=optimizer, fp16=counts.fp16)
        init = jax.vmap(init) if job.adapters else init
        # Not jax.eval_shape, which forgets that paged moments are in host memory.
        state = sharding.abstract_arrays(sharding.output_types(init, job.trainable), mesh)
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(
            job.model,
            job.bind,
            optimizer,
            seed=settings.seed,
            state_shardings=state_shardings,
            multi_adapter=bool(job.adapters),
            compiler_options=compiler_options(mesh, full_determinism=settings.full_determinism),
        )
        init = jax.jit(init, out_shardings=state_shardings, donate_argnums=0)
        return cls(job, step, init, state, _abstract_batch(job, counts, length, documents))

    @property
    def best(self) -> Any:
        """The tree that early stopping holds beside the state, as shapes; None without it."""
        return self.state.trainable if self.job.config.train.early_stopping_patience else None

    def compile(self) -> jax.stages.Compiled:
        """The executable of the step."""
        with jax.set_mesh(self.job.mesh):
            return self.step.lower(self.state, self.job.frozen, self.batch).compile()  # pyright: ignore


def _abstract_batch(
    job: Job, counts: StepCounts, length: int, documents: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays (accumulation, B, T), in a multi-adapter run with a leading axis of adapters."""
    rows = counts.rows_per_step // counts.accumulation
    adapters = (len(job.adapters),) if job.adapters else ()
    array = functools.partial(
        jax.ShapeDtypeStruct,
        (*adapters, counts.accumulation, rows, length),
        sharding=sharding.batch_sharding(job.mesh, multi_adapter=bool(job.adapters)),
    )
    batch = dict.fromkeys(INT32_ARRAYS, array(jnp.int32))
    return batch | {"segment_ids": array(segment_dtype(documents))}
