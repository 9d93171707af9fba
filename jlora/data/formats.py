"""Converts rows of every format to one of the four kinds of ``rows``.

====================  ===========================================================================
format                a row
====================  ===========================================================================
``messages``          ``{"messages": [{"role", "content"[, "tool_calls"]}]}`` (OpenAI)
``sharegpt``          ``{"conversations": [{"from", "value"}]}``
``alpaca``            ``{"instruction", "output"[, "input", "system", "history"]}``
``prompt_completion`` ``{"prompt", "completion"}``: strings or lists of messages (TRL);
                      also ``{"question", "answer"}``, joined by a line break
``text``              ``{"text"}``, or a whole ``.txt`` file
``classification``    ``{"text", "label"}``: the class as its index or name
====================  ===========================================================================

Rows of messages may have ``tools`` (or ``functions``), ``system``, and variables for the chat
template: ``chat_template_kwargs``, ``enable_thinking``. A converter raises BadRow, with a cause and
a remedy, if a row is malformed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jlora.data.messages import (
    BadRow,
    json_kind,
    parse_json,
    parse_message,
    parse_messages,
    parse_tool_call,
    parse_tools,
    trained,
)
from jlora.data.rows import Chat, Completion, LabelledText, Row, Text
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

TEMPLATE_VARIABLES = ("enable_thinking",)
"""Variables of chat templates that a row may have as keys of its own."""


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
    if signs[format] <= value.keys():
        return None
    found = [name for name, keys in signs.items() if keys <= value.keys()]
    if {"question", "answer"} <= value.keys() and format != "prompt_completion":
        found.append("prompt_completion")
    return found[0] if found else None


def _object(value: Any) -> dict:
    """The keys of a row that have values: tabular files have null for missing ones."""
    if not isinstance(value, Mapping):
        raise BadRow(f"a row must be an object, not {json_kind(value)}")
    return {k: v for k, v in value.items() if v is not None}


def _field(row: Mapping, key: str, kind: Any = str, default: Any = ...) -> Any:
    if key not in row:
        if default is not ...:
            return default
        raise BadRow(f"no {key!r} (the row has {', '.join(map(repr, row)) or 'no keys'})")
    if not isinstance(row[key], kind):
        want = {str: "a string", list: "a list"}.get(kind, "a whole number or a string")
        raise BadRow(f"{key!r} must be {want}, not {json_kind(row[key])}")
    return row[key]


def from_messages(where: str, value: Any) -> Chat:
    """``messages`` → Chat."""
    row = _object(value)
    return _chat(where, row, parse_messages(_list(row, "messages"), "messages"))


def _list(row: Mapping, key: str) -> list:
    """A list, or one as a JSON string, as CSV files have it."""
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        row = {**row, key: parse_json(value, repr(key))}
    return _field(row, key, list)


def _chat(
    where: str,
    row: Mapping,
    messages: list[dict],
    first: int = 0,
    plain: tuple[str, str] | None = None,
) -> Chat:
    """A chat of these messages, with the row's tools, system text and template variables."""
    system = _field(row, "system", str, "")
    if system and messages[0]["role"] != "system":
        messages, first = [{"role": "system", "content": system}, *messages], first and first + 1
    elif system and messages[0]["content"] != system:
        fix = "write it once: as 'system', or as the first message"
        raise BadRow("its 'system' and its system message differ", fix)
    variables = _template_variables(row)
    return Chat(where, messages, parse_tools(row), first, plain, variables)


def _template_variables(row: Mapping) -> dict[str, Any]:
    given = row.get("chat_template_kwargs", {})
    if isinstance(given, str):
        given = parse_json(given, "'chat_template_kwargs'")
    if not isinstance(given, Mapping):
        raise BadRow(f"'chat_template_kwargs' must be an object, not {json_kind(given)}")
    truths = {"true": True, "false": False}  # a CSV file's are strings
    keys = {key: row[key] for key in TEMPLATE_VARIABLES if key in row}
    return {**given, **{k: truths.get(str(v).lower(), v) for k, v in keys.items()}}


def from_sharegpt(where: str, value: Any) -> Chat:
    """``sharegpt`` → Chat; a ``function_call`` turn becomes an assistant's tool call."""
    row = _object(value)
    turns = _list(row, "conversations")
    if not turns:
        raise BadRow("'conversations' is empty")
    return _chat(where, row, [_turn(t, f"conversations[{i}]") for i, t in enumerate(turns)])


def _turn(turn: Any, at: str) -> dict:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{at} must be an object, not {json_kind(turn)}")
    if "role" in turn and "from" not in turn:
        return parse_message(turn, at)
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        fix = did_you_mean(str(speaker), SHAREGPT_ROLES)
        raise BadRow(f"{at} is from {speaker!r}", fix or f"use one of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(text, str):
        raise BadRow(f"{at} has no text 'value' ({json_kind(text)})")
    message = {"role": SHAREGPT_ROLES[speaker], "content": text, **trained(turn, at)}
    if speaker != "function_call":
        return message
    calls = parse_json(text, f"{at}'s function call")
    calls = calls if isinstance(calls, list) else [calls]
    calls = [parse_tool_call(c, at) for c in calls]
    return {**message, "content": "", "tool_calls": calls}


def from_alpaca(where: str, value: Any) -> Chat:
    """``alpaca`` → Chat: instruction and input form one user message, separated by a blank line."""
    row = _object(value)
    task, given = _field(row, "instruction"), _field(row, "input", str, "")
    output, system = _field(row, "output"), _field(row, "system", str, "")
    rounds = [*_history(row), (f"{task}\n\n{given}" if given else task, output)]
    messages = []
    for user, assistant in rounds:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    plain = (alpaca_prompt(task, given, system, rounds[:-1]), output)
    return _chat(where, row, messages, plain=plain)


def _history(row: Mapping) -> list[tuple[str, str]]:
    history = _list(row, "history") if row.get("history") else []
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
    completion = parse_messages(_field(row, "completion", list), "completion")
    messages = [parse_message(m, f"prompt[{i}]") for i, m in enumerate(prompt)]
    return _chat(where, row, messages + completion, first=len(messages))


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
