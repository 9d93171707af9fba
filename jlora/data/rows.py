"""The four kinds of rows that every format is converted to: chat, completion, text, labelled text.

``where`` is a row's place, ``file:line``, for error messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles of messages in files: OpenAI's, and ``ipython``, which Llama 3.1 uses for tool results."""


@dataclass(frozen=True)
class Chat:
    """A conversation in OpenAI's message format, with ``content`` always a string."""

    where: str
    messages: list[dict]
    tools: list | None = None
    """Definitions of the tools that the assistant may call, as JSON schemas."""
    first: int = 0
    """Index of the first message that may be a training target; those before it are context."""
    plain: tuple[str, str] | None = None
    """(prompt, reply) as plain text, used if the tokenizer has no chat template."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as ``enable_thinking``."""


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion; only the completion is a training target."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document, all of which is a training target."""

    where: str
    text: str


@dataclass(frozen=True)
class LabelledText:
    """A text and its class, as the class's index or name."""

    where: str
    text: str
    label: int | str


Row = Chat | Completion | Text | LabelledText


def learned_messages(chat: Chat) -> Iterator[int]:
    """Indices of the messages that are training targets.

    These are the assistant's, unless they have ``"weight": 0`` (OpenAI's fine-tuning format).
    """
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant" and i >= chat.first and message.get("weight", 1):
            yield i
