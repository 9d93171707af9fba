"""Converts rows of every format to one of the four kinds of ``rows``.

====================  ===========================================================================
format                a row
====================  ===========================================================================
``messages``          ``{"messages": [{"role", "content"[, "tool_calls"]}], ["tools"]}`` (OpenAI)
``sharegpt``          ``{"conversations": [{"from", "value"}], ["system"], ["tools"]}``
``alpaca``            ``{"instruction", "output"[, "input", "system", "history"]}``
``prompt_completion`` ``{"prompt", "completion"}``: strings or lists of messages (TRL);
                      also ``{"question", "answer"}``, joined by a line break
``text``              ``{"text"}``, or a whole ``.txt`` file
``classification``    ``{"text", "label"}``: the class as its index or name
====================  ===========================================================================

A converter raises BadRow, with a cause and a remedy, if a row is malformed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from jlora.data.rows import ROLES, Chat, Completion, LabelledText, Row, Text
from jlora.errors import did_you_mean

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


class BadRow(ValueError):
    """Why a row is malformed, and what to do about it."""

    def __init__(self, cause: str, fix: str | None = None):
        super().__init__(cause)
        self.fix = fix


def detect_format(value: Any, format: str) -> str | None:
    """The format other than ``format`` that a row's keys belong to, or None."""
    if not isinstance(value, Mapping):
        return None
    signs = {
        "messages": {"messages"},
        "sharegpt": {"conversations"},
        "alpaca": {"instruction", "output"},
        "prompt_completion": {"prompt", "completion"},
        "text": {"text"},
        "classification": {"text", "label"},
    }
    found = [name for name, keys in signs.items() if keys <= value.keys() and name != format]
    if {"question", "answer"} <= value.keys() and format != "prompt_completion":
        found.append("prompt_completion")
    return found[0] if found else None


def _object(value: Any) -> dict:
    """The keys of a row that have values: tabular files have null for missing ones."""
    if not isinstance(value, Mapping):
        raise BadRow(f"a row must be an object, not {_kind(value)}")
    return {k: v for k, v in value.items() if v is not None}


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _field(row: Mapping, key: str, kind: Any = str, default: Any = ...) -> Any:
    if key not in row:
        if default is not ...:
            return default
        raise BadRow(f"no {key!r} (the row has {', '.join(map(repr, row)) or 'no keys'})")
    if not isinstance(row[key], kind):
        want = {str: "a string", list: "a list"}.get(kind, "a whole number or a string")
        raise BadRow(f"{key!r} must be {want}, not {_kind(row[key])}")
    return row[key]


def from_messages(where: str, value: Any) -> Chat:
    """``messages`` → Chat."""
    row = _object(value)
    return Chat(where, _messages(_field(row, "messages", list), "messages"), _tools(row))


def _messages(value: list, key: str) -> list[dict]:
    if not value:
        raise BadRow(f"{key!r} is empty")
    return [_message(m, f"{key}[{i}]") for i, m in enumerate(value)]


def _message(value: Any, at: str) -> dict:
    if not isinstance(value, Mapping):
        raise BadRow(f"{at} must be an object, not {_kind(value)}")
    message = {k: v for k, v in value.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        if role is None and {"from", "value"} <= message.keys():
            raise BadRow(f"{at} has no 'role'", "it looks like `format: sharegpt`")
        cause = f"{at} has the role {role!r}" if role is not None else f"{at} has no 'role'"
        raise BadRow(cause, did_you_mean(str(role), ROLES) or f"use one of {', '.join(ROLES)}")
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(c, at) for c in calls]
    else:
        message.pop("tool_calls", None)
    message["content"] = _content(message, at)
    return message


def _content(message: dict, at: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and "tool_calls" in message:
        return ""
    if isinstance(content, list):
        parts = [p for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str)]
        if len(parts) == len(content):
            return "".join(p["text"] for p in parts)
        raise BadRow(f"{at} has content that is not text", "only text can be learned")
    raise BadRow(f"{at} has no text 'content' ({_kind(content)})")


