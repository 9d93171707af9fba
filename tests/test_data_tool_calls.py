"""Tools and calls in the form of each chat template, and what is shown of them."""

import json

import pytest
import tiny_tokenizer as tt

from jlora.config import SourceConfig
from jlora.data.chat import ChatRenderer
from jlora.data.examples import encode
from jlora.data.loading import load_rows
from jlora.data.rows import Chat
from jlora.data.shown import ShownText, shows_context, shows_reply
from jlora.data.tool_calls import ToolSupport

STYLES = ("CHATML", "QWEN3", "DEEPSEEK", "MISTRAL", "XML_CALLS", "TEXT_ARGUMENTS", "NO_TOOLS")
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Köln", "n": 3}}}
ROW = Chat(
    "x:1",
    [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1 km"},
        {"role": "tool", "content": "2 km"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3 km"},
        {"role": "assistant", "content": "Here."},
    ],
    TOOLS,
)


@pytest.mark.parametrize(
    ("style", "support"),
    [
        ("CHATML", ToolSupport(False, False)),
        ("QWEN3", ToolSupport(True, True)),
        ("MISTRAL", ToolSupport(True, True, needs_ids=True)),
        ("XML_CALLS", ToolSupport(True, True, null_content=True)),
        ("TEXT_ARGUMENTS", ToolSupport(True, True, arguments_as_text=True)),
        ("NO_TOOLS", ToolSupport(False, True, arguments_as_text=True)),
    ],
)
def test_what_a_template_supports(style, support):
    assert ChatRenderer(tt.tiny_tokenizer(getattr(tt, style))).tool_support == support


@pytest.mark.parametrize("style", STYLES)
def test_calls_tools_and_results_are_shown_by_every_template(style):
    render = ChatRenderer(tt.tiny_tokenizer(getattr(tt, style)))
    found = [(r.text[:a], r.text[a:b]) for r in render(ROW) for a, b in r.spans]
    assert len(found) == 4
    for (prompt, reply), i in zip(found, (1, 4, 6, 8), strict=True):
        assert "look_up" in prompt, "its tools"
        for message in ROW.messages[:i]:
            assert message["content"] in prompt
        for call in ROW.messages[i].get("tool_calls", ()):
            for said in (call["function"]["name"], "city", "Köln", "3"):
                assert said in reply
        assert ROW.messages[i]["content"] in reply
        adapted = render.adapt(ROW)
        turn = [j for j, m in enumerate(adapted.messages) if m["role"] == "assistant"]
        turn = turn[(1, 4, 6, 8).index(i)]
        form = render.tool_support.in_form(adapted.messages[:turn])
        assert prompt == render.tokenizer.apply_chat_template(
            form, tools=adapted.tools, tokenize=False, add_generation_prompt=True
        )
    assert not any(r.lossy or r.lacks_context for r in render(ROW))


def test_arguments_are_copied_as_json_where_a_template_wants_text():
    (rendered, *_) = ChatRenderer(tt.tiny_tokenizer(tt.TEXT_ARGUMENTS))(ROW)
    assert '<call>look_up {"city": "Köln", "n": 3}</call>' in rendered.text


def test_ids_of_calls_and_results_belong_together():
    support = ToolSupport(True, True, needs_ids=True)
    first, second = {**CALL, "id": "call_of_a_longer_kind"}, {**CALL, "id": "abcdefgh9"}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [first, second, CALL]},
        {"role": "tool", "content": "b", "tool_call_id": "abcdefgh9"},
        {"role": "tool", "content": "a", "tool_call_id": "call_of_a_longer_kind"},
        {"role": "tool", "content": "c"},
    ]
    calls, *results = support.in_form(messages)
    ids = [call["id"] for call in calls["tool_calls"]]
    assert ids == ["call00001", "abcdefgh9", "call00003"]
    assert [r["tool_call_id"] for r in results] == [ids[1], ids[0], ids[2]]
    assert "id" not in messages[0]["tool_calls"][2]


def test_real_rows_with_calls_are_taken_by_a_template_with_ids(assets):
    path = assets / "data" / "toolcall_sharegpt.json"
    rows = load_rows(SourceConfig(path=str(path), format="sharegpt")).rows[:120]
    examples, counts = encode(rows, tt.tiny_tokenizer(tt.MISTRAL), 100_000)
    assert not counts.bad and len(examples) >= 120
    assert (counts.lossy, counts.lacks_context, counts.tools_as_text) == (0, 0, 0)


def test_tools_are_listed_in_the_first_user_message_where_no_system_text_is_taken():
    """Gemma's template refuses system messages."""
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (rendered,) = ChatRenderer(tt.tiny_tokenizer(refusing + tt.CHATML))(ROW)
    assert rendered.text.startswith("<|im_start|>user\nTools:\n[{")
    assert "}]\n\nWhere?<|im_end|>" in rendered.text and not rendered.lacks_context


def test_tools_as_text_are_counted():
    _, counts = encode([ROW], tt.tiny_tokenizer(tt.NO_TOOLS), 4096)
    assert (counts.tools_as_text, counts.lossy, counts.lacks_context) == (1, 0, 0)
    _, counts = encode([Chat("x:1", ROW.messages)], tt.tiny_tokenizer(tt.NO_TOOLS), 4096)
    assert counts.tools_as_text == 0


def test_what_a_text_shows():
    text = ShownText('<think>\nso\n</think>\n\n A "b"\n c, {"d": "e\\nf \\"g\\""}')
    assert text.shows('A "b" c') and text.shows("<think>so</think>") and text.shows('e\nf "g"')
    assert not text.shows("A b")
    message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    xml = "<function=look_up><parameter=city>Köln</parameter><parameter=n>3</parameter>"
    for reply in (xml, json.dumps(CALL["function"]), json.dumps({"arguments": xml})):
        assert shows_reply(message, reply)
    for reply in (xml.replace("look_up", "f"), xml.replace("Köln", "Bonn"), xml.replace("3", "")):
        assert not shows_reply(message, reply)
    assert not shows_reply({"content": "a", "reasoning_content": "why"}, "a")
    history = [{"role": "assistant", "content": "<think>why</think>a"}]
    assert shows_context(history, None, "a") and not shows_context(history, TOOLS, "a")
