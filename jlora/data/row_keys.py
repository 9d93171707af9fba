"""Keys of rows that no format reads: they are reported, as unknown settings are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jlora.data.formats import TEMPLATE_VARIABLES
from jlora.data.shown import REASONING_KEYS

CHAT_KEYS = {"tools", "functions", "system", "chat_template_kwargs", *TEMPLATE_VARIABLES}
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call"}
MESSAGE_KEYS |= {"weight", "train", *REASONING_KEYS}
TURN_KEYS = {"from", "value", "weight", "train"}
FUNCTION_KEYS = {"name", "arguments", "parameters"}
CALL_KEYS = {"id", "type", "function"} | FUNCTION_KEYS

KEYS = {
    "messages": {"messages"} | CHAT_KEYS,
    "sharegpt": {"conversations"} | CHAT_KEYS,
    "alpaca": {"instruction", "input", "output", "history"} | CHAT_KEYS,
    "text": {"text"},
    "classification": {"text", "label"},
}
"""The keys of a row that each format reads; those of ``prompt_completion`` depend on the row."""


@dataclass
class UnknownKeys:
    """How many rows have each key that is not read, and where the first of them is."""

    rows: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, format: str, value: Mapping) -> None:
        """Counts the keys of one row."""
        for name in dict.fromkeys(_unread(format, value)):
            self.rows[name] = self.rows.get(name, 0) + 1
            self.first.setdefault(name, where)

    def not_read_by(self, template: str) -> dict[str, int]:
        """The keys and their numbers of rows, without those that the chat template reads."""
        return {name: n for name, n in self.rows.items() if not is_read(name, template)}


def is_read(name: str, template: str) -> bool:
    """Whether a chat template reads a key; ShareGPT's turns and calls' other keys are not given."""
    if ".tool_calls[]." in name:
        return False
    if not name.startswith(("messages[]", "prompt[]", "completion[]", *VARIABLES)):
        return False
    return re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", template) is not None


VARIABLES = ("chat_template_kwargs.", *TEMPLATE_VARIABLES)
"""Names of a row's template variables begin so."""


def _unread(format: str, row: Mapping) -> Iterator[str]:
    known = KEYS[format] if format in KEYS else _completion_keys(row)
    for key, value in row.items():
        if value is None:
            continue
        if key not in known or key in TEMPLATE_VARIABLES:
            yield str(key)
        elif key == "chat_template_kwargs":
            yield from (f"{key}.{name}" for name in _parsed(value))
        elif key in ("messages", "conversations", "prompt", "completion"):
            messages = _parsed(value) if key in ("messages", "conversations") else value
            for message in messages if isinstance(messages, list) else ():
                yield from (f"{key}[].{name}" for name in _unread_of_message(key, message))


def _parsed(value: Any) -> Any:
    """A value that may be written as JSON text; the row has been converted, so it is valid."""
    return json.loads(value) if isinstance(value, str) else value


def _completion_keys(row: Mapping) -> set[str]:
    if row.get("prompt") is None and {"question", "answer"} <= row.keys():
        return {"question", "answer"}
    return {"prompt", "completion"} | (CHAT_KEYS if isinstance(row.get("prompt"), list) else set())


def _unread_of_message(key: str, message: Mapping) -> Iterator[str]:
    turn = key == "conversations" and "from" in message
    known = TURN_KEYS if turn else MESSAGE_KEYS
    yield from _others(message, known)
    for call in () if turn else message.get("tool_calls") or ():
        yield from (f"tool_calls[].{name}" for name in _others(call, CALL_KEYS))
        inner = _others(call.get("function", {}), FUNCTION_KEYS)
        yield from (f"tool_calls[].function.{name}" for name in inner)


def _others(value: Mapping, known: set[str]) -> Iterator[str]:
    return (str(key) for key, item in value.items() if item is not None and key not in known)
