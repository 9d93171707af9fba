r"""Renders chats with the tokenizer's chat template, and locates the replies in the text.

Stock templates have no ``{% generation %}`` tags, from which transformers computes its mask. The
spans are therefore found by rendering prefixes. For the assistant's message i::

    prompt = render(messages[:i], add_generation_prompt=True)   <|im_start|>user … assistant\n
    text   = render(messages[:i + 1])                           … assistant\nHello<|im_end|>\n
    reply  = text[len(prompt):]                                 Hello<|im_end|>

Text after the end-of-turn token is no target. Some templates render a message differently once
the conversation continues (Qwen3 and DeepSeek drop earlier thinking). An *empty* thinking block may
be dropped; if anything else changes, the chat becomes one text per reply, each as the model will
see it when it generates that reply.
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
"""The date that some templates insert: fixed, so that a resumed run has the same tokens."""

FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace({k!r}, {v!r})" for k, v in TODAY.items())
    + " }}{%- endmacro %}"
)
"""Prepended to a template that inserts the date."""


@dataclass(frozen=True)
class RenderedChat:
    """A text and the character spans [start, end) of its targets.

    ``lossy``: the text lacks part of a reply.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    lossy: bool = False


class ChatRenderer:
    """Renders chats with the template of one tokenizer.

    If the template does not support tools, calls and results are rendered as JSON text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = tuple(special | set(tokenizer.all_special_tokens))

    def render(self, messages: list[dict], tools: list | None, prompt: bool = False) -> str:
        """The text by the template; ``prompt`` adds the header of the assistant's next reply."""
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
            fix = "correct the row, or set data.chat_template to a template that takes it"
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
        """The chat without tool calls if the template does not support them, else unchanged."""
        if "tool" in str(self.tokenizer.chat_template) or not uses_tools(chat):
            return chat
        return tools_as_text(chat)

    def prompt(self, chat: Chat, reply: int) -> str:
        """The prompt for message ``reply`` of an adapted chat."""
        return self.render(chat.messages[:reply], chat.tools, prompt=True)

    def _last_reply(
        self, messages: list[dict], tools: Any, where: str, known: dict[int, str]
    ) -> tuple[str, int]:
        """The text of a chat that ends in a reply, and the index where that reply starts.

        ``known`` has texts that are already rendered, by their number of messages.
        """
        text = known.get(len(messages)) or self.render(messages, tools)
        try:
            prompt = self.render(messages[:-1], tools, prompt=True)
        except Exception:  # a template may refuse a chat without messages
            prompt = None
        start = len(prompt) if prompt is not None and text.startswith(prompt) else None
        if start is None:
            start = self._first_difference(messages, tools, text)
        if not _shown(messages[-1], text[start:]):
            fix = "set data.chat_template to a template that shows assistant messages"
            raise DataError("the chat template does not show the reply", where=where, fix=fix)
        return text, start

    def _first_difference(self, messages: list[dict], tools: Any, text: str) -> int:
        """The first index at which the text changes if the reply's content is replaced."""
        reply = messages[-1]["content"].strip()
        other = "§" if not reply.startswith("§") else "¶"
        varied = self.render([*messages[:-1], {**messages[-1], "content": other}], tools)
        pairs = enumerate(zip(text, varied, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(text), len(varied)))

    def _span(self, full: str, text: str, start: int) -> tuple[int, int] | None:
        """The span in ``full`` of the reply ``text[start:]``; None if ``full`` lacks part of it."""
        if full.startswith(text):
            return start, len(text)
        if full[:start] != text[:start]:
            return None
        reply, rest = text[start:], full[start:]
        for end in self._ends(reply):
            for cut in range(_empty_blocks(reply) + 1):
                part = reply[cut:end]
                if part.strip() and rest.startswith(part):
                    return start, start + len(part)
        return None

    def _ends(self, reply: str) -> list[int]:
        """Possible ends of a reply: some templates (Phi) add an eos after the last message only."""
        eos, stripped = self.tokenizer.eos_token, reply.rstrip()
        if eos and stripped.endswith(eos):
            shorter = stripped[: -len(eos)]
            if shorter.rstrip().endswith(self.special):
                return [len(reply), len(shorter)]
        return [len(reply)]

    def _trim(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """The span up to its end-of-turn token, where generation stops."""
        start, end = span
        reply = text[start:end].rstrip()
        return (start, start + len(reply)) if reply.endswith(self.special) else span


def _empty_blocks(reply: str) -> int:
    """The number of leading characters in empty tags such as ``<think></think>``."""
    return len(reply) - len(re.sub(r"^(?:<[^<>|]*>|\s)*", "", reply))


def _said(message: dict) -> list[str]:
    calls = message.get("tool_calls", ())
    said = [message["content"], message.get("reasoning_content", "")]
    return [*said, *(c["function"]["name"] for c in calls)]


def _shown(message: dict, reply: str) -> bool:
    """Whether a rendered reply has text, and some word of the message if that has any."""
    words = re.findall(r"\w+", " ".join(_said(message)))
    return bool(reply.strip()) and (not words or any(w in reply for w in words))


def _lost(message: dict, reply: str) -> bool:
    """Whether the rendered reply lacks part of the message, such as its thinking or tool calls.

    White space and tags are ignored: templates trim, and some prompts open the thinking block.
    """
    shown = _words(reply)
    return any(_words(said) not in shown for said in _said(message))


def _words(text: str) -> str:
    return re.sub(r"<[^<>]*>|\s", "", text)


def uses_tools(chat: Chat) -> bool:
    """Whether a chat has tools, tool calls or tool results."""
    return chat.tools is not None or any(
        "tool_calls" in m or m["role"] in ("tool", "function", "ipython") for m in chat.messages
    )


def tools_as_text(chat: Chat) -> Chat:
    """The chat with tools in the system message, calls as JSON text, results as user messages."""
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
