"""Labelled texts to examples, and the label names found in rows.

A text is tokenized with the special tokens that its tokenizer adds, and truncated at
``max_length``. Its label id is the label of its last token, where transformers'
``…ForSequenceClassification`` reads the logits; no other token has a label::

    ids      <s> 5 6 7
    labels   -100 -100 -100 1        1 is the label id of the text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.data.examples import IGNORE, ROWS_PER_CALL, Counts, Examples, concatenate_examples
from jlora.data.rows import LabelledText
from jlora.data.tokenizer import UnwritableCharacters
from jlora.errors import ConfigError, DataError, did_you_mean


def encode_labelled(
    rows: Sequence[LabelledText],
    tokenizer: Any,
    max_length: int,
    id2label: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Examples, Counts]:
    """Tokenizes rows into examples of at most ``max_length`` tokens, in row order.

    Rows whose label is not in ``id2label`` are reported in the counts' ``bad``. Padding at the end,
    which some tokenizers add, is removed: transformers classifies by the last other token.
    """
    counts, streams, unwritable = Counts(), [], UnwritableCharacters(tokenizer)
    for at in range(0, len(rows), ROWS_PER_CALL):
        chunk = rows[at : at + ROWS_PER_CALL]
        texts = [row.text for row in chunk]
        cut = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        # Without truncation last: a tokenizer is saved with its last truncation setting.
        whole = tokenizer(texts, verbose=False)["input_ids"]
        unwritable.count(texts, counts.unwritable)
        for row, ids, uncut in zip(chunk, cut, whole, strict=True):
            try:
                label = label_id(row, id2label)
            except DataError as error:
                counts.bad.append(error)
                continue
            counts.truncated += len(uncut) > max_length
            ids = np.asarray(ids, np.int32)
            content = np.flatnonzero(ids != tokenizer.pad_token_id)
            if not len(content):
                counts.dropped += 1
                continue
            ids = ids[: content[-1] + 1]
            counts.add_tokens(ids, row.where)
            labels = np.full(len(ids), IGNORE, np.int32)
            labels[-1] = label
            streams.append((ids, labels))
        if progress:
            progress(at + len(chunk), len(rows))
    return concatenate_examples(streams), counts


def label_id(row: LabelledText, id2label: Sequence[str]) -> int:
    """The label id of a row; DataError if its label is not in ``id2label``."""
    if row.label in id2label:
        return id2label.index(str(row.label))
    number = _number(row.label)
    if number is not None and 0 <= number < len(id2label):
        return number
    raise DataError(
        f"its label {row.label!r} is none of the {len(id2label)} classes: {first_ten(id2label)}",
        where=row.where,
        fix=did_you_mean(str(row.label), id2label) or "correct the row, or set model.id2label",
    )


def infer_label_names(
    rows: Iterable[LabelledText], num_labels: int | None = None
) -> tuple[str, ...]:
    """The label names of rows, sorted; ``LABEL_0`` … if the labels are numbers.

    Raises:
      DataError: labels are numbers in some rows and names in others, with gaps, or all equal.
      ConfigError: there are not ``num_labels`` names.
    """
    first: dict[int | str, LabelledText] = {}
    for row in rows:
        first.setdefault(row.label, row)
    numbers = {_number(label) for label in first}
    if None not in numbers:
        return _numbered(sorted(int(n) for n in numbers if n is not None), first, num_labels)
    for label, row in first.items():
        if isinstance(label, int):
            cause = f"its label is the number {label}, but other rows have names"
            raise DataError(cause, where=row.where, fix="write numbers in all rows, or names")
    names = tuple(sorted(map(str, first)))
    if num_labels not in (None, len(names)):
        raise ConfigError(
            f"is {num_labels}, but the rows have {len(names)} labels: {first_ten(names)}",
            where="model.num_labels",
            fix="leave it out, or list the names of all classes in model.id2label",
        )
    _check_more_than_one(names, first)
    return names


def _numbered(
    numbers: Sequence[int], first: Mapping[int | str, LabelledText], num_labels: int | None
) -> tuple[str, ...]:
    """``LABEL_0`` … up to ``num_labels``, or for the numbers found, which must have no gaps."""
    if num_labels is None:
        _check_more_than_one(numbers, first)
        if list(numbers) != list(range(len(numbers))):
            raise DataError(
                f"the labels are {first_ten(numbers)}: not numbers from 0 on, without gaps",
                where=next(iter(first.values())).where,
                fix="number the classes from 0, or set model.num_labels",
            )
    return tuple(f"LABEL_{i}" for i in range(num_labels or len(numbers)))


def _check_more_than_one(labels: Sequence[Any], first: Mapping[int | str, LabelledText]) -> None:
    if len(labels) == 1:
        cause, where = f"every row has the label {labels[0]!r}", next(iter(first.values())).where
        raise DataError(cause, where=where, fix="give rows of two classes or more")


def _number(label: int | str) -> int | None:
    """A label as a number, or None; values of CSV files are strings, hence digits count."""
    if isinstance(label, int):
        return int(label)
    return int(label) if label.isdecimal() else None


def first_ten(labels: Sequence[Any]) -> str:
    """The first ten labels as text, for messages."""
    return ", ".join(map(str, labels[:10])) + (", …" if labels[10:] else "")
