"""Batches on the devices: each process makes the whole batch and places the part it owns.

Before the first one it is checked that the rows fit the model and are the same in all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora import data
from jlora.config import Config
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError
from jlora.run.job import Job
from jlora.run.step_counts import StepCounts

DeviceBatch = dict[str, jax.Array]


def prepare_rows(config: Config, tokenizer: Any, role: Literal["train", "eval"]) -> data.Prepared:
    """The rows of ``data.train`` or ``data.eval``, tokenized and packed."""
    sources, names = getattr(config.data, role), config.model.id2label or ()
    return data.prepare(sources, tokenizer, config.data, role, id2label=names)


def rows_per_adapter(rows: data.Prepared, adapters: Sequence[str]) -> list[data.Prepared]:
    """The rows of each adapter of a multi-adapter run; else all rows, as the only entry."""
    return [rows.for_adapter(adapter) for adapter in adapters] or [rows]


def count_steps(config: Config, mesh: jax.sharding.Mesh, rows: data.Prepared) -> StepCounts:
    """The counts of a run on these rows; in a multi-adapter run the longest epoch counts."""
    return StepCounts.of(config, mesh, lambda n: steps_per_epoch(config, rows, n))


def steps_per_epoch(config: Config, rows: data.Prepared, rows_per_step: int) -> Fraction:
    """The mean number of steps in an epoch; in a multi-adapter run that of the longest."""
    orders = (p.order(rows_per_step, 0) for p in rows_per_adapter(rows, config.adapters))
    return max(order.mean_steps_per_epoch(config.train.num_train_epochs) for order in orders)


def make_batch_at(
    mesh: jax.sharding.Mesh, rows: data.Prepared, order: data.Order, accumulation: int
) -> Callable[[int], DeviceBatch]:
    """Step → its batch (accumulation, B, T), with B split over ``data`` and ``fsdp``."""
    target = sharding.batch_sharding(mesh)

    def batch_at(step: int) -> DeviceBatch:
        batch = data.batch_at(rows, order, step, accumulation)
        return {name: sharding.place(array, target) for name, array in batch.items()}

    return batch_at


def make_multi_adapter_batch_at(
    mesh: jax.sharding.Mesh,
    parts: Sequence[tuple[data.Prepared, data.Order]],
    accumulation: int,
) -> Callable[[int], DeviceBatch]:
    """Step → the batches of all adapters, each of its own rows: (adapters, accumulation, B, T)."""
    target = sharding.batch_sharding(mesh, multi_adapter=True)

    def batch_at(step: int) -> DeviceBatch:
        batches = [data.batch_at(rows, order, step, accumulation) for rows, order in parts]
        return {
            name: sharding.place(np.stack([batch[name] for batch in batches]), target)
            for name in batches[0]
        }

    return batch_at


def eval_device_batches(
    mesh: jax.sharding.Mesh, rows: data.Prepared, size: int
) -> Iterator[DeviceBatch]:
    """All held-out rows in batches (B, T) of one shape, the last one filled up with padding."""
    spec = jax.sharding.PartitionSpec(*sharding.batch_sharding(mesh).spec[1:])
    target = jax.sharding.NamedSharding(mesh, spec)
    for batch in data.eval_batches(rows, size):
        yield {name: sharding.place(array[0], target) for name, array in batch.items()}


def check_rows_fit(job: Job, rows: data.Prepared) -> None:
    """Raises if rows hold tokens that the model has no embedding for, or are too long for it."""
    packed, size = rows.packed, job.model.config.vocab_size
    # Under jit the look-up of such a token is no error: it gives NaN, or another row of a quantized
    # table.
    largest = max(int(packed.input_ids.max()), int(packed.labels.max()))
    if largest >= size:
        raise DataError(
            f"the tokenizer makes token {largest}, but the model has {size} embeddings",
            where=rows.largest_token_where or job.config.model.name_or_path,
            fix="use the tokenizer that belongs to the model, or name the tokens that the model "
            "lacks in model.new_tokens",
        )
    limit = job.model.config.position_limit
    if limit is not None and rows.length > limit:
        raise ConfigError(
            f"{rows.length} tokens in a row, but the model has {limit} positions",
            where="data.max_length",
            fix=f"set it to {limit} or less",
        )


def check_same_rows(rows: data.Prepared, key: str) -> None:
    """Raises DataError, naming the setting ``key``, if processes of a run read different rows."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(bytes.fromhex(rows.fingerprint), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    different = [i for i, other in enumerate(digests) if not np.array_equal(other, digests[0])]
    if different:
        raise DataError(
            f"processes {', '.join(map(str, different))} have read other rows than process 0",
            where=key,
            fix="give every host the same files and the same settings",
        )
