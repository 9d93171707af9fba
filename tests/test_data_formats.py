"""Rows of every format, and the errors for malformed ones."""

import json

import pytest

from jlora.config import SourceConfig
from jlora.data.formats import FORMATS, BadRow, alpaca_prompt
from jlora.data.loading import load_rows
from jlora.data.rows import Chat, Completion, Text, learned_messages
from jlora.errors import DataError

USER = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
REPLY = {"role": "assistant", "content": "hello"}


def source(tmp_path, rows, format="messages", **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return SourceConfig(path=str(path), format=format, **options)


def test_messages():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, REPLY], "tools": '[{"name": "f"}]'}
    assert FORMATS["messages"]("x:1", row) == Chat("x:1", [USER, REPLY], TOOLS)


def test_tool_calls_become_objects_and_nulls_go():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    chat = FORMATS["messages"]("x:1", {"messages": [USER, message], "tools": None})
    wanted = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [wanted]}
    assert chat.tools is None


@pytest.mark.parametrize("role", ["function", "ipython"])
def test_legacy_calls_and_functions_become_tool_calls_and_tools(role):
    """OpenAI's older form; without it the reply would be empty and the tools unsaid."""
    legacy = {"role": "assistant", "content": None}
    legacy["function_call"] = {"name": "f", "arguments": '{"a": 1}'}
    result = {"role": role, "name": "f", "content": "2"}
    row = {"messages": [USER, legacy, result, REPLY], "functions": [{"name": "f"}]}
    chat = FORMATS["messages"]("x:1", row)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert chat.messages[2] == {"role": "tool", "name": "f", "content": "2"}
    assert chat.tools == TOOLS
    wrapped = FORMATS["messages"]("x:1", {"messages": [USER, REPLY], "tools": TOOLS})
    assert wrapped.tools == TOOLS


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": [USER, REPLY]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}]}),
        ("prompt_completion", {"prompt": [USER], "completion": [REPLY]}),
    ],
)
def test_every_chat_may_have_a_system_text_tools_and_template_variables(format, row):
    row = {**row, "system": "be brief", "tools": [{"name": "f"}], "enable_thinking": False}
    chat = FORMATS[format]("x:1", {**row, "chat_template_kwargs": {"date": "today"}})
    assert chat.messages[:2] == [{"role": "system", "content": "be brief"}, USER]
    assert chat.tools == TOOLS
    assert chat.template_variables == {"date": "today", "enable_thinking": False}
    assert list(learned_messages(chat)) == ([2] if len(chat.messages) > 2 else [])


@pytest.mark.parametrize("untrained", [{"weight": 0}, {"train": False}])
def test_messages_and_turns_that_are_not_trained(untrained):
    quiet = {**REPLY, **untrained}
    chat = FORMATS["messages"]("x:1", {"messages": [USER, quiet, USER, REPLY]})
    assert list(learned_messages(chat)) == [3]
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
    turns = [human, {**gpt, **untrained}, human, {**gpt, "train": True, "weight": 1}]
    chat = FORMATS["sharegpt"]("x:1", {"conversations": turns})
    assert list(learned_messages(chat)) == [3]


def test_keys_that_no_format_reads_are_counted(tmp_path):
    call = {"id": "1", "index": 0, "function": {"name": "f", "arguments": {}}}
    rows = [
        {"messages": [USER, {**REPLY, "mood": "good"}], "source": "web", "id": None},
        {"messages": [USER, {**REPLY, "tool_calls": [call], "mood": None}], "source": "book"},
        {"messages": [USER, REPLY], "chat_template_kwargs": {"date": "x"}, "enable_thinking": True},
    ]
    unknown = load_rows(source(tmp_path, rows)).unknown_keys
    wanted = {
        "source": 2,
        "messages[].mood": 1,
        "messages[].tool_calls[].index": 1,
        "chat_template_kwargs.date": 1,
        "enable_thinking": 1,
    }
    assert unknown.rows == wanted and unknown.first["source"].endswith(":1")
    left = unknown.not_read_by("{% if enable_thinking %}{{ date }}{{ source }}{{ m.mood }}")
    assert list(left) == ["source", "messages[].tool_calls[].index"]
    for format, row in (
        ("sharegpt", {"conversations": [{"from": "human", "value": "hi", "mood": "good"}]}),
        ("prompt_completion", {"prompt": "a", "completion": "b", "system": "S"}),
        ("text", {"text": "a", "title": "A"}),
        ("alpaca", {"instruction": "a", "output": "b", "context": "c"}),
    ):
        unknown = load_rows(source(tmp_path, [row], format)).unknown_keys
        assert len(unknown.not_read_by("mood system title context")) == 1, format


