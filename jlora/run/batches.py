"""Batches on the devices: every process makes a whole batch and keeps the part that it owns.

Whether the rows fit the model, and are the same in all processes, is checked before the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora import data
from jlora.config import Config
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError
from jlora.run.job import Job
from jlora.run.progress import Plan

Batch = dict[str, jax.Array]


def prepare(config: Config, tokenizer: Any, role: Literal["train", "eval"]) -> data.Prepared:
    """The rows of ``data.train`` or ``data.eval``, tokenized and packed."""
    sources, names = getattr(config.data, role), config.model.id2label or ()
    return data.prepare(sources, tokenizer, config.data, role, id2label=names)


def parts(rows: data.Prepared, adapters: Sequence[str]) -> list[data.Prepared]:
    """The rows of each of several adapters that are trained together; else all rows."""
    return [rows.of(adapter) for adapter in adapters] or [rows]


def plan_of(config: Config, mesh: jax.sharding.Mesh, rows: data.Prepared) -> Plan:
    """The numbers of a run on these rows; of several adapters the longest epoch counts."""
    own = parts(rows, config.adapters)
    return Plan.of(config, mesh, lambda n: max(p.order(n, 0).steps_per_epoch for p in own))


def batch_at(
    mesh: jax.sharding.Mesh, rows: data.Prepared, order: data.Order, accumulation: int
) -> Callable[[int], Batch]:
    """Step → its batch (accumulation, B, T), rows split over the mesh's ``data`` and ``fsdp``."""
    target = sharding.batch_sharding(mesh)

    def at(step: int) -> Batch:
        batch = data.batch_at(rows, order, step, accumulation)
        return {name: sharding.place(array, target) for name, array in batch.items()}

    return at


def batches_at(
    mesh: jax.sharding.Mesh,
    parts: Sequence[tuple[data.Prepared, data.Order]],
    accumulation: int,
) -> Callable[[int], Batch]:
    """``batch_at`` of several adapters, each with its rows: (adapters, accumulation, B, T)."""
    target = sharding.batch_sharding(mesh, multi_adapter=True)

    def at(step: int) -> Batch:
        each = [data.batch_at(rows, order, step, accumulation) for rows, order in parts]
        return {
            name: sharding.place(np.stack([one[name] for one in each]), target) for name in each[0]
        }

    return at


def check_fit(job: Job, rows: data.Prepared) -> None:
    """Raises when rows hold ids that the model has no embedding for, or are too long for it."""
    largest, size = int(rows.packed.input_ids.max()), job.model.config.vocab_size
    if largest >= size:
        raise DataError(
            f"the tokenizer makes token {largest}, but the model has {size} embeddings",
            where=job.config.model.name_or_path,
            fix="use the tokenizer that belongs to the model",
        )
    limit = job.model.config.position_limit
    if limit is not None and rows.length > limit:
        raise ConfigError(
            f"{rows.length} tokens in a row, but the model has {limit} positions",
            where="data.max_length",
            fix=f"set it to {limit} or less",
        )


def check_same(rows: data.Prepared, what: str) -> None:
    """Raises DataError when the processes of a run have read different rows."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(bytes.fromhex(rows.fingerprint), np.uint8)
    everyone = multihost_utils.process_allgather(digest)
    others = [i for i, one in enumerate(everyone) if not np.array_equal(one, everyone[0])]
    if others:
        raise DataError(
            f"processes {', '.join(map(str, others))} have read other rows than process 0",
            where=what,
            fix="give every host the same files and the same settings",
        )


def eval_batches(mesh: jax.sharding.Mesh, rows: data.Prepared, size: int) -> Iterator[Batch]:
    """All held-out rows in batches (B, T) of one shape, the last one filled up with padding."""
    spec = jax.sharding.PartitionSpec(*sharding.batch_sharding(mesh).spec[1:])
    target = jax.sharding.NamedSharding(mesh, spec)
    for batch in data.eval_batches(rows, size):
        yield {name: sharding.place(array[0], target) for name, array in batch.items()}
