"""Sequence packing: several examples share one row of fixed length.

The documents of a row are numbered 1, 2, … in ``segment_ids``; padding at the end has segment 0.
Tokens attend only within their segment and positions restart in each, so that a packed document is
computed as if it were alone in its row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from jlora.data.examples import IGNORE, Examples


@dataclass
class PackedRows:
    """Rows of equal length; padding has id 0, label -100 and segment 0."""

    input_ids: Int32[np.ndarray, "rows length"]
    labels: Int32[np.ndarray, "rows length"]
    segment_ids: Int32[np.ndarray, "rows length"]

    def __len__(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def documents(self) -> int:
        """The most documents in a row."""
        return int(self.segment_ids.max(initial=0))


def pack(
    examples: Examples, length: int, *, packing: bool = True, shuffle: bool = True
) -> PackedRows:
    """Rows of ``length`` tokens that hold every example exactly once.

    With ``shuffle``, examples are placed from the longest on, each into the fullest row with enough
    room (best-fit decreasing); without it, rows are filled in order (next-fit). With
    ``packing=False`` each row has one example.

    Raises:
      ValueError: an example is longer than ``length``.
    """
    lengths = examples.lengths
    if len(lengths) and lengths.max() > length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into {length}")
    if not packing:
        rows = np.arange(len(lengths))
    else:
        rows = best_fit(lengths, length) if shuffle else next_fit(lengths, length)
    return _fill(examples, rows, length)


def best_fit(lengths: Int64[np.ndarray, " n"], length: int) -> Int64[np.ndarray, " n"]:
    """The row of each example by best-fit decreasing.

    Bit s of the integer ``free`` is set if a row has s tokens left, so that the tightest fit is
    found by one bit scan instead of a search.
    """
    rows = np.zeros(len(lengths), np.int64)
    spaces: dict[int, list[int]] = {}
    free, used = 0, 0
    # Stable, so that the same rows are made wherever a run is resumed.
    for i in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[i])
        fitting = free >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            row = spaces[space].pop()
            if not spaces[space]:
                free ^= 1 << space
        else:
            space, row, used = length, used, used + 1
        rows[i] = row
        spaces.setdefault(space - need, []).append(row)
        free |= 1 << (space - need)
    return rows


def next_fit(lengths: Int64[np.ndarray, " n"], length: int) -> Int64[np.ndarray, " n"]:
    """The row of each example if rows are filled in order."""
    rows = np.zeros(len(lengths), np.int64)
    row, left = 0, length
    for i, need in enumerate(lengths.tolist()):
        if need > left:
            row, left = row + 1, length
        rows[i], left = row, left - need
    return rows


def _fill(examples: Examples, rows: Int64[np.ndarray, " n"], length: int) -> PackedRows:
    """Writes each example into its row, after the examples of smaller index."""
    shape = (int(rows.max()) + 1 if len(rows) else 0, length)
    packed = PackedRows(
        np.zeros(shape, np.int32), np.full(shape, IGNORE, np.int32), np.zeros(shape, np.int32)
    )
    filled, documents = [0] * shape[0], [0] * shape[0]
    for i, row in enumerate(rows.tolist()):
        ids, labels = examples[i]
        at = slice(filled[row], filled[row] + len(ids))
        filled[row], documents[row] = at.stop, documents[row] + 1
        packed.input_ids[row, at], packed.labels[row, at] = ids, labels
        packed.segment_ids[row, at] = documents[row]
    return packed


def segment_dtype(documents: int) -> np.dtype:
    """The dtype of a batch's segment ids if its rows have up to so many documents.

    The training step is compiled for it, and attention chooses its kernel by it: booleans mean
    that every row is one document, padded at its end, and uint8 that it has at most 255.
    """
    return np.dtype(bool if documents <= 1 else np.uint8 if documents <= 255 else np.int32)


def positions(segment_ids: Int32[np.ndarray, "*rows length"]) -> Int32[np.ndarray, "*rows length"]:
    """The position of each token in its document: 0, 1, …, restarting where the segment changes."""
    at = np.arange(segment_ids.shape[-1], dtype=np.int32)
    begins = np.ones(segment_ids.shape, bool)
    begins[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    starts = np.maximum.accumulate(np.where(begins, at, 0), axis=-1)
    return np.where(segment_ids > 0, at - starts, 0).astype(np.int32)
