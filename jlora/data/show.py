"""Renders a batch as text with its targets highlighted, for ``--show-batch``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from jlora.data.examples import IGNORE

TARGET_STYLE = "bold green"
CONTEXT_STYLE = "dim"


def show_batch(
    batch: Mapping[str, np.ndarray],
    tokenizer: Any,
    max_rows: int = 8,
    id2label: Sequence[str] = (),
) -> Text:
    """The documents of the first rows of a batch, targets in green, other tokens dim.

    With ``id2label`` (classification), the heading of each document has its class.
    """
    length = batch["input_ids"].shape[-1]
    ids, labels, segments = (
        np.asarray(batch[k]).reshape(-1, length) for k in ("input_ids", "labels", "segment_ids")
    )
    text = Text()
    for row in range(min(len(ids), max_rows)):
        for segment in range(1, int(segments[row].max(initial=0)) + 1):
            at = segments[row] == segment
            head = f"row {row + 1}, document {segment}: {at.sum()} tokens, "
            if id2label:
                what, runs = id2label[labels[row][at][-1]], [(False, ids[row][at].tolist())]
            else:
                what = f"{(labels[row][at] != IGNORE).sum()} targets"
                runs = target_runs(ids[row][at], labels[row][at])
            text.append(f"── {head}{what} ──\n", "bold")
            for target, run in runs:
                text.append(tokenizer.decode(run), TARGET_STYLE if target else CONTEXT_STYLE)
            text.append("\n")
    return text


def target_runs(ids: np.ndarray, labels: np.ndarray) -> list[tuple[bool, list[int]]]:
    """A document as runs of (is target, token ids), including the target of its last token."""
    tokens, learned = ids.tolist(), [False, *(labels != IGNORE).tolist()]
    tokens.append(int(labels[-1]))
    if not learned[-1]:
        tokens, learned = tokens[:-1], learned[:-1]
    pairs = zip(learned, tokens, strict=True)
    return [(target, [t for _, t in run]) for target, run in groupby(pairs, lambda p: p[0])]
