r"""Chats through the tokenizer's own template, and where in the text the replies lie.

Stock templates carry no ``{% generation %}`` tags, so the spans come from rendering prefixes. For
the assistant's message i::

    prompt = render(messages[:i], add_generation_prompt=True)   <|im_start|>user … assistant\n
    text   = render(messages[:i + 1])                           … assistant\nHello<|im_end|>\n
    reply  = text[len(prompt):]                                 Hello<|im_end|>

What follows the end-of-turn token is not learned. Templates that show a message differently once
the conversation has gone on (Qwen3 and DeepSeek drop earlier thinking) are found out: an *empty*
thinking block may go; if anything else goes, the chat becomes one text per reply, each as the model
will see it when it has to write that reply.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from jlora.data.rows import Chat, learned_messages
from jlora.errors import DataError

TODAY = {
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
}
"""The date that some templates print: fixed, so that a resumed run sees the same tokens."""

FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace({k!r}, {v!r})" for k, v in TODAY.items())
    + " }}{%- endmacro %}"
)
"""Goes before a template that asks for the date."""


@dataclass(frozen=True)
class RenderedChat:
    """A text and the character spans [start, end) to learn; ``lossy`` when a reply lost words."""

    text: str
    spans: tuple[tuple[int, int], ...]
    lossy: bool = False


class ChatRenderer:
    """Renders chats with the template of one tokenizer.

    A template that knows no tools gets tool calls and results as plain JSON text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = tuple(special | set(tokenizer.all_special_tokens))

    def render(self, messages: list[dict], tools: list | None, prompt: bool = False) -> str:
        """The template's text; ``prompt`` adds the opening of the assistant's next reply."""
        template = self.tokenizer.get_chat_template(None, tools)
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=FIXED_DATE + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def __call__(self, chat: Chat) -> list[RenderedChat]:
        """The text or texts of a chat with the spans of its replies.

        Raises:
          DataError: the template refuses the messages, or a reply cannot be found in its text.
        """
        try:
            return self._texts(chat)
        except DataError:
            raise
        except Exception as e:  # whatever a template raises: jinja's errors, TypeError, …
            fix = "mend the row, or set data.chat_template to a template that takes it"
            raise DataError(f"the chat template refuses it: {e}", where=chat.where, fix=fix) from e

    def _texts(self, chat: Chat) -> list[RenderedChat]:
        chat = self.adapt(chat)
        messages, tools = chat.messages, chat.tools
        text, turns = self.render(messages, tools), list(learned_messages(chat))
        ends = {len(messages): text}
        alone = [self._last_reply(messages[: i + 1], tools, chat.where, ends) for i in turns]
        spans = [self._span(text, *reply) for reply in alone]
        lossy = any(_lost(messages[i], t[s:]) for i, (t, s) in zip(turns, alone, strict=True))
        if all(spans):
            return [RenderedChat(text, tuple(self._trim(text, s) for s in spans if s), lossy)]
        return [RenderedChat(t, (self._trim(t, (s, len(t))),), lossy) for t, s in alone]

    def adapt(self, chat: Chat) -> Chat:
        """The chat as the template can take it."""
        if "tool" in str(self.tokenizer.chat_template) or not uses_tools(chat):
            return chat
        return tools_as_text(chat)

    def prompt(self, chat: Chat, reply: int) -> str:
        """The text from which a model writes message ``reply`` of an adapted chat."""
        return self.render(chat.messages[:reply], chat.tools, prompt=True)

    def _last_reply(
        self, messages: list[dict], tools: Any, where: str, known: dict[int, str]
    ) -> tuple[str, int]:
        """The rendering of a chat that ends in a reply, and where that reply starts.

        ``known`` has the texts rendered already, by how many messages they have.
        """
        text = known.get(len(messages)) or self.render(messages, tools)
        try:
            prompt = self.render(messages[:-1], tools, prompt=True)
        except Exception:  # a template may refuse a chat without messages
            prompt = None
        start = len(prompt) if prompt is not None and text.startswith(prompt) else None
        if start is None:
            start = self._where_it_varies(messages, tools, text)
        if not _shown(messages[-1], text[start:]):
            fix = "set data.chat_template to a template that shows assistant messages"
            raise DataError("the chat template does not show the reply", where=where, fix=fix)
        return text, start

    def _where_it_varies(self, messages: list[dict], tools: Any, text: str) -> int:
        """Where the text begins to change when the reply's first character does."""
        reply = messages[-1]["content"].strip()
        other = "§" if not reply.startswith("§") else "¶"
        varied = self.render([*messages[:-1], {**messages[-1], "content": other}], tools)
        pairs = enumerate(zip(text, varied, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(text), len(varied)))

    def _span(self, full: str, text: str, start: int) -> tuple[int, int] | None:
        """The span in ``full`` of the reply ``text[start:]``; None when it is not all there."""
        if full.startswith(text):
            return start, len(text)
        if full[:start] != text[:start]:
            return None
        reply, rest = text[start:], full[start:]
        for end in self._ends(reply):
            for cut in range(_empty_blocks(reply) + 1):
                kept = reply[cut:end]
                if kept.strip() and rest.startswith(kept):
                    return start, start + len(kept)
        return None

    def _ends(self, reply: str) -> list[int]:
        """Where a reply may end: some templates (Phi) put an eos after the last message only."""
        eos, stripped = self.tokenizer.eos_token, reply.rstrip()
        if eos and stripped.endswith(eos):
            shorter = stripped[: -len(eos)]
            if shorter.rstrip().endswith(self.special):
                return [len(reply), len(shorter)]
        return [len(reply)]

    def _trim(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """The span up to its end-of-turn token: generation stops there."""
        start, end = span
        kept = text[start:end].rstrip()
        return (start, start + len(kept)) if kept.endswith(self.special) else span


def _empty_blocks(reply: str) -> int:
    """How many leading characters are empty tags, such as ``<think></think>``."""
    return len(reply) - len(re.sub(r"^(?:<[^<>|]*>|\s)*", "", reply))


def _said(message: dict) -> list[str]:
    calls = message.get("tool_calls", ())
    said = [message["content"], message.get("reasoning_content", "")]
    return [*said, *(c["function"]["name"] for c in calls)]


def _shown(message: dict, reply: str) -> bool:
    """Whether a rendered reply has text at all, and a word of the message if that has any."""
    words = re.findall(r"\w+", " ".join(_said(message)))
    return bool(reply.strip()) and (not words or any(w in reply for w in words))


def _lost(message: dict, reply: str) -> bool:
    """Whether the rendered reply lacks part of the message: its thinking, its tool calls.

    White space and tags do not count: templates trim, and some prompts open the thinking.
    """
    shown = _words(reply)
    return any(_words(said) not in shown for said in _said(message))


def _words(text: str) -> str:
    return re.sub(r"<[^<>]*>|\s", "", text)


def uses_tools(chat: Chat) -> bool:
    """Whether the chat has tools, tool calls or their results."""
    return chat.tools is not None or any(
        "tool_calls" in m or m["role"] in ("tool", "function", "ipython") for m in chat.messages
    )


def tools_as_text(chat: Chat) -> Chat:
    """Tools in the system message, calls as JSON text, results from the user."""
    messages = []
    for message in chat.messages:
        plain = {k: v for k, v in message.items() if k != "tool_calls"}
        if calls := message.get("tool_calls"):
            lines = [json.dumps(c["function"], ensure_ascii=False) for c in calls]
            plain["content"] = "\n".join(t for t in (message["content"], *lines) if t)
        if message["role"] in ("tool", "function", "ipython"):
            plain["role"] = "user"
        messages.append(plain)
    added = 0
    if chat.tools:
        listing = "Tools:\n" + json.dumps(chat.tools, ensure_ascii=False)
        if messages[0]["role"] == "system":
            messages[0]["content"] += f"\n\n{listing}"
        else:
            messages.insert(0, {"role": "system", "content": listing})
            added = 1
    return replace(chat, messages=messages, tools=None, first=chat.first + added)
