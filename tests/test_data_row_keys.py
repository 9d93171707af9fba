"""Keys of rows that nothing reads."""

import json

import pytest

from jlora.data.formats import FORMATS
from jlora.data.row_keys import UnknownKeys, is_read

USER = {"role": "user", "content": "a"}
TURN = {"from": "human", "value": "a"}
CALL = {"function": {"name": "f", "arguments": {}, "result": 1, "other": None}, "at": 2}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
TASK = {"instruction": "a", "output": "b"}
TOOLS = [{"name": "f"}]


@pytest.mark.parametrize(
    ("format", "row", "unread"),
    [
        ("messages", {"messages": [USER], "origin": "web", "none": None}, ["origin"]),
        ("messages", {"messages": [{**USER, "from": "x"}]}, ["messages[].from"]),
        (
            "messages",
            {"messages": [CALLING]},
            ["messages[].tool_calls[].at", "messages[].tool_calls[].function.result"],
        ),
        ("messages", {"messages": json.dumps([{**USER, "mood": "x"}])}, ["messages[].mood"]),
        (
            "messages",
            {"messages": [USER], "chat_template_kwargs": '{"short": true}'},
            ["chat_template_kwargs.short"],
        ),
        (
            "sharegpt",
            {"conversations": [TURN, {"from": "gpt", "value": "x", "tool_calls": "abc"}]},
            ["conversations[].tool_calls"],
        ),
        ("sharegpt", {"conversations": json.dumps([{**TURN, "n": 1}])}, ["conversations[].n"]),
        ("sharegpt", {"conversations": [USER]}, []),
        ("alpaca", {**TASK, "tools": TOOLS, "origin": "web"}, ["origin"]),
        ("prompt_completion", {"prompt": "[1", "completion": "[2", "tools": []}, ["tools"]),
        (
            "prompt_completion",
            {"prompt": [USER], "completion": [CALLING], "tools": TOOLS},
            ["completion[].tool_calls[].at", "completion[].tool_calls[].function.result"],
        ),
    ],
)
def test_keys_that_a_format_does_not_read(format, row, unread):
    FORMATS[format]("x:1", row)
    keys = UnknownKeys()
    keys.add("x:1", format, row)
    assert list(keys.rows) == unread


def test_what_a_template_is_given_of_the_keys():
    template = "{{ m.mood }} {{ call.function.result }}"
    assert is_read("messages[].mood", template)
    assert not is_read("conversations[].mood", template)
    assert not is_read("messages[].tool_calls[].function.result", template)
