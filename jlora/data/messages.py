"""Messages, tool calls and tools of rows, in OpenAI's format.

Legacy spellings are converted: ``function_call`` and ``functions``, the roles ``function`` and
``ipython`` (Llama 3.1's) of results, tools that are not wrapped as ``{"type": "function",
"function": …}``, arguments as JSON text. Messages with ``"weight": 0`` or ``"train": false`` are no
training targets, whatever ``assistant_only_loss`` says (as in axolotl; TRL reads neither).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jlora.data.rows import ROLES
from jlora.data.shown import REASONING_KEYS
from jlora.errors import did_you_mean

RESULT_ROLES = ("tool", "function", "ipython")
"""Roles of messages that hold the result of a call; templates are given the first."""


class BadRow(ValueError):
    """Why a row is malformed, and what to do about it."""

    def __init__(self, cause: str, fix: str | None = None):
        super().__init__(cause)
        self.fix = fix


def json_kind(value: Any) -> str:
    """The kind of a JSON value in words, for messages."""
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text; BadRow, which names it as ``what``, if it is not valid."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise BadRow(f"{what} is not valid JSON: {e.msg} at column {e.colno}") from e
    except RecursionError as e:
        raise BadRow(f"{what} is nested too deeply") from e


def parse_messages(value: list, key: str) -> list[dict]:
    """The messages under ``key`` of a row."""
    if not value:
        raise BadRow(f"{key!r} is empty")
    return [parse_message(m, f"{key}[{i}]") for i, m in enumerate(value)]


def parse_message(value: Any, at: str) -> dict:
    """A message with a string as its content; keys that are null are left out."""
    if not isinstance(value, Mapping):
        raise BadRow(f"{at} must be an object, not {json_kind(value)}")
    message = {k: v for k, v in value.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        if role is None and {"from", "value"} <= message.keys():
            raise BadRow(f"{at} has no 'role'", "it looks like `format: sharegpt`")
        cause = f"{at} has the role {role!r}" if role is not None else f"{at} has no 'role'"
        raise BadRow(cause, did_you_mean(str(role), ROLES) or f"use one of {', '.join(ROLES)}")
    message["role"] = "tool" if role in RESULT_ROLES else role
    if role == "assistant":
        _check_reasoning(message, at)
    calls = message.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise BadRow(f"{at}'s 'tool_calls' must be a list, not {json_kind(calls)}")
    legacy = message.pop("function_call", None)
    if calls := calls or ([legacy] if legacy else []):
        message["tool_calls"] = [parse_tool_call(c, at) for c in calls]
    message["content"] = _content(message, at)
    return message | trained(message, at)


def _check_reasoning(message: Mapping, at: str) -> None:
    for key in REASONING_KEYS:
        if message.get(key) and not isinstance(message[key], str):
            raise BadRow(f"{at} has no text {key!r} ({json_kind(message[key])})", "write its text")


def trained(value: Mapping, at: str) -> dict:
    """``{"weight": 0}`` or ``{"weight": 1}`` if a message or turn says whether it is a target."""
    weight, train = value.get("weight"), value.get("train")
    if weight not in (None, 0, 1):
        raise BadRow(f"{at} has the weight {weight!r}", "a message's weight is 0 or 1")
    if train not in (None, 0, 1):
        raise BadRow(f"{at} has 'train': {train!r}", "write true or false")
    if weight is None and train is None:
        return {}
    return {"weight": 0 if weight == 0 or train == 0 else 1}


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
    raise BadRow(f"{at} has no text 'content' ({json_kind(content)})")


def parse_tool_call(call: Any, at: str) -> dict:
    """A call in OpenAI's format, but with its arguments as an object (see ``tool_calls``)."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise BadRow(f"{at} has a tool call without a function name")
    arguments = inner.get("arguments", inner.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{at}'s tool call arguments") or {}
    if not isinstance(arguments, Mapping):
        cause = f"{at}'s tool call arguments must be an object, not {json_kind(arguments)}"
        raise BadRow(cause, 'write an object: {"name": value}')
    rest = {k: v for k, v in call.items() if k == "id" and v is not None}
    return {"type": "function", **rest, "function": {"name": inner["name"], "arguments": arguments}}


def parse_tools(row: Mapping) -> list | None:
    """The tools of a row, each as ``{"type": "function", "function": …}``; None without any."""
    given = [key for key in ("tools", "functions") if row.get(key)]
    if len(given) > 1:
        raise BadRow("it has both 'tools' and 'functions'", "write all of them as 'tools'")
    if not given:
        return None
    key, tools = given[0], row[given[0]]
    if isinstance(tools, str):
        tools = parse_json(tools, repr(key)) if tools.strip() else []
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"{key!r} must be a list, not {json_kind(tools)}")
    return [_tool(tool, f"{key}[{i}]") for i, tool in enumerate(tools or ())] or None


def _tool(tool: Any, at: str) -> dict:
    if isinstance(tool, str):
        tool = parse_json(tool, at)
    if not isinstance(tool, Mapping):
        raise BadRow(f"{at} must be an object, not {json_kind(tool)}")
    function = tool.get("function", {k: v for k, v in tool.items() if k != "type"})
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"{at} has no function name", 'write {"type": "function", "function": {…}}')
    return (
        {"type": "function", **tool}
        if "function" in tool
        else {"type": "function", "function": function}
    )
