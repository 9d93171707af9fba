"""Rows of every format, and the errors for malformed ones."""

import json

import pytest

from jlora.config import SourceConfig
from jlora.data.formats import FORMATS, alpaca_prompt
from jlora.data.loading import load_rows
from jlora.data.rows import Chat, Completion, Text, learned_messages
from jlora.errors import DataError

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}


def source(tmp_path, rows, format="messages", **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return SourceConfig(path=str(path), format=format, **options)


def test_messages():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, REPLY], "tools": '[{"name": "f"}]'}
    assert FORMATS["messages"]("x:1", row) == Chat("x:1", [USER, REPLY], [{"name": "f"}])


def test_tool_calls_become_objects_and_nulls_go():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    chat = FORMATS["messages"]("x:1", {"messages": [USER, message], "tools": None})
    wanted = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [wanted]}
    assert chat.tools is None


def test_sharegpt_with_calls_and_observations():
    turns = [
        ("human", "hi"),
        ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
        ("observation", "2"),
        ("gpt", "two"),
    ]
    row = {"conversations": [{"from": a, "value": b} for a, b in turns], "system": "be brief"}
    chat = FORMATS["sharegpt"]("x:1", {**row, "tools": '[{"name": "f"}]'})
    roles = [m["role"] for m in chat.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert chat.messages[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert chat.tools == [{"name": "f"}]


def test_alpaca():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]}
    chat = FORMATS["alpaca"]("x:1", {**row, "system": "S"})
    wanted = [("system", "S"), ("user", "a"), ("assistant", "b")]
    wanted += [("user", "Add.\n\n1 2"), ("assistant", "3")]
    assert [(m["role"], m["content"]) for m in chat.messages] == wanted
    assert chat.plain == (
        "S\n\n### Instruction:\na\n\n### Response:\nb\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )


def test_alpaca_prompt_is_stanfords():
    assert alpaca_prompt("Say hi.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert alpaca_prompt("T", "I") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nT\n\n### Input:\nI\n\n### Response:\n"
    )


def test_prompt_completion():
    make = FORMATS["prompt_completion"]
    assert make("x:1", {"prompt": "a", "completion": "b"}) == Completion("x:1", "a", "b")
    assert make("x:1", {"question": "a", "answer": "b"}) == Completion("x:1", "a\n", "b")
    chat = make("x:1", {"prompt": [USER, REPLY, USER], "completion": [REPLY]})
    assert chat == Chat("x:1", [USER, REPLY, USER, REPLY], first=3)
    assert list(learned_messages(chat)) == [3]


def test_text():
    assert FORMATS["text"]("x:1", {"text": "a"}) == Text("x:1", "a")


def test_weight_zero_is_context():
    quiet = {**REPLY, "weight": 0}
    assert list(learned_messages(Chat("x:1", [USER, quiet, USER, REPLY]))) == [3]


BAD = [
    ("messages", {"messages": []}, "'messages' is empty", None),
    ("messages", {"messages": "hi"}, "'messages' must be a list, not a string", None),
    ("messages", [1], "a row must be an object, not a list", None),
    ("messages", {"messages": [{"role": "asistant", "content": ""}]}, "'asistant'", "'assistant'"),
    ("messages", {"messages": [{"content": ""}]}, "messages[0] has no 'role'", "use one of"),
    ("messages", {"messages": [{"role": "user"}]}, "no text 'content' (null)", None),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "content that is not text",
        "only text",
    ),
    ("messages", {"messages": [{"from": "human", "value": ""}]}, "'role'", "format: sharegpt"),
    ("messages", {"conversations": []}, "no 'messages' (the row has 'con", "format: sharegpt"),
    ("messages", {"instruction": "", "output": ""}, "no 'messages'", "format: alpaca"),
    ("sharegpt", {"messages": []}, "no 'conversations'", "format: messages"),
    (
        "sharegpt",
        {"conversations": [{"from": "humans", "value": ""}]},
        "conversations[0] is from 'humans'",
        "'human'",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "{a"}]},
        "function call is not valid JSON",
        None,
    ),
    ("alpaca", {"question": "", "answer": ""}, "no 'instruction'", "format: prompt_completion"),
    ("alpaca", {"instruction": 1, "output": ""}, "'instruction' must be a string, not a n", None),
    ("alpaca", {"instruction": "", "output": "", "history": ["a"]}, "history[0]", None),
    ("prompt_completion", {"text": "a"}, "no 'prompt'", "format: text"),
    ("prompt_completion", {"prompt": [USER], "completion": "a"}, "'completion' is a str", None),
    ("text", {"text": " "}, "'text' is empty", None),
    ("text", {"prompt": "", "completion": ""}, "no 'text'", "format: prompt_completion"),
]


@pytest.mark.parametrize(("format", "row", "cause", "fix"), BAD)
def test_a_bad_row_is_reported_with_place_cause_and_remedy(tmp_path, format, row, cause, fix):
    config = source(tmp_path, [row], format)
    with pytest.raises(DataError) as e:
        load_rows(config)
    assert e.value.where == f"{config.path}:1"
    assert cause in e.value.cause
    assert (fix or "") in e.value.fix


def test_several_bad_rows_are_listed_together_or_skipped(tmp_path):
    good = {"messages": [USER, REPLY]}
    config = source(tmp_path, ["{", good, *[{}] * 7, good])
    with pytest.raises(DataError) as e:
        load_rows(config)
    assert e.value.where == f"{config.path}:1"
    for shown in ("not valid JSON", ":3: no 'messages'", ":6:", "and 3 more", "8 of 10 rows"):
        assert shown in e.value.cause
    assert "on_bad_row=skip" in e.value.fix
    assert f"{config.path}:7:" not in e.value.cause
    rows = load_rows(config, "skip")
    assert len(rows.rows) == 2 and len(rows.bad) == 8


def test_skipping_every_row_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no 'messages'"):
        load_rows(source(tmp_path, [{}]), "skip")


def test_a_split_may_not_be_empty(tmp_path):
    with pytest.raises(DataError, match="selects no rows"):
        load_rows(source(tmp_path, [{"messages": [USER, REPLY]}], split="train[1:]"))


@pytest.mark.parametrize(
    ("file", "format", "count"),
    [
        ("instruction.json", "alpaca", 1100),
        ("identity_alpaca.json", "alpaca", 91),
        ("toolcall_sharegpt.json", "sharegpt", 300),
        ("gsm8k/test.jsonl", "prompt_completion", 1319),
        ("tinyshakespeare.txt", "text", 1),
    ],
)
def test_real_files(assets, file, format, count):
    path = assets / "data" / file
    rows = load_rows(SourceConfig(path=str(path), format=format)).rows
    assert len(rows) == count
    line = int(rows[-1].where.rpartition(":")[2])
    assert line <= path.read_text(encoding="utf-8").count("\n") + 1
