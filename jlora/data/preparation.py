"""Sources into packed rows: read, rendered, tokenized and packed once, before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jlora.config import DataConfig, SourceConfig
from jlora.data.examples import IGNORE, Counts, Examples, encode
from jlora.data.labelled_texts import encode_labelled, first_ten
from jlora.data.loading import LoadedRows, bad_rows_error, load_rows
from jlora.data.order import Order
from jlora.data.packing import PackedRows, pack
from jlora.data.row_keys import is_read
from jlora.data.rows import Chat, LabelledText
from jlora.data.tokenizer import ensure_template
from jlora.errors import ConfigError, DataError, JloraError

ProgressCallback = Callable[[str, int, int], None]
"""Called with a source's path, the rows tokenized so far, and how many there are."""


@dataclass(frozen=True)
class SourceReport:
    """Statistics of one source."""

    path: str
    format: str
    weight: float
    rows: int
    """Good rows read."""
    skipped: int
    """Bad rows left out (``on_bad_row: skip``)."""
    skipped_notes: tuple[str, ...]
    """The first of them, each with its place and cause."""
    truncated: int
    dropped: int
    examples: int
    packed_rows: int
    tokens: int
    target_tokens: int
    longest: int
    """Tokens of the longest example."""
    adapter: str | None = None
    """The adapter that learns the rows, in a multi-adapter run."""


@dataclass(frozen=True)
class Prepared:
    """The packed rows of all sources, in order, with statistics and warnings."""

    packed: PackedRows
    sources: tuple[SourceReport, ...]
    warnings: tuple[str, ...]
    fingerprint: str
    """Digest of rows and weights: data with equal digests are the same training data."""
    largest_token_where: str = ""
    """The row with the largest token id, which the model may have no embedding for."""

    @property
    def length(self) -> int:
        """T, the number of tokens in a row."""
        return self.packed.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, without padding."""
        return sum(s.tokens for s in self.sources)

    @property
    def target_tokens(self) -> int:
        """Number of tokens that are training targets."""
        return sum(s.target_tokens for s in self.sources)

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that is not padding."""
        return self.tokens / self.packed.input_ids.size

    def for_adapter(self, adapter: str) -> Prepared:
        """The rows of one adapter of a multi-adapter run, as if the others did not exist."""
        sizes = [s.packed_rows for s in self.sources]
        selected = np.repeat([s.adapter == adapter for s in self.sources], sizes)
        packed = PackedRows(*(array[selected] for array in _arrays(self.packed)))
        return replace(
            self, packed=packed, sources=tuple(s for s in self.sources if s.adapter == adapter)
        )

    def order(self, batch: int, seed: int, shuffle: bool = True) -> Order:
        """The training order with ``batch`` rows per step."""
        parts = tuple((s.packed_rows, s.weight) for s in self.sources)
        return Order(parts, batch, seed, shuffle)


def prepare(
    sources: Sequence[SourceConfig],
    tokenizer: Any,
    config: DataConfig,
    role: str = "train",
    progress: ProgressCallback | None = None,
    id2label: Sequence[str] = (),
) -> Prepared:
    """Reads, renders, tokenizes and packs sources.

    If a source has chats and the tokenizer no chat template, the tokenizer is given a plain one.

    ``role`` is ``train`` or ``eval``; evaluation may be packed differently (``data.eval_packing``).
    ``id2label`` has the names of the classes of labelled texts.

    Raises:
      DataError: malformed rows (see ``loading``), or a source without any training target.
      ConfigError: nothing lies at a source's path.
    """
    loaded = [load_rows(source, config.on_bad_row) for source in sources]
    warnings = _templates(loaded, tokenizer)
    warnings += _unknown_keys(sources, loaded, str(tokenizer.chat_template or ""), config)
    encoded = []
    for source, rows in zip(sources, loaded, strict=True):
        told = None if progress is None else lambda n, m, p=source.path: progress(p, n, m)
        found = _encode(rows, tokenizer, config, id2label, told)
        _check(source, rows, *found, config)
        encoded.append(found)
    packing = config.packing
    if role == "eval" and config.eval_packing is not None:
        packing = config.eval_packing
    length = config.max_length if packing else row_length([e for e, _ in encoded], config)
    # A mean does not depend on the order: held-out rows may be packed tightly in any case.
    shuffle = config.shuffle or role == "eval"
    parts = [pack(e, length, packing=packing, shuffle=shuffle) for e, _ in encoded]
    reports = tuple(map(_report, sources, loaded, encoded, parts))
    packed = PackedRows(
        *(np.concatenate(arrays) for arrays in zip(*map(_arrays, parts), strict=True))
    )
    counts = [c for _, c in encoded]
    warnings += _warnings(reports, counts, packed, tokenizer, config)
    row = max(counts, key=lambda c: c.largest_token).largest_where
    return Prepared(packed, reports, tuple(warnings), _digest(packed, reports), row)


