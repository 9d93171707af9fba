"""Tool calls in the form that a chat template takes, found by rendering a small conversation.

Templates differ in what they expect: arguments as an object or as JSON text, an id of nine
characters for each call (Mistral), no content beside calls (DeepSeek). Some show no tools or no
calls at all; these are written as JSON text then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from jlora.data.rows import Chat

Render = Callable[[list[dict], list | None, bool], str]
"""(messages, tools, whether to add the generation prompt) → text."""


@dataclass(frozen=True)
class ToolSupport:
    """What of tools a template shows, and in which form it takes them."""

    shows_tools: bool
    """It shows the definitions of tools."""
    shows_calls: bool
    """It shows calls and their results."""
    needs_ids: bool = False
    """Calls and results need ids of nine alphanumeric characters."""
    arguments_as_text: bool = False
    """Arguments are JSON text instead of an object."""
    null_content: bool = False
    """The content beside calls is null if there is none, instead of an empty string."""
    takes_system: bool = True
    """It shows a system message, where tools can be listed."""

    @classmethod
    def of(cls, render: Render) -> ToolSupport:
        """What the template of ``render`` supports."""
        tool = {"name": "probe_tool", "description": "d", "parameters": {"type": "object"}}
        tool["parameters"] |= {"properties": {}}
        tools = [{"type": "function", "function": tool}]
        user = {"role": "user", "content": "a"}
        shows_tools = "probe_tool" in _attempt(render, [user], tools, True)
        system = {"role": "system", "content": "probe_system"}
        takes_system = "probe_system" in _attempt(render, [system, user], None, True)
        function = {"name": "probe_call", "arguments": {"probe_key": "probe_value"}}
        messages = [
            user,
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
            {"role": "tool", "content": "probe_result", "name": "probe_call"},
        ]
        partial = None
        # The plainest form first: many templates take several.
        for ids, as_text, null_content in product((False, True), repeat=3):
            support = cls(shows_tools, True, ids, as_text, null_content, takes_system)
            text = _attempt(render, support.in_form(messages), tools, False)
            if "probe_call" not in text or "probe_result" not in text:
                continue
            # In quotes of Python's own, or escaped, the arguments are in the other form.
            if "probe_value" in text and "'probe_key'" not in text and '\\"probe_key' not in text:
                return support
            partial = partial or support
        return partial or cls(shows_tools, False, takes_system=takes_system)

    def adapt(self, chat: Chat) -> Chat:
        """The chat with what the template does not show as JSON text; unchanged if it shows all."""
        if chat.tools and not self.shows_tools:
            chat = tools_as_text(chat, "system" if self.takes_system else "user")
        return chat if self.shows_calls else calls_as_text(chat)

    def in_form(self, messages: list[dict]) -> list[dict]:
        """The messages with ids, arguments and contents in the template's form."""
        ids = _Ids() if self.needs_ids else None
        return [self._message(message, ids) for message in messages]

    def _message(self, message: dict, ids: _Ids | None) -> dict:
        calls = message.get("tool_calls")
        if ids and message["role"] == "tool":
            return {**message, "tool_call_id": ids.of_result(message)}
        if not calls:
            return message
        # transformers 5.24 drops keys that are null before it renders, so that a template which
        # asks `content is none` cannot be satisfied by it.
        content = message["content"] or (None if self.null_content else "")
        return {**message, "content": content, "tool_calls": [self._call(c, ids) for c in calls]}

    def _call(self, call: dict, ids: _Ids | None) -> dict:
        call = {"type": "function", **call}
        if self.arguments_as_text:
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call["function"] = {**call["function"], "arguments": text}
        return {**call, "id": ids.of_call(call)} if ids else call


class _Ids:
    """Ids of nine characters for the calls of a conversation and their results, in order."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}
        self.unanswered: list[str] = []
        self.count = 0

    def of_call(self, call: dict) -> str:
        self.count += 1
        written = str(call.get("id", ""))
        fits = len(written) == 9 and written.isalnum()
        new = written if fits else f"call{self.count:05d}"
        if written:
            self.made[written] = new
        self.unanswered.append(new)
        return new

    def of_result(self, message: dict) -> str:
        known = self.made.get(str(message.get("tool_call_id")))
        if known is None:
            return self.unanswered.pop(0) if self.unanswered else f"call{self.count:05d}"
        if known in self.unanswered:
            self.unanswered.remove(known)
        return known


def _attempt(render: Render, messages: list[dict], tools: list | None, prompt: bool) -> str:
    """The text, or nothing if the template refuses the messages."""
    try:
        return render(messages, tools, prompt)
    except Exception:  # whatever a template raises: jinja's errors, TypeError, …
        return ""


def uses_tools(chat: Chat) -> bool:
    """Whether a chat has tools, tool calls or tool results."""
    return bool(chat.tools) or any("tool_calls" in m or m["role"] == "tool" for m in chat.messages)


def tools_as_text(chat: Chat, role: str = "system") -> Chat:
    """The chat with its tools' definitions in its first message, which has this role."""
    listing = "Tools:\n" + json.dumps(chat.tools, ensure_ascii=False)
    first, *rest = chat.messages
    if first["role"] == role:
        parts = (first["content"], listing) if role == "system" else (listing, first["content"])
        messages = [{**first, "content": "\n\n".join(parts)}, *rest]
        return replace(chat, messages=messages, tools=None)
    messages = [{"role": role, "content": listing}, *chat.messages]
    return replace(chat, messages=messages, tools=None, first=chat.first + 1)


def calls_as_text(chat: Chat) -> Chat:
    """The chat with tool calls as JSON text, one a line, and their results as user messages."""
    if not any(m.get("tool_calls") or m["role"] == "tool" for m in chat.messages):
        return chat
    messages = []
    for message in chat.messages:
        plain = {k: v for k, v in message.items() if k != "tool_calls"}
        if calls := message.get("tool_calls"):
            lines = [json.dumps(c["function"], ensure_ascii=False) for c in calls]
            plain["content"] = "\n".join(t for t in (message["content"], *lines) if t)
        if message["role"] == "tool":
            plain["role"] = "user"
        messages.append(plain)
    return replace(chat, messages=messages)
