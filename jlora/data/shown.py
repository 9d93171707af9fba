"""Whether a rendered text shows what a message says: nothing that a user wrote is lost unsaid.

White space is ignored, since templates trim, and so are the tags of thinking, which a prompt may
open. Text may be escaped as in JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold its thinking; templates differ in which of them they read."""


class ShownText:
    """A rendered text, to be asked what it shows."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def squashed(self) -> str:
        """The text without white space."""
        return _squash(self.text)

    def shows(self, said: str) -> bool:
        """Whether all of ``said`` is in the text."""
        # Most text is there as it was written, which is found fastest.
        return said in self.text or all(map(self._has, re.split(r"</?think(?:ing)?>", said)))

    def _has(self, part: str) -> bool:
        part = part.strip()
        return (
            part in self.text
            or _squash(part) in self.squashed
            or any(
                _squash(json.dumps(part, ensure_ascii=ascii_only)[1:-1]) in self.squashed
                for ascii_only in (False, True)
            )
        )

    def shows_calls(self, message: dict) -> bool:
        """Whether the names and arguments of a message's tool calls are in the text."""
        functions = [call["function"] for call in message.get("tool_calls", ())]
        names = all(self._has(f["name"]) for f in functions)
        return names and all(
            any(map(self._has, forms)) for f in functions for forms in _leaves(f["arguments"])
        )

    def shows_tools(self, tools: list | None) -> bool:
        """Whether the names of tools are in the text."""
        return all(self._has(tool["function"]["name"]) for tool in tools or ())


def is_empty(message: dict) -> bool:
    """Whether a message says nothing: no content, thinking or calls."""
    return not message.get("tool_calls") and not any(text.strip() for text in _said(message))


def shows_reply(message: dict, reply: str) -> bool:
    """Whether a reply's text shows all of its message: content, thinking and tool calls."""
    text = ShownText(reply)
    return all(map(text.shows, _said(message))) and text.shows_calls(message)


def shows_some(message: dict, reply: str) -> bool:
    """Whether a reply has text, and some word of its message if that has any."""
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    words = re.findall(r"\w+", " ".join([*_said(message), *names]))
    return bool(reply.strip()) and (not words or any(w in reply for w in words))


def shows_context(messages: list[dict], tools: list | None, prompt: str) -> bool:
    """Whether a prompt shows the tools and all that was said, except the thinking of replies."""
    text = ShownText(prompt)
    said = [
        m["content"].split("</think>")[-1] if m["role"] == "assistant" else m["content"]
        for m in messages
    ]
    calls = all(map(text.shows_calls, messages))
    return calls and text.shows_tools(tools) and all(map(text.shows, said))


def _said(message: dict) -> list[str]:
    """The texts of a message: its content, and its thinking under each key."""
    return [message["content"], *(message.get(key) or "" for key in REASONING_KEYS)]


def thinking(message: dict) -> str:
    """What a message thinks before it answers, from its own key or from tags in its content."""
    for key in REASONING_KEYS:
        if message.get(key):
            return str(message[key]).strip()
    before, closed, _ = message["content"].rpartition("</think>")
    return before.rpartition("<think>")[2].strip() if closed else ""


def _squash(text: str) -> str:
    return "".join(text.split())


def _leaves(value: Any) -> Iterator[list[str]]:
    """The strings and numbers of arguments, each in the forms that templates write it in."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield [str(key)]
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield [value] if isinstance(value, str) else [json.dumps(value), str(value)]
