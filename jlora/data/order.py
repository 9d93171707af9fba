"""The order of rows: a function of the seed and the step, never an iterator's state.

Each source of n rows and weight w gives ``round(w · n)`` rows to an epoch. It deals them from an
endless sequence of passes over its rows, each pass a permutation, so that w = 2 shows each row
twice an epoch and w = 0.5 another half each epoch. What the sources give is then mixed by the
epoch's own permutation. Resuming at step s is asking for step s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

PADDING_ROW = -1
"""Stands for a row of padding, which fills up the last batch of an epoch."""


@dataclass(frozen=True)
class Order:
    """Which rows make up each step.

    Args:
      sources: (rows, weight) of each source; rows are numbered through, source after source.
      batch: rows a step, over all devices and accumulated micro-batches.
      seed: of every permutation.
      shuffle: False keeps the order of the files, and of the sources.
    """

    sources: tuple[tuple[int, float], ...]
    batch: int
    seed: int = 0
    shuffle: bool = True

    @property
    def rows_per_epoch(self) -> int:
        """Rows that all sources give to an epoch; a source gives at least one."""
        return sum(_given(n, w) for n, w in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        """Steps to an epoch; the last may be partial."""
        return -(-self.rows_per_epoch // self.batch)

    def rows_at(self, step: int) -> Int64[np.ndarray, " batch"]:
        """The rows of a step (0 is the first); PADDING_ROW where an epoch has run out."""
        epoch, k = divmod(step, self.steps_per_epoch)
        rows = epoch_rows(self.sources, self.seed, self.shuffle, epoch)
        rows = rows[k * self.batch : (k + 1) * self.batch]
        return np.pad(rows, (0, self.batch - len(rows)), constant_values=PADDING_ROW)


def _given(rows: int, weight: float) -> int:
    return max(1, round(rows * weight)) if rows else 0


@functools.lru_cache(maxsize=2)
def epoch_rows(
    sources: tuple[tuple[int, float], ...], seed: int, shuffle: bool, epoch: int
) -> Int64[np.ndarray, " rows"]:
    """All rows of an epoch in their order (read-only)."""
    parts, first = [], 0
    for number, (n, weight) in enumerate(sources):
        given = _given(n, weight)
        dealt = _deal(
            n, epoch * given, (epoch + 1) * given, (seed, number + 1) if shuffle else None
        )
        parts.append(first + dealt)
        first += n
    rows = np.concatenate(parts)
    if shuffle:
        rows = rows[np.random.default_rng((seed, epoch)).permutation(len(rows))]
    rows.setflags(write=False)
    return rows


def _deal(n: int, start: int, stop: int, seed: tuple[int, int] | None) -> np.ndarray:
    """Items [start, stop) of the endless sequence of passes over ``range(n)``."""
    if not n:
        return np.zeros(0, np.int64)
    first, last = start // n, -(-stop // n)
    whole = [
        np.arange(n) if seed is None else np.random.default_rng((*seed, p + 1)).permutation(n)
        for p in range(first, last)
    ]
    return np.concatenate(whole)[start - first * n : stop - first * n]
