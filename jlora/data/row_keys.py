"""Keys of rows that no format reads: they are reported, as unknown settings are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jlora.data.formats import TEMPLATE_VARIABLES
from jlora.data.shown import REASONING_KEYS

CHAT_KEYS = {"tools", "functions", "system", "chat_template_kwargs", *TEMPLATE_VARIABLES}
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call"}
MESSAGE_KEYS |= {"weight", "train", *REASONING_KEYS}
TURN_KEYS = {"from", "value", "weight", "train"}
CALL_KEYS = {"id", "type", "function", "name", "arguments", "parameters"}

KEYS = {
    "messages": {"messages"} | CHAT_KEYS,
    "sharegpt": {"conversations"} | CHAT_KEYS,
    "alpaca": {"instruction", "input", "output", "system", "history", "chat_template_kwargs"}
    | {*TEMPLATE_VARIABLES},
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
    """Whether a chat template reads a key; turns of ShareGPT are not given to it."""
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
        elif key == "chat_template_kwargs" and isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in value)
        elif key in ("messages", "conversations", "prompt", "completion"):
            for message in value if isinstance(value, list) else ():
                yield from (f"{key}[].{name}" for name in _unread_of_message(message))


def _completion_keys(row: Mapping) -> set[str]:
    if row.get("prompt") is None and {"question", "answer"} <= row.keys():
        return {"question", "answer"}
    return {"prompt", "completion"} | (CHAT_KEYS if isinstance(row.get("prompt"), list) else set())


def _unread_of_message(message: Mapping) -> Iterator[str]:
    known = TURN_KEYS if "from" in message else MESSAGE_KEYS
    for key, value in message.items():
        if value is not None and key not in known:
            yield str(key)
    for call in message.get("tool_calls") or ():
        for key, value in call.items():
            if value is not None and key not in CALL_KEYS:
                yield f"tool_calls[].{key}"