def _tool_call(call: Any, at: str) -> dict:
    """A call in OpenAI's format, but with its arguments as an object, as chat templates expect."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise BadRow(f"{at} has a tool call without a function name")
    arguments = inner.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parse(arguments, f"{at}'s tool call arguments")
    rest = {k: v for k, v in call.items() if k == "id" and v is not None}
    return {"type": "function", **rest, "function": {"name": inner["name"], "arguments": arguments}}


def _tools(row: Mapping) -> list | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse(tools, "'tools'") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"'tools' must be a list, not {_kind(tools)}")
    return tools or None


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise BadRow(f"{what} is not valid JSON: {e.msg} at column {e.colno}") from e


def from_sharegpt(where: str, value: Any) -> Chat:
    """``sharegpt`` → Chat; a ``function_call`` turn becomes an assistant's tool call."""
    row = _object(value)
    turns = _field(row, "conversations", list)
    if not turns:
        raise BadRow("'conversations' is empty")
    messages = [_turn(t, f"conversations[{i}]") for i, t in enumerate(turns)]
    if system := _field(row, "system", str, ""):
        messages.insert(0, {"role": "system", "content": system})
    return Chat(where, messages, _tools(row))


def _turn(turn: Any, at: str) -> dict:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{at} must be an object, not {_kind(turn)}")
    if "role" in turn and "from" not in turn:
        return _message(turn, at)
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in SHAREGPT_ROLES:
        fix = did_you_mean(str(speaker), SHAREGPT_ROLES)
        raise BadRow(f"{at} is from {speaker!r}", fix or f"use one of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(text, str):
        raise BadRow(f"{at} has no text 'value' ({_kind(text)})")
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES[speaker], "content": text}
    calls = _parse(text, f"{at}'s function call")
    calls = calls if isinstance(calls, list) else [calls]
    calls = [_tool_call(c, at) for c in calls]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def from_alpaca(where: str, value: Any) -> Chat:
    """``alpaca`` → Chat: instruction and input form one user message, separated by a blank line."""
    row = _object(value)
    task, given = _field(row, "instruction"), _field(row, "input", str, "")
    output, system = _field(row, "output"), _field(row, "system", str, "")
    rounds = [*_history(row), (f"{task}\n\n{given}" if given else task, output)]
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in rounds:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    plain = (alpaca_prompt(task, given, system, rounds[:-1]), output)
    return Chat(where, messages, plain=plain)


def _history(row: Mapping) -> list[tuple[str, str]]:
    history = _field(row, "history", list, [])
    for i, turn in enumerate(history):
        if not (isinstance(turn, list) and [type(t) for t in turn] == [str, str]):
            raise BadRow(f"history[{i}] must be a [user, assistant] pair of strings")
    return [tuple(turn) for turn in history]


def alpaca_prompt(task: str, given: str = "", system: str = "", history: Any = ()) -> str:
    """Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca), up to the reply.

    ``system`` replaces its opening sentence; earlier rounds precede as blocks with the same
    headings.
    """
    paired = ", paired with an input that provides further context" if given else ""
    system = system or (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request."
    )
    blocks = [f"### Instruction:\n{q}\n\n### Response:\n{a}" for q, a in history]
    blocks.append(f"### Instruction:\n{task}")
    if given:
        blocks.append(f"### Input:\n{given}")
    return "\n\n".join([system, *blocks, "### Response:\n"])


def from_prompt_completion(where: str, value: Any) -> Chat | Completion:
    """``prompt_completion`` → Completion for strings, Chat for lists of messages."""
    row = _object(value)
    if "prompt" not in row and {"question", "answer"} <= row.keys():
        return Completion(where, _field(row, "question") + "\n", _field(row, "answer"))
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return Completion(where, _field(row, "prompt"), _field(row, "completion"))
    if isinstance(row.get("completion"), str):
        raise BadRow("'prompt' is a list of messages, but 'completion' is a string")
    completion = _messages(_field(row, "completion", list), "completion")
    messages = [_message(m, f"prompt[{i}]") for i, m in enumerate(prompt)]
    return Chat(where, messages + completion, _tools(row), first=len(messages))


def from_text(where: str, value: Any) -> Text:
    """``text`` → Text."""
    text = _field(_object(value), "text")
    if not text.strip():
        raise BadRow("'text' is empty")
    return Text(where, text)


def from_classification(where: str, value: Any) -> LabelledText:
    """``classification`` → LabelledText."""
    text = from_text(where, value).text
    return LabelledText(where, text, _field(_object(value), "label", int | str))


FORMATS: dict[str, Callable[[str, Any], Row]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "prompt_completion": from_prompt_completion,
    "text": from_text,
    "classification": from_classification,
}
