"""Batches of prepared rows: the batch of any step is a lookup.

A batch is a dict of arrays of shape (accum, B, T), the same in every step, int32 unless said
otherwise; the last batch of an epoch is filled up with rows of padding.

  input_ids     token ids
  labels        already shifted: ``labels[t]`` is the target at ``input_ids[t]``, -100 if there is
                none; for classification the label id, at the last token of each text
  positions     position in the document; starts at 0 in each
  segment_ids   number of the document in its row, from 1; 0 for padding. Its dtype is the smallest
                that holds the numbers of all rows (``packing.segment_dtype``)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jlora.data.examples import IGNORE
from jlora.data.order import PADDING_ROW, Order
from jlora.data.packing import PackedRows, positions, segment_dtype
from jlora.data.preparation import Prepared

HostBatch = dict[str, Shaped[np.ndarray, "accum batch length"]]


def batch_at(prepared: Prepared, order: Order, step: int, accum: int = 1) -> HostBatch:
    """The batch of a step (from 0): ``order.batch`` rows, reshaped to (accum, B, T).

    Raises:
      ValueError: the number of rows is not divisible by ``accum``.
    """
    if order.batch % accum:
        raise ValueError(f"{order.batch} rows are not divisible by {accum}")
    return gather_rows(prepared.packed, order.rows_at(step).reshape(accum, -1))


def gather_rows(packed: PackedRows, rows: np.ndarray) -> HostBatch:
    """The rows with these indices as a batch; PADDING_ROW gives a row of padding."""
    real = (rows != PADDING_ROW)[..., None]
    at = np.where(rows == PADDING_ROW, 0, rows)
    segment_ids = np.where(real, packed.segment_ids[at], 0)
    return {
        "input_ids": np.where(real, packed.input_ids[at], 0).astype(np.int32),
        "labels": np.where(real, packed.labels[at], IGNORE).astype(np.int32),
        "positions": positions(segment_ids),
        "segment_ids": segment_ids.astype(segment_dtype(packed.documents)),
    }


def eval_batches(prepared: Prepared, batch: int) -> Iterator[HostBatch]:
    """All rows once, in order, as batches (1, B, T); source weights are ignored."""
    order = Order(((len(prepared.packed), 1.0),), batch, shuffle=False)
    return prefetch(lambda step: batch_at(prepared, order, step), range(order.steps_per_epoch))


def prefetch(make: Callable[[int], Any], steps: Iterable[int], depth: int = 2) -> Iterator[Any]:
    """``make(step)`` for each step, computed in a thread, up to ``depth`` steps ahead.

    An exception in ``make`` is raised where its result would have been yielded.
    """
    # One thread: batches keep their order, and one at a time is copied to the devices.
    with ThreadPoolExecutor(1, "jlora-data") as pool:
        ahead: deque = deque()
        try:
            for step in steps:
                ahead.append(pool.submit(make, step))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
