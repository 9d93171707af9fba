"""Rows to examples: token ids and labels.

A row is tokenized to one sequence with a mask of its training targets; the example is the sequence
up to its last target, with labels already shifted::

    tokens   <s> 5 6 | 7 8 </s>      (targets: 7 8 </s>)
    ids      <s> 5 6 7 8
    labels   -100 -100 7 8 </s>      labels[t] is the token that follows ids[t]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jlora.data.chat import ChatRenderer
from jlora.data.rows import Chat, Completion, Text
from jlora.data.tokenizer import bos_prefix, eos_suffix, token_ids
from jlora.errors import DataError

IGNORE = -100
"""The label of a token that is no training target (PyTorch's ``ignore_index``)."""

ROWS_PER_CALL = 512
"""Rows per call of the tokenizer, which tokenizes the texts of a call in parallel."""


class Piece(NamedTuple):
    """A text to tokenize.

    ``spans`` are the character ranges of the targets, None for the whole text. ``add_bos_eos`` adds
    the tokenizer's bos and eos; ``cut`` cuts a long text into windows instead of truncating it.
    """

    where: str
    text: str
    spans: tuple[tuple[int, int], ...] | None
    add_bos_eos: bool = False
    cut: bool = False


@dataclass
class Examples:
    """Concatenated examples: example i is ``[starts[i]:starts[i + 1]]`` of both arrays."""

    ids: Int32[np.ndarray, " tokens"]
    labels: Int32[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " examples_plus_1"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """The number of tokens of each example."""
        return np.diff(self.starts)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        at = slice(self.starts[i], self.starts[i + 1])
        return self.ids[at], self.labels[at]


@dataclass
class Counts:
    """How many rows of a source were changed or dropped."""

    truncated: int = 0
    """Rows longer than ``max_length``, truncated at the right; texts are cut into windows."""
    dropped: int = 0
    """Examples dropped because none of their tokens is a target."""
    split: int = 0
    """Chats that became one example per reply (see ``chat``)."""
    lossy: int = 0
    """Chats whose replies the template renders only in part."""
    bad: list[DataError] = field(default_factory=list)
    """Rows that the chat template refuses, or whose label is none of the classes."""


def encode(
    rows: Sequence[Chat | Completion | Text],
    tokenizer: Any,
    max_length: int,
    assistant_only_loss: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Examples, Counts]:
    """Tokenizes rows into examples of at most ``max_length`` tokens, in row order.

    Chats and completions are truncated at the right; texts are cut into consecutive windows
    without losing a target. ``progress(done, total)`` is called after each chunk of rows.
    """
    counts, streams = Counts(), []
    for at in range(0, len(rows), ROWS_PER_CALL):
        found = list(pieces(rows[at : at + ROWS_PER_CALL], tokenizer, counts))
        for piece, (ids, mask) in zip(found, tokenize(found, tokenizer), strict=True):
            mask = mask if assistant_only_loss else np.ones_like(mask)
            streams.extend(_windows(ids, mask, piece, max_length, counts))
        if progress:
            progress(min(at + ROWS_PER_CALL, len(rows)), len(rows))
    return concatenate_examples(streams), counts


def concatenate_examples(streams: list[tuple[np.ndarray, np.ndarray]]) -> Examples:
    """Concatenates the (ids, labels) of examples."""
    starts = np.zeros(len(streams) + 1, np.int64)
    np.cumsum([len(ids) for ids, _ in streams], out=starts[1:])
    none = np.zeros(0, np.int32)
    ids = np.concatenate([none, *(ids for ids, _ in streams)])
    return Examples(ids, np.concatenate([none, *(labels for _, labels in streams)]), starts)


def pieces(
    rows: Iterable[Chat | Completion | Text], tokenizer: Any, counts: Counts
) -> Iterator[Piece]:
    """The texts of rows; chats that the template refuses go to ``counts.bad``."""
    render = ChatRenderer(tokenizer) if tokenizer.chat_template else None
    for row in rows:
        if isinstance(row, Text):
            yield Piece(row.where, row.text, None, add_bos_eos=True, cut=True)
        elif isinstance(row, Completion):
            yield _completion(row.where, row.prompt, row.completion)
        elif render is None:
            if row.plain is None:
                fix = "set data.chat_template"
                raise DataError("the tokenizer has no chat template", where=row.where, fix=fix)
            yield _completion(row.where, *row.plain)
        else:
            yield from _chat(row, render, counts)


def _completion(where: str, prompt: str, completion: str) -> Piece:
    text = prompt + completion
    return Piece(where, text, ((len(prompt), len(text)),), add_bos_eos=True)


def _chat(row: Chat, render: ChatRenderer, counts: Counts) -> Iterator[Piece]:
    try:
        texts = render(row)
    except DataError as e:
        counts.bad.append(e)
        return
    counts.split += len(texts) > 1
    counts.lossy += any(t.lossy for t in texts)
    for rendered in texts:
        yield Piece(row.where, rendered.text, rendered.spans)


Stream = tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]


def tokenize(found: Sequence[Piece], tokenizer: Any) -> Iterator[Stream]:
    """(ids, target mask) of each piece.

    Special tokens are added by ``add_bos_eos`` alone, never by the tokenizer: a rendered template
    has its own. A token is a target if any of its characters is in a span.
    """
    if not found:
        return
    before, after = bos_prefix(tokenizer), eos_suffix(tokenizer)
    offsets = [None] * len(found)
    if tokenizer.is_fast:
        texts = [p.text for p in found]
        batch = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        encoded, offsets = batch["input_ids"], batch["offset_mapping"]
    else:
        encoded = [None] * len(found)
    for piece, ids, where in zip(found, encoded, offsets, strict=True):
        mask = None if where is None else target_mask(np.asarray(where).reshape(-1, 2), piece)
        ids, mask = encode_by_spans(piece, tokenizer) if mask is None else (ids, mask)
        ids = np.asarray(ids, np.int32)
        if piece.add_bos_eos:
            ids = np.concatenate([before, ids, after]).astype(np.int32)
            mask = np.concatenate([[False] * len(before), mask, [True] * len(after)]).astype(bool)
        yield ids, mask


def target_mask(offsets: Int64[np.ndarray, "n 2"], piece: Piece) -> Bool[np.ndarray, " n"] | None:
    """Mask of targets by the tokens' character ranges; None if these do not match a span's ends.

    Byte-level tokenizers may exclude a leading space from a token's range, hence a token is taken
    to start where the one before it ended.
    """
    if piece.spans is None:
        return np.ones(len(offsets), bool)
    ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
    starts = np.minimum(offsets[:, 0], np.concatenate([[0], ends])[: len(ends)])
    mask = np.zeros(len(offsets), bool)
    for start, end in piece.spans:
        low, high = np.searchsorted(ends, start, "right"), np.searchsorted(starts, end, "left")
        if start < end and (low >= high or starts[low] > start or ends[high - 1] < end):
            return None
        mask[low:high] = start < end
    return mask


def encode_by_spans(piece: Piece, tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """(ids, target mask) by tokenizing spans and the text between them separately.

    For tokenizers that do not report the character ranges of their tokens.
    """
    cuts = piece.spans if piece.spans is not None else ((0, len(piece.text)),)
    ids, mask, at = [], [], 0
    for start, end in (*cuts, (len(piece.text),) * 2):
        for text, learn in ((piece.text[at:start], False), (piece.text[start:end], True)):
            new = token_ids(text, tokenizer) if text else []
            ids += new
            mask += [learn] * len(new)
        at = end
    return ids, np.asarray(mask, bool)


def _windows(
    ids: np.ndarray, mask: np.ndarray, piece: Piece, length: int, counts: Counts
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Examples (ids, labels) of a token sequence, cut after its last target; none without one."""
    learned = np.flatnonzero(mask[1:])
    if not piece.cut and len(learned) and learned[-1] >= length:
        counts.truncated += 1
        learned = learned[learned < length]
    if not len(learned):
        counts.dropped += 1
        return
    end = learned[-1] + 1
    labels = np.where(mask, ids, IGNORE).astype(np.int32)[1 : end + 1]
    for at in range(0, end, length):
        yield ids[at : min(at + length, end)], labels[at : at + length]