def _encode(
    rows: LoadedRows, tokenizer: Any, config: DataConfig, id2label: Sequence[str], progress: Any
) -> tuple[Examples, Counts]:
    """The examples of a source; either all of its rows are labelled texts or none is."""
    texts = [row for row in rows.rows if not isinstance(row, LabelledText)]
    if texts:
        return encode(
            texts,
            tokenizer,
            config.max_length,
            config.assistant_only_loss,
            progress,
            config.chat_template_kwargs,
        )
    labelled = [row for row in rows.rows if isinstance(row, LabelledText)]
    return encode_labelled(labelled, tokenizer, config.max_length, id2label, progress)


def _arrays(packed: PackedRows) -> tuple[np.ndarray, ...]:
    return packed.input_ids, packed.labels, packed.segment_ids


def row_length(examples: Iterable[Examples], config: DataConfig) -> int:
    """T without packing: the longest example, rounded up a little, so that one shape fits all."""
    longest = max(int(e.lengths.max()) for e in examples)
    step = 64 if longest > 64 else 8
    return min(-(-longest // step) * step, config.max_length)


def _templates(loaded: Sequence[LoadedRows], tokenizer: Any) -> list[str]:
    chats = any(isinstance(r, Chat) and r.plain is None for rows in loaded for r in rows.rows)
    if chats and ensure_template(tokenizer):
        return [
            "the tokenizer has no chat template: chats are written as '### User:', "
            "'### Assistant:' (data.chat_template names another)"
        ]
    return []


def _unknown_keys(
    sources: Sequence[SourceConfig],
    loaded: Sequence[LoadedRows],
    template: str,
    config: DataConfig,
) -> list[str]:
    """What is said of keys that nothing reads; an error with ``on_unknown_key: error``."""
    errors: list[JloraError] = []
    for name in config.chat_template_kwargs:
        if not is_read(f"chat_template_kwargs.{name}", template):
            cause, where = f"the chat template does not read {name!r}", "data.chat_template_kwargs"
            errors.append(ConfigError(cause, where=where, fix="leave it out"))
    for source, rows in zip(sources, loaded, strict=True):
        keys = rows.unknown_keys.not_read_by(template)
        if not keys:
            continue
        named = [f"{key!r} ({n} of {len(rows.rows)} rows)" for key, n in keys.items()]
        cause = f"keys that format {source.format} does not read: {first_ten(named)}"
        where = rows.unknown_keys.first[next(iter(keys))]
        fix = "remove or rename them, or set data.on_unknown_key=warn"
        errors.append(DataError(cause, where=where, fix=fix))
    if errors and config.on_unknown_key == "error":
        raise errors[0]
    return [f"{error.where}: {error.cause}" for error in errors]


def _check(
    source: SourceConfig, rows: LoadedRows, examples: Examples, counts: Counts, config: DataConfig
) -> None:
    """Raises for rows that the chat template refuses, and for sources without targets."""
    good = len(rows.rows) - len(counts.bad)
    if counts.bad and (config.on_bad_row == "error" or not good):
        raise bad_rows_error(counts.bad, good)
    if not len(examples):
        cause = (
            f"no token is to be learned in any of its {len(rows.rows)} rows "
            f"({counts.truncated} are longer than data.max_length={config.max_length})"
        )
        fix = 'give its rows replies that are trained (not "weight": 0)'
        if counts.truncated:
            fix = "raise data.max_length: it cuts the replies off"
        raise DataError(cause, where=source.path, fix=fix)


def _report(
    source: SourceConfig, rows: LoadedRows, encoded: tuple[Examples, Counts], packed: PackedRows
) -> SourceReport:
    examples, counts = encoded
    bad = rows.bad + counts.bad
    return SourceReport(
        path=source.path,
        format=source.format,
        weight=source.weight,
        rows=len(rows.rows) - len(counts.bad),
        skipped=len(bad),
        skipped_notes=tuple(f"{e.where}: {e.cause}" for e in bad[:5]),
        truncated=counts.truncated,
        dropped=counts.dropped,
        examples=len(examples),
        packed_rows=len(packed),
        tokens=len(examples.ids),
        target_tokens=int((examples.labels != IGNORE).sum()),
        longest=int(examples.lengths.max(initial=0)),
        adapter=source.adapter,
    )


def _warnings(
    reports: Sequence[SourceReport],
    all_counts: Sequence[Counts],
    packed: PackedRows,
    tokenizer: Any,
    config: DataConfig,
) -> list[str]:
    said = [
        f"{report.path}: {text}"
        for report, counts in zip(reports, all_counts, strict=True)
        for text in _of_source(report, counts, config)
    ]
    eos = tokenizer.eos_token_id
    texts = any(r.format != "classification" for r in reports)
    if texts and eos is not None and not (packed.labels == eos).any():
        said.append(
            f"the end-of-sequence token {tokenizer.eos_token!r} is never learned: "
            "a model that stops only there will not stop"
        )
    return said


def _of_source(report: SourceReport, counts: Counts, config: DataConfig) -> Iterator[str]:
    """What is said of one source."""
    if report.skipped:
        yield f"{report.skipped} bad rows skipped, first {report.skipped_notes[0]}"
    if report.truncated:
        long = f"longer than data.max_length={config.max_length} and cut"
        yield f"{report.truncated} of {report.rows} rows are {long}"
    if report.dropped:
        yield f"{report.dropped} examples dropped, as nothing in them is learned"
    if counts.split:
        why = "a later prompt does not begin with the earlier text or its tokens"
        yield f"{counts.split} chats became {counts.split_examples} examples, since {why}"
    if counts.not_replies:
        why = "with data.assistant_only_loss, only replies are learned"
        yield f"{counts.not_replies} rows mark other messages than replies as trained: {why}"
    if counts.empty_replies:
        yield f"{counts.empty_replies} rows teach an empty reply"
    if counts.unwritable:
        most = sorted(counts.unwritable.items(), key=lambda item: (-item[1], item[0]))
        listed = first_ten([f"{character!r} ({n} texts)" for character, n in most])
        yield f"the tokenizer has no tokens for {listed}"
    by_template = (
        (counts.lossy, "shows only part of the replies (thinking or tool calls) of"),
        (counts.lacks_context, "leaves out part of the context (system text, tools, results) of"),
        (counts.tools_as_text, "does not show all of tools and calls: they are JSON text in"),
    )
    for count, what in by_template:
        if count:
            yield f"the chat template {what} {count} rows"
    if counts.retokenized:
        why = "one token of the whole text has characters of a prompt and of its reply"
        yield f"{counts.retokenized} rows are tokenized in parts, prompt and reply, since {why}"


def _digest(packed: PackedRows, reports: Sequence[SourceReport]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    sizes = [(r.packed_rows, r.weight, *([r.adapter] if r.adapter else [])) for r in reports]
    digest.update(repr([packed.input_ids.shape, *sizes]).encode())
    for array in _arrays(packed):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
