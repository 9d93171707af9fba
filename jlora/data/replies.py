"""Prompts with their reference replies, for evaluation by generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlora.config import DataConfig, SourceConfig
from jlora.data.chat import ChatRenderer
from jlora.data.examples import Piece, completion_piece, tokenize
from jlora.data.loading import load_rows
from jlora.data.rows import Chat, Completion, Row, learned_messages
from jlora.data.tokenizer import ensure_template
from jlora.errors import DataError


@dataclass(frozen=True)
class ReplyRow:
    """A prompt, up to where the assistant's reply begins, and the reply in the data.

    The reply is what training teaches after this prompt, as the chat template renders it: with
    tool calls and thinking, but without special tokens, which generated replies are also shown
    without.
    """

    where: str
    prompt_ids: tuple[int, ...]
    prompt: str
    reply: str


def reply_rows(
    sources: Sequence[SourceConfig],
    tokenizer: Any,
    config: DataConfig,
    max_rows: int | None = None,
) -> list[ReplyRow]:
    """The last reply of each chat, and each completion, with its prompt; the first ``max_rows``.

    Texts, and chats without a reply, are left out; so are rows that the chat template refuses, if
    ``config.on_bad_row`` is ``skip``.
    """
    found: list[ReplyRow] = []
    # One for all rows: each finds out anew what the template shows of tools, in up to ten
    # renderings.
    render = ChatRenderer(tokenizer, config.chat_template_kwargs)
    for source in sources:
        for row in load_rows(source, config.on_bad_row).rows:
            if max_rows is not None and len(found) >= max_rows:
                return found
            try:
                made = reply_row(row, render)
            except DataError:
                if config.on_bad_row == "error":
                    raise
                continue
            if made is not None:
                found.append(made)
    return found


def reply_row(row: Row, render: ChatRenderer) -> ReplyRow | None:
    """The prompt and reply of one row, rendered as for training; None if it has no reply.

    A tokenizer without a chat template is given one if the row needs it.

    Raises:
      DataError: the chat template refuses the row.
    """
    tokenizer = render.tokenizer
    piece = _last_reply(row, render)
    if piece is None:
        return None
    ((ids, mask),) = next(tokenize([piece], tokenizer)).streams
    start = piece.spans[0][0] if piece.spans else 0
    count = mask.index(True) if any(mask) else len(ids)
    reply = tokenizer.decode(ids[count:], skip_special_tokens=True)
    return ReplyRow(piece.where, tuple(ids[:count]), piece.text[:start], reply)


def _last_reply(row: Row, render: ChatRenderer) -> Piece | None:
    """The text of a row up to the end of its last reply, which is its only span."""
    if isinstance(row, Completion):
        return completion_piece(row.where, row.prompt, row.completion)
    if not isinstance(row, Chat):
        return None
    if row.plain is not None and not render.tokenizer.chat_template:
        return completion_piece(row.where, *row.plain)
    ensure_template(render.tokenizer)
    turns = list(learned_messages(row))
    if not turns:
        return None
    # Only the last reply as a target: earlier ones could split the chat into several texts.
    (rendered,) = render(replace(row, first=turns[-1]))
    return Piece(row.where, rendered.text, rendered.spans)
