"""The order of rows: a function of the seed and the step, without iterator state.

A source of n rows and weight w contributes ``round(w · n)`` rows to each epoch. They are taken
from an endless sequence of passes over its rows, each pass a permutation: with w = 2 an epoch has
each row twice; with w = 0.5 consecutive epochs have different halves. The rows of all sources are
then shuffled by a permutation of the epoch. To resume at step s is to ask for the rows of step s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

PADDING_ROW = -1
"""Index of a row of padding, which fills up the last batch of an epoch."""


@dataclass(frozen=True)
class Order:
    """Maps a step to the rows of its batch.

    Args:
      sources: (number of rows, weight) of each source; rows are numbered across sources.
      batch: rows per step, over all devices and micro-batches.
      seed: seed of all permutations.
      shuffle: False keeps the order of files and sources.
    """

    sources: tuple[tuple[int, float], ...]
    batch: int
    seed: int = 0
    shuffle: bool = True

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources in an epoch; at least one of each source."""
        return sum(_rows_in_epoch(n, w) for n, w in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch; the last one may be partly padding."""
        return -(-self.rows_per_epoch // self.batch)

    def rows_at(self, step: int) -> Int64[np.ndarray, " batch"]:
        """The rows of a step (from 0); PADDING_ROW after the last row of an epoch."""
        epoch, k = divmod(step, self.steps_per_epoch)
        rows = epoch_rows(self.sources, self.seed, self.shuffle, epoch)
        rows = rows[k * self.batch : (k + 1) * self.batch]
        return np.pad(rows, (0, self.batch - len(rows)), constant_values=PADDING_ROW)


def _rows_in_epoch(rows: int, weight: float) -> int:
    return max(1, round(rows * weight)) if rows else 0


# Two, since batches of the next epoch are prefetched while the last ones of this are used.
@functools.lru_cache(maxsize=2)
def epoch_rows(
    sources: tuple[tuple[int, float], ...], seed: int, shuffle: bool, epoch: int
) -> Int64[np.ndarray, " rows"]:
    """All rows of an epoch, in order; the array is cached and read-only."""
    parts, first = [], 0
    for number, (n, weight) in enumerate(sources):
        count = _rows_in_epoch(n, weight)
        # NumPy ignores zeros at the end of a seed: without + 1, here and in `_from_passes`, a pass
        # would be the same permutation as an epoch's.
        rows = _from_passes(
            n, epoch * count, (epoch + 1) * count, (seed, number + 1) if shuffle else None
        )
        parts.append(first + rows)
        first += n
    rows = np.concatenate(parts)
    if shuffle:
        rows = rows[np.random.default_rng((seed, epoch)).permutation(len(rows))]
    rows.setflags(write=False)
    return rows


def _from_passes(n: int, start: int, stop: int, seed: tuple[int, int] | None) -> np.ndarray:
    """Items [start, stop) of the endless sequence of passes over ``range(n)``."""
    if not n:
        return np.zeros(0, np.int64)
    first, last = start // n, -(-stop // n)
    whole = [
        np.arange(n) if seed is None else np.random.default_rng((*seed, p + 1)).permutation(n)
        for p in range(first, last)
    ]
    return np.concatenate(whole)[start - first * n : stop - first * n]
