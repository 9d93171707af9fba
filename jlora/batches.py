"""Batches on the devices: every process makes a whole batch and keeps the part that it owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora import data, sharding
from jlora.errors import DataError

Batch = dict[str, jax.Array]


def batch_at(
    mesh: jax.sharding.Mesh, rows: data.Prepared, order: data.Order, accumulation: int
) -> Callable[[int], Batch]:
    """Step → its batch (accumulation, B, T), rows split over the mesh's ``data`` and ``fsdp``."""
    target = sharding.batch_sharding(mesh)

    def at(step: int) -> Batch:
        batch = data.batch_at(rows, order, step, accumulation)
        return {name: sharding.place(array, target) for name, array in batch.items()}

    return at


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