def test_a_lone_surrogate_makes_a_bad_row(tmp_path):
    half = '{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    config = source(tmp_path, [{"messages": [USER, REPLY]}, half])
    with pytest.raises(DataError, match="lone surrogate") as e:
        load_rows(config)
    assert e.value.where == f"{config.path}:2"
    assert len(load_rows(config, "skip").rows) == 1
    row = {"messages": [USER, REPLY], "tools": '[{"name": "f", "description": "\\udc00"}]'}
    with pytest.raises(DataError, match="lone surrogate"):
        load_rows(source(tmp_path, [row]))


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
    assert chat.tools == TOOLS


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


@pytest.mark.parametrize("arguments", [None, {}, "", "{}", "null"])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    (message,) = FORMATS["messages"]("x:1", {"messages": [calling(arguments)]}).messages
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


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


def calling(arguments):
    return {"role": "assistant", "function_call": {"name": "f", "arguments": arguments}}


def nested(depth):
    return [nested(depth - 1)] if depth else []


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
    ("messages", {"messages": [{**REPLY, "weight": 0.5}]}, "the weight 0.5", "0 or 1"),
    ("messages", {"messages": [{**REPLY, "thinking": True}]}, "'thinking' (a boolean)", "its text"),
    ("messages", {"messages": [{**REPLY, "reasoning": ["a"]}]}, "'reasoning' (a list)", "its text"),
    ("messages", {"messages": [calling("3")]}, "must be an object, not a number", "an object"),
    ("messages", {"messages": [calling([1])]}, "must be an object, not a list", "an object"),
    ("messages", {"messages": "[" * 200_000}, "'messages' is nested too deeply", None),
    (
        "messages",
        {"messages": [USER], "tools": [{"name": "f", "a": nested(600)}]},
        "nested too",
        None,
    ),
    ("messages", {"messages": [USER], "tools": "[" * 200_000}, "'tools' is nested too", None),
    ("messages", {"messages": [{**REPLY, "train": "no"}]}, "'train': 'no'", "true or false"),
    ("messages", {"messages": [USER], "tools": ["f"]}, "tools[0] is not valid JSON", None),
    ("messages", {"messages": [USER], "tools": [{"n": 1}]}, "tools[0] has no function", "write"),
    ("messages", {"messages": [USER], "tools": [1], "functions": [1]}, "both", "'tools'"),
    ("messages", {"messages": [USER], "chat_template_kwargs": [1]}, "must be an object", None),
    (
        "messages",
        {"messages": [{"role": "system", "content": "a"}, USER], "system": "b"},
        "its 'system' and its system message differ",
        "write it once",
    ),
    ("messages", {"messages": [{"role": "user"}], "text": "a"}, "no text 'content'", "correct the"),
    ("sharegpt", {"conversations": [{"from": ["a"], "value": ""}]}, "is from ['a']", "use one of"),
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


@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca"])
def test_lists_may_be_json_strings(format):
    """As in a CSV file, and in data sets whose rows have different keys."""
    key, value = {
        "messages": ("messages", [{"role": "user", "content": "[a]"}]),
        "sharegpt": ("conversations", [{"from": "human", "value": "a"}]),
        "alpaca": ("history", [["q", "a"]]),
    }[format]
    row = {"instruction": "i", "output": "o"} if format == "alpaca" else {}
    assert FORMATS[format]("", row | {key: json.dumps(value)}) == FORMATS[format](
        "", row | {key: value}
    )
    with pytest.raises(BadRow, match=f"'{key}' is not valid JSON"):
        FORMATS[format]("", row | {key: "[{"})
