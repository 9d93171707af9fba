r"""Renders chats with the tokenizer's chat template, and locates the replies in the text.

Stock templates have no ``{% generation %}`` tags, from which transformers computes its mask. Each
reply is therefore rendered as the model will be asked for it. For the assistant's message i::

    prompt = render(messages[:i], add_generation_prompt=True)   <|im_start|>user … assistant\n
    text   = render(messages[:i + 1])                           … assistant\nHello<|im_end|>\n
    reply  = text[len(prompt):]                                 Hello<|im_end|>

What a reply is trained after is always the prompt that inference gives it. Replies share one text
where each prompt continues the one before it and its reply. Where a template renders earlier
messages differently later on (Qwen3 and DeepSeek drop thinking, Mistral moves the system text to
the last user message), the chat becomes one text per reply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from jlora.data.rows import Chat, learned_messages
from jlora.data.shown import REASONING_KEYS, shows_context, shows_reply, shows_some, thinking
from jlora.data.tool_calls import ToolSupport, uses_tools
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


LONGEST_LEAD = 32
"""Characters between a prompt and a reply's content that a template may add to the reply."""

SHORTEST_END = 5
"""A prompt is recognised in another text by an end of more characters than these."""


@dataclass(frozen=True)
class RenderedChat:
    """A text and the character spans [start, end) of its targets."""

    text: str
    spans: tuple[tuple[int, int], ...]
    lossy: bool = False
    """The text lacks part of a reply: of its content, thinking or tool calls."""
    lacks_context: bool = False
    """A prompt lacks part of what was said before it, or tools."""
    excluded: tuple[tuple[int, int], ...] = ()
    """In a whole text: spans of messages that are no targets (``"weight": 0``)."""


class Reply(NamedTuple):
    """A reply after the prompt that asks for it, and what the template writes after the reply.

    The reply ends with its end-of-turn token.
    """

    prompt: str
    text: str
    rest: str


