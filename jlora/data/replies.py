"""Prompts with their reference replies, for evaluation by generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jlora.config import DataConfig, SourceConfig
from jlora.data.chat import ChatRenderer
from jlora.data.loading import load_rows
from jlora.data.rows import Chat, Completion, Row, learned_messages
from jlora.data.tokenizer import bos_prefix, ensure_template, token_ids


@dataclass(frozen=True)
class ReplyRow:
    """A prompt, up to where the assistant's reply begins, and the reply in the data."""

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

    Texts, and chats without a reply, are left out.
    """
    found: list[ReplyRow] = []
    for source in sources:
        for row in load_rows(source, config.on_bad_row).rows:
            if max_rows is not None and len(found) >= max_rows:
                return found
            if (made := reply_row(row, tokenizer)) is not None:
                found.append(made)
    return found


def reply_row(row: Row, tokenizer: Any) -> ReplyRow | None:
    """The prompt and reply of one row, rendered as for training; None if it has no reply."""
    if isinstance(row, Completion):
        return _plain(row.where, row.prompt, row.completion, tokenizer)
    if not isinstance(row, Chat):
        return None
    if row.plain is not None and not tokenizer.chat_template:
        return _plain(row.where, *row.plain, tokenizer)
    ensure_template(tokenizer)
    render = ChatRenderer(tokenizer)
    row = render.adapt(row)
    turns = list(learned_messages(row))
    if not turns:
        return None
    prompt, reply = render.prompt(row, turns[-1]), row.messages[turns[-1]]
    ids = token_ids(prompt, tokenizer)
    return ReplyRow(row.where, tuple(ids), prompt, reply["content"])


def _plain(where: str, prompt: str, reply: str, tokenizer: Any) -> ReplyRow:
    ids = bos_prefix(tokenizer) + token_ids(prompt, tokenizer)
    return ReplyRow(where, tuple(ids), prompt, reply)
