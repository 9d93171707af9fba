"""Rows to examples: token ids and labels.

A row is tokenized to one sequence with a mask of its training targets; the example is the sequence
up to its last target, with labels already shifted::

    tokens   <s> 5 6 | 7 8 </s>      (targets: 7 8 </s>)
    ids      <s> 5 6 7 8
    labels   -100 -100 7 8 </s>      labels[t] is the token that follows ids[t]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from jlora.data.chat import ChatRenderer, common_prefix
from jlora.data.rows import Chat, Completion, Text, learned_messages
from jlora.data.shown import is_empty
from jlora.data.tokenizer import (
    UnwritableCharacters,
    bos_prefix,
    eos_suffix,
    prefix_ids,
    token_ids,
)
from jlora.errors import DataError

IGNORE = -100
"""The label of a token that is no training target (PyTorch's ``ignore_index``)."""

ROWS_PER_CALL = 512
"""Rows per call of the tokenizer, which tokenizes the texts of a call in parallel."""


class Piece(NamedTuple):
    """A text to tokenize.

    ``spans`` are the character ranges of the targets, None for the whole text. ``add_bos_eos`` adds
    the tokenizer's bos and eos, unless the text has them; ``cut`` cuts a long text into windows
    instead of truncating it. If the whole text is the target, ``excluded`` are ranges that are not.
    """

    where: str
    text: str
    spans: tuple[tuple[int, int], ...] | None
    add_bos_eos: bool = False
    cut: bool = False
    excluded: tuple[tuple[int, int], ...] = ()


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
    """Chats that became several examples: their replies have no common text or no common tokens."""
    split_examples: int = 0
    """How many examples these became."""
    lossy: int = 0
    """Chats whose replies the template renders only in part."""
    lacks_context: int = 0
    """Chats of whose context (system text, tools, results) the template shows only a part."""
    tools_as_text: int = 0
    """Chats whose tools or calls are JSON text, since the template does not show them."""
    retokenized: int = 0
    """Rows whose ids are not those of the whole text: a token would straddle a reply's border."""
    not_replies: int = 0
    """Rows that mark messages other than replies as targets, though only replies are learned."""
    empty_replies: int = 0
    """Rows with a reply that says nothing."""
    unwritable: dict[str, int] = field(default_factory=dict)
    """Characters that the tokenizer has no tokens for, and the numbers of texts that have them."""
    largest_token: int = field(default=-1, compare=False)
    largest_where: str = field(default="", compare=False)
    """The row with the largest token id, which the model may have no embedding for."""
    bad: list[DataError] = field(default_factory=list)
    """Rows that the chat template refuses, or whose label is none of the classes."""

    def add_tokens(self, ids: Int32[np.ndarray, " n"], where: str) -> None:
        """Notes the largest token id."""
        if len(ids) and (largest := int(ids.max())) > self.largest_token:
            self.largest_token, self.largest_where = largest, where


def encode(
    rows: Sequence[Chat | Completion | Text],
    tokenizer: Any,
    max_length: int,
    assistant_only_loss: bool = True,
    progress: Callable[[int, int], None] | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> tuple[Examples, Counts]:
    """Tokenizes rows into examples of at most ``max_length`` tokens, in row order.

    Chats and completions are truncated at the right; texts are cut into consecutive windows
    without losing a target. ``progress(done, total)`` is called after each chunk of rows.
    ``template_variables`` are given to the chat template.
    """
    counts, streams, unwritable = Counts(), [], UnwritableCharacters(tokenizer)
    render = ChatRenderer(tokenizer, template_variables or {}) if tokenizer.chat_template else None
    chunks = [rows[at : at + ROWS_PER_CALL] for at in range(0, len(rows), ROWS_PER_CALL)]
    rendered = (
        [pieces(row, render, counts, assistant_only_loss) for row in chunk] for chunk in chunks
    )

    def tokenized(found: list[list[Piece]]) -> tuple[list[list[Piece]], list[Tokens]]:
        flat = [piece for of_row in found for piece in of_row]
        unwritable.count([piece.text for piece in flat], counts.unwritable)
        return found, list(tokenize(flat, tokenizer))

    done = 0
    for found, tokens in _one_ahead(tokenized, rendered):
        made_of = iter(tokens)
        for of_row in found:
            several, retokenized = 0, False
            for piece in of_row:
                made = next(made_of)
                several, retokenized = several + len(made.streams), retokenized or made.retokenized
                for ids, mask in made.streams:
                    streams.extend(_windows(ids, mask, piece, max_length, counts))
            counts.retokenized += retokenized
            if several > 1:
                counts.split += 1
                counts.split_examples += several
        done += len(found)
        if progress:
            progress(done, len(rows))
    return concatenate_examples(streams), counts


def _one_ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The function of each item, computed in a thread while the next item is made.

    Rendering needs the interpreter, which tokenizing leaves free.
    """
    with ThreadPoolExecutor(1) as pool:
        last = None
        for item in items:
            following = pool.submit(function, item)
            if last is not None:
                yield last.result()
            last = following
        if last is not None:
            yield last.result()


def concatenate_examples(streams: list[tuple[np.ndarray, np.ndarray]]) -> Examples:
    """Concatenates the (ids, labels) of examples."""
    starts = np.zeros(len(streams) + 1, np.int64)
    np.cumsum([len(ids) for ids, _ in streams], out=starts[1:])
    none = np.zeros(0, np.int32)
    ids = np.concatenate([none, *(ids for ids, _ in streams)])
    return Examples(ids, np.concatenate([none, *(labels for _, labels in streams)]), starts)


def pieces(
    row: Chat | Completion | Text,
    render: ChatRenderer | None,
    counts: Counts,
    assistant_only_loss: bool = True,
) -> list[Piece]:
    """The texts of a row; none if the template refuses it, which goes to ``counts.bad``.

    ``render`` is None for a tokenizer without a chat template.
    """
    if isinstance(row, Text):
        return [Piece(row.where, row.text, None, add_bos_eos=True, cut=True)]
    if isinstance(row, Completion):
        counts.empty_replies += not row.completion.strip()
        found = [completion_piece(row.where, row.prompt, row.completion)]
    elif render is None:
        if row.plain is None:
            fix = "set data.chat_template"
            raise DataError("the tokenizer has no chat template", where=row.where, fix=fix)
        found = [completion_piece(row.where, *row.plain)]
    else:
        found = _chat(row, render, counts, assistant_only_loss)
    return found if assistant_only_loss else [piece._replace(spans=None) for piece in found]


def completion_piece(where: str, prompt: str, completion: str) -> Piece:
    """The text of a prompt and its completion, which is the target."""
    text = prompt + completion
    return Piece(where, text, ((len(prompt), len(text)),), add_bos_eos=True)


def _chat(
    row: Chat, render: ChatRenderer, counts: Counts, assistant_only_loss: bool
) -> list[Piece]:
    try:
        counts.tools_as_text += render.adapt(row) is not row
        texts = render(row) if assistant_only_loss else [render.whole(row)]
    except DataError as e:
        counts.bad.append(e)
        return []
    if assistant_only_loss:
        others = (m for m in row.messages if m["role"] != "assistant")
        counts.not_replies += any(m.get("weight") for m in others)
    replies = [row.messages[i] for i in learned_messages(row)]
    counts.empty_replies += any(is_empty(message) for message in replies)
    counts.lossy += texts[0].lossy
    counts.lacks_context += texts[0].lacks_context
    return [Piece(row.where, r.text, r.spans, excluded=r.excluded) for r in texts]


Stream = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is a target."""


class Tokens(NamedTuple):
    """The tokens of a piece: one stream, or one for each reply whose context differs."""

    streams: list[Stream]
    retokenized: bool
    """The ids are not those of the whole text: a token would straddle a span's border."""


def tokenize(found: Sequence[Piece], tokenizer: Any) -> Iterator[Tokens]:
    """The tokens of each piece.

    Special tokens are added by ``add_bos_eos`` alone, never by the tokenizer: a rendered template
    has its own. Without spans the ids are those of the whole text. With them they are those of
    inference: the ids of the text before a span, as of any prompt, then the span's.
    """
    cuts = [[e for span in p.spans or () for e in span] or [len(p.text)] for p in found]
    prefixes = prefix_ids([piece.text for piece in found], cuts, tokenizer)
    bos, eos = bos_prefix(tokenizer), eos_suffix(tokenizer)
    for piece, ids in zip(found, prefixes, strict=True):
        before = bos if piece.add_bos_eos and ids[-1][: len(bos)] != bos else []
        if piece.spans is None:
            mask = [False] * len(before) + _all_but_excluded(piece, ids[0], tokenizer)
            tokens = Tokens([(before + ids[0], mask)], False)
        elif not piece.spans:
            tokens = Tokens([(ids[0], [False] * len(ids[0]))], False)
        else:
            tokens = _by_spans(piece, [before + i for i in ids], tokenizer)
        last, mask = tokens.streams[-1]
        if piece.add_bos_eos and last[-len(eos) :] != eos:
            tokens.streams[-1] = (last + eos, mask + [True] * len(eos))
        yield tokens


def _all_but_excluded(piece: Piece, ids: list[int], tokenizer: Any) -> list[bool]:
    """Which tokens of a whole text are targets: those without a character that is excluded."""
    mask = [True] * len(ids)
    for start, end in piece.excluded:
        first = common_prefix(ids, token_ids(piece.text[:start], tokenizer))
        last = len(ids) - common_prefix(ids[::-1], token_ids(piece.text[end:], tokenizer)[::-1])
        if end > start:
            mask[first:last] = [False] * (last - first)
    return mask


def _by_spans(piece: Piece, ids: list[list[int]], tokenizer: Any) -> Tokens:
    """The tokens of a piece, from the ids of its text up to each start and end of a span."""
    streams: list[Stream] = []
    retokenized = False
    for (start, end), prompt, whole in zip(piece.spans or (), ids[::2], ids[1::2], strict=True):
        reply = whole[len(prompt) :]
        # By ids, not by the characters of each token: GPT-2's pattern looks ahead, so that the line
        # breaks at a prompt's end are one token, but two where a word follows, though both end at
        # the border.
        if whole[: len(prompt)] != prompt:
            reply, retokenized = continuation(piece.text[start:end], tokenizer), True
        mask: list[bool] = []
        if streams and prompt[: len(streams[-1][0])] == streams[-1][0]:
            _, mask = streams.pop()
        mask = mask + [False] * (len(prompt) - len(mask)) + [True] * len(reply)
        streams.append((prompt + reply, mask))
    return Tokens(streams, retokenized or len(streams) > 1)


def continuation(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text that continues another, without a piece for a space at its beginning.

    They are what follows the ids of some other text that shares no token with this one.
    """
    for other in ("\n", "\ue000", "a", "."):
        before, both = token_ids(other, tokenizer), token_ids(other + text, tokenizer)
        if before and both[: len(before)] == before:
            return both[len(before) :]
    return token_ids(text, tokenizer)


def _windows(
    ids: list[int], mask: list[bool], piece: Piece, length: int, counts: Counts
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Examples (ids, labels) of a token sequence, cut after its last target; none without one."""
    tokens, is_target = np.asarray(ids, np.int32), np.asarray(mask, bool)
    counts.add_tokens(tokens, piece.where)
    learned = np.flatnonzero(is_target[1:])
    if not piece.cut and len(learned) and learned[-1] >= length:
        counts.truncated += 1
        learned = learned[learned < length]
    if not len(learned):
        counts.dropped += 1
        return
    end = learned[-1] + 1
    labels = np.where(is_target, tokens, IGNORE).astype(np.int32)[1 : end + 1]
    for at in range(0, end, length):
        yield tokens[at : min(at + length, end)], labels[at : at + length]
