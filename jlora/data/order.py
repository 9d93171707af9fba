"""The order of rows: a function of the seed and the step, without iterator state.

After e epochs a source of n rows and weight w has contributed ``ceil(e · w · n)`` rows: exactly w
times each row, within one row. They are taken from an endless sequence of passes over its rows,
each pass a permutation: with w = 2 an epoch has each row twice; with w = 0.5 consecutive epochs
have different halves. The rows of all sources are then shuffled by a permutation of the epoch. To
resume at step s is to ask for the rows of step s.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

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
        """Rows of all sources in the first epoch; with fractional weights others have fewer."""
        return int(_rows_of_epochs(self.sources, 1)[0])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in the first epoch; the last step of an epoch may be partly padding."""
        return -(-self.rows_per_epoch // self.batch)

    def mean_steps_per_epoch(self, epochs: float) -> Fraction:
        """The mean number of steps in an epoch of a run of ``epochs``, rounded up, epochs."""
        # Without an array of all epochs: a run of 10⁹ epochs, which max_steps ends, would need
        # gigabytes.
        if self._is_whole:
            return Fraction(self.steps_per_epoch)
        count = max(math.ceil(epochs), 1)
        return Fraction(int(_first_steps(self.sources, self.batch, count)[count]), count)

    @functools.cached_property
    def _is_whole(self) -> bool:
        """Every source has the same number of rows in all epochs."""
        return all(_rows_per_epoch(n, w).denominator == 1 for n, w in self.sources)

    def rows_at(self, step: int) -> Int64[np.ndarray, " batch"]:
        """The rows of a step (from 0); PADDING_ROW after the last row of an epoch."""
        epoch, k = self._epoch_at(step)
        rows = epoch_rows(self.sources, self.seed, self.shuffle, epoch)
        rows = rows[k * self.batch : (k + 1) * self.batch]
        return np.pad(rows, (0, self.batch - len(rows)), constant_values=PADDING_ROW)

    def _epoch_at(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step's number in it."""
        if self._is_whole:
            return divmod(step, self.steps_per_epoch)
        count = 16
        while (first := _first_steps(self.sources, self.batch, count))[-1] <= step:
            count *= 2
        epoch = int(np.searchsorted(first, step, "right")) - 1
        return epoch, step - int(first[epoch])


def _rows_per_epoch(rows: int, weight: float) -> Fraction:
    """The mean; weights are read as the decimals that they are written as, down to 10⁻⁶."""
    exact = Fraction(str(weight)).limit_denominator(1_000_000)
    return rows * max(exact, Fraction(1, 1_000_000))


def _rows_until(rows: int, weight: float, epochs: Any) -> Any:
    """The rows that a source contributes to this many epochs, an integer or an array of them."""
    # Rounded over all epochs: in each by itself, 6 rows of weight 0.25 would be 16 in eight epochs
    # instead of 12.
    mean = _rows_per_epoch(rows, weight)
    whole, rest = divmod(mean.numerator, mean.denominator)
    return epochs * whole - (-epochs * rest // mean.denominator)


def _rows_of_epochs(
    sources: tuple[tuple[int, float], ...], epochs: int
) -> Int64[np.ndarray, " epochs"]:
    """The rows of all sources in each of the first epochs."""
    until = np.arange(epochs + 1)
    return np.diff(sum(_rows_until(n, w, until) for n, w in sources))


@functools.lru_cache(maxsize=64)  # more than the doublings of _epoch_at
def _first_steps(
    sources: tuple[tuple[int, float], ...], batch: int, epochs: int
) -> Int64[np.ndarray, " epochs_plus_1"]:
    """The first step of each of the first epochs, and of the one after them."""
    steps = -(-_rows_of_epochs(sources, epochs) // batch)
    return np.concatenate([[0], np.cumsum(steps)]).astype(np.int64)


# Two: batches of the next epoch are prefetched while the last ones of this are used.
@functools.lru_cache(maxsize=2)
def epoch_rows(
    sources: tuple[tuple[int, float], ...], seed: int, shuffle: bool, epoch: int
) -> Int64[np.ndarray, " rows"]:
    """All rows of an epoch, in order; the array is cached and read-only."""
    # The draws below are a part of the format of checkpoints: with others, runs would not resume
    # exactly.
    parts, first = [], 0
    for number, (n, weight) in enumerate(sources):
        start, stop = (_rows_until(n, weight, e) for e in (epoch, epoch + 1))
        # NumPy ignores zeros at the end of a seed: without + 1, here and in `_from_passes`, a pass
        # would be the permutation of an epoch.
        parts.append(first + _from_passes(n, start, stop, (seed, number + 1) if shuffle else None))
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