@dataclass(frozen=True)
class ChatRenderer:
    """Renders chats with the template of one tokenizer.

    Tools and calls are given to the template in its own form; what it does not show of them is
    written as JSON text.

    Args:
      tokenizer: transformers' tokenizer, with its chat template.
      variables: variables for the template, such as ``enable_thinking``; those of a row prevail.
    """

    tokenizer: Any
    variables: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tool_support(self) -> ToolSupport:
        """What of tools the template shows, and in which form it takes them."""
        return ToolSupport.of(lambda m, tools, prompt: self._apply(m, tools, prompt, {}))

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens."""
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        return tuple(special | set(self.tokenizer.all_special_tokens))

    def __call__(self, chat: Chat) -> list[RenderedChat]:
        """The text or texts of a chat with the spans of its replies, up to the last of them.

        Raises:
          DataError: the template refuses the messages, or shows a reply not at all or not after
            the prompt that asks for it.
        """
        return self._guarded(chat, self._texts)

    def whole(self, chat: Chat) -> RenderedChat:
        """The text of the whole chat, for a loss on all tokens; without spans.

        Raises:
          DataError: the template refuses the messages, or does not show a reply.
        """
        return self._guarded(chat, self._whole)

    def _guarded(self, chat: Chat, rendered: Any) -> Any:
        try:
            return rendered(self.adapt(chat))
        except DataError:
            raise
        except Exception as e:  # whatever a template raises: jinja's errors, TypeError, …
            fix = "correct the row, or set data.chat_template to a template that takes it"
            raise DataError(f"the chat template refuses it: {e}", where=chat.where, fix=fix) from e

    def adapt(self, chat: Chat) -> Chat:
        """The chat with tools as text where the template does not show them, else unchanged."""
        return self.tool_support.adapt(chat) if uses_tools(chat) else chat

    def _render(self, chat: Chat, count: int, prompt: bool = False) -> str:
        """The first ``count`` messages; ``prompt`` adds the header of the next reply."""
        messages = chat.messages[:count]
        if uses_tools(chat):
            messages = self.tool_support.in_form(messages)
        variables = {**self.variables, **chat.template_variables}
        return self._apply(messages, chat.tools, prompt, variables)

    def _apply(
        self, messages: list[dict], tools: list | None, prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        # A tokenizer may have another template for chats with tools.
        template = self.tokenizer.get_chat_template(None, tools)
        # Four fifths of the rendering time are transformers'. Its render_jinja_template alone takes
        # a fifth less, but what happens before (null keys, an empty chat) would have to be repeated
        # exactly; all prompts of a chat in one call take 3 to 10 % less.
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=FIXED_DATE + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=prompt,
            **variables,
        )

    def _whole(self, chat: Chat) -> RenderedChat:
        text, replies = self._render(chat, len(chat.messages)), list(learned_messages(chat))
        if not all(shows_some(chat.messages[i], text) for i in replies):
            raise _hidden(chat)
        shown = all(shows_reply(chat.messages[i], text) for i in replies)
        context = shows_context(chat.messages, chat.tools, text)
        untrained = [i for i, m in enumerate(chat.messages) if not m.get("weight", 1)]
        excluded = tuple(self._span(chat, i, text) for i in untrained)
        return RenderedChat(text, (), not shown, not context, excluded)

    def _span(self, chat: Chat, i: int, text: str) -> tuple[int, int]:
        """Where the text of a whole chat shows message i, up to its end-of-turn token.

        A reply's span is the one that it is trained by. Of other messages, and where replies are
        rendered differently later on, it is what changes if the message is another.
        """
        if chat.messages[i]["role"] == "assistant":
            with suppress(DataError):
                prompt, reply, _ = self._reply(chat, i)
                if text.startswith(prompt + reply):
                    return len(prompt), len(prompt) + len(reply)
        varied = self._without(chat, i, text)
        start = common_prefix(text, varied)
        end = max(start, len(text) - common_prefix(text[::-1], varied[::-1]))
        ends = [token for token in self.special if text[end:].startswith(token)]
        # After a user's message it may be the next header's first token.
        is_reply = chat.messages[i]["role"] == "assistant"
        if ends and (is_reply or self._render(chat, i + 1)[: end + 1] == text[: end + 1]):
            end += max(map(len, ends))
        return start, end

    def _without(self, chat: Chat, i: int, text: str) -> str:
        """The whole chat with another message i, that says nothing of what ``text`` has."""
        message = chat.messages[i]
        sign = next(c for c in map(chr, range(167, 9999)) if c not in text)

        def with_message(other: dict) -> str:
            messages = [*chat.messages[:i], other, *chat.messages[i + 1 :]]
            return self._render(replace(chat, messages=messages), len(messages))

        said = {key: sign for key in ("content", *REASONING_KEYS) if message.get(key)}
        if not message.get("tool_calls"):
            return with_message(message | said)
        with suppress(Exception):  # some templates refuse results without their calls
            return with_message({"role": message["role"], "content": sign})
        function = {"name": sign, "arguments": {sign: sign}}
        calls = [{**call, "function": function} for call in message["tool_calls"]]
        return with_message({**message, **said, "tool_calls": calls})

    def _texts(self, chat: Chat) -> list[RenderedChat]:
        turns = list(learned_messages(chat))
        if not turns:
            return [self._whole(chat)]
        # Two renderings for each, also where the next prompt continues the text before: some
        # templates render the last reply in another way.
        replies = [self._reply(chat, i) for i in turns]
        lossy = not all(
            shows_reply(chat.messages[i], r.text) for i, r in zip(turns, replies, strict=True)
        )
        lacks = not all(
            shows_context(chat.messages[:i], chat.tools, r.prompt)
            for i, r in zip(turns, replies, strict=True)
        )
        texts = self._joined(replies)
        return [RenderedChat(text, tuple(spans), lossy, lacks) for text, spans in texts]

    def _joined(self, replies: list[Reply]) -> list[tuple[str, list[tuple[int, int]]]]:
        """Texts with the spans of replies, which share one as long as prompts continue it."""
        texts: list[tuple[str, list[tuple[int, int]]]] = []
        for prompt, reply, rest in replies:
            spans: list[tuple[int, int]] = []
            if texts:
                text, earlier = texts[-1]
                start, end = earlier[-1]
                ends = (end, start + self._shorter(text[start:end]))
                if fitting := [e for e in ends if prompt.startswith(text[:e])]:
                    spans = [*earlier[:-1], (start, fitting[0])]
                    texts.pop()
            spans.append((len(prompt), len(prompt) + len(reply)))
            texts.append((prompt + reply + rest, spans))
        return texts

    def _shorter(self, reply: str) -> int:
        """The end of a reply without an eos that a template (Phi's) adds to the last one only."""
        eos = self.tokenizer.eos_token
        if eos and reply.endswith(eos):
            shorter = reply[: -len(eos)].rstrip()
            if shorter.endswith(self.special):
                return len(shorter)
        return len(reply)

    def _reply(self, chat: Chat, i: int) -> Reply:
        """Message i after the prompt that asks for it."""
        message, text = chat.messages[i], self._render(chat, i + 1)
        try:
            prompt = self._render(chat, i, prompt=True)
        except Exception:
            if i:
                raise
            prompt = text[: self._content_start(chat, i, text)]  # some refuse an empty chat
        reply = self._after(prompt, text, chat, i)
        if reply is None:
            cause = "the chat template's prompt for a reply is not how it begins the same chat"
            fix = "set data.chat_template to a template that shows the prompt before the reply"
            raise DataError(cause, where=chat.where, fix=fix)
        if not shows_some(message, reply):
            raise _hidden(chat)
        end = self._end_of_turn(reply)
        return Reply(prompt, reply[:end], reply[end:])

    def _end_of_turn(self, reply: str) -> int:
        """Where a reply ends: after its first eos, where generation stops, or its last token."""
        eos = self.tokenizer.eos_token
        if eos and (at := reply.find(eos)) >= 0:
            return at + len(eos)
        ended = reply.rstrip()
        return len(ended) if ended.endswith(self.special) else len(reply)

    def _after(self, prompt: str, text: str, chat: Chat, i: int) -> str | None:
        """What follows the prompt in a text that renders it differently; None if unclear.

        A prompt that opens a thought (``<think>``) is followed by the reply's, and its end.
        """
        if text.startswith(prompt):
            return text[len(prompt) :]
        opened = re.search(r"<(\w+)>\s*$", prompt)
        stem = (prompt[: opened.start()] if opened else prompt).rstrip()
        context = self._render(chat, i)
        if text.startswith(stem):
            start = len(stem)
        elif text.startswith(context):  # the reply has another header, or none
            start = len(context)
        elif (start := self._end_of_prompt(stem, text, chat, i)) is None:
            return None
        reply = text[start:] if opened is None and stem == prompt else text[start:].lstrip()
        if opened is None:
            return reply
        tag = opened[1]
        if reply.startswith(f"<{tag}>"):
            return reply.removeprefix(f"<{tag}>").lstrip()
        if f"</{tag}>" in reply:
            return reply
        return f"{thinking(chat.messages[i])}\n</{tag}>\n\n{reply}"

    def _end_of_prompt(self, prompt: str, text: str, chat: Chat, i: int) -> int | None:
        """Where a text has the end of a prompt, before the content of message i; None if nowhere.

        The prompt may hold what the text does not (Mistral's system text).
        """
        content, best, longest = self._content_start(chat, i, text), None, 0
        for end in range(content, max(content - LONGEST_LEAD, 0) - 1, -1):
            common = common_prefix(prompt[::-1], text[:end][::-1])
            if common > max(longest, SHORTEST_END):
                best, longest = end, common
        return best

    def _content_start(self, chat: Chat, i: int, text: str) -> int:
        """The first index at which the text changes if the reply is another."""
        # A text that differs in its first character: the two renderings part where the content
        # begins.
        other = "§" if not chat.messages[i]["content"].lstrip().startswith("§") else "¶"
        messages = [*chat.messages[:i], {"role": "assistant", "content": other}]
        varied = self._render(replace(chat, messages=messages), i + 1)
        return common_prefix(text, varied)


def common_prefix(a: Sequence, b: Sequence) -> int:
    """The number of characters, or of other items, with which both begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _hidden(chat: Chat) -> DataError:
    fix = "set data.chat_template to a template that shows assistant messages"
    return DataError("the chat template does not show the reply", where=chat.where, fix=fix)
