"""Spans of replies, compared with transformers' mask and with expected texts."""

import re

import pytest
import tiny_tokenizer as tt

from jlora.data.chat import ChatRenderer
from jlora.data.rows import Chat
from jlora.errors import DataError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def chat(*contents, first="user", **options):
    """Alternating messages that begin with ``first``."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return Chat("x.jsonl:7", messages, **options)


def system(text, rest):
    return Chat(rest.where, [{"role": "system", "content": text}, *rest.messages])


def replies(rendered):
    return [rendered.text[s:e] for s, e in rendered.spans]


def render(template, row, **special):
    return ChatRenderer(tt.tiny_tokenizer(template, **special))(row)


@pytest.mark.parametrize(
    "row",
    [
        chat("hi", "hello"),
        chat("a", "b", "c", "d\nd\n", "e"),
        system("be brief", chat("a", "", "c", "<think>\nx\n</think>\n\ny")),
    ],
)
def test_spans_match_generation_tags(row):
    """Oracle: transformers' mask, which needs tags that stock templates do not have."""
    tagged = tt.tiny_tokenizer(tt.GENERATION)
    oracle = tagged.apply_chat_template(
        row.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [t for t, m in zip(oracle["input_ids"], oracle["assistant_masks"], strict=True) if m]
    for template in (tt.GENERATION, tt.CHATML):
        (rendered,) = render(template, row)
        whole = tagged.apply_chat_template(row.messages, tokenize=False)
        assert whole.startswith(rendered.text)
        actual = [t for r in replies(rendered) for t in tagged(r)["input_ids"]]
        assert actual == ids


def test_llama3_trims_and_has_a_fixed_date():
    (rendered,) = render(tt.LLAMA3, chat(" a ", " b ", "c", "d\n"))
    assert replies(rendered) == ["b<|stop|>", "d<|stop|>"]
    assert rendered.text.startswith("<|begin|><|start|>system<|start|>\n\nToday: 26 Jul 2024\n")
    assert not rendered.lossy


def inference_prompt(tokenizer, messages, tools=None):
    """What transformers gives a model to reply to."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )


STYLES = ("CHATML", "QWEN3", "DEEPSEEK", "THINKING", "PHI", "HARMONY", "MISTRAL", "XML_CALLS")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "row",
    [
        chat("a", "b"),
        chat("a", "b", "c", "d", "e", "f"),
        system("be brief", chat("a", "b", "c", "d")),
        chat("a", "<think>\nwhy\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd"),
    ],
)
def test_every_reply_follows_the_prompt_of_inference(style, row):
    tokenizer = tt.tiny_tokenizer(getattr(tt, style))
    turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
    rendered = ChatRenderer(tokenizer)(row)
    found = [(r.text[:start], r.text[start:end]) for r in rendered for start, end in r.spans]
    for (prompt, reply), i in zip(found, turns, strict=True):
        assert prompt == inference_prompt(tokenizer, row.messages[:i])
        for part in row.messages[i]["content"].replace("<think>", "").split("</think>"):
            assert part.strip() in reply
    assert not any(r.lossy or r.lacks_context for r in rendered)


def test_qwen3_learns_every_reply_with_an_empty_thinking_block():
    first, last = render(tt.QWEN3, chat("a", "b", "c", "d"))
    assert replies(first) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    assert replies(last) == ["<think>\n\n</think>\n\nd<|im_end|>"]


def test_mistral_moves_the_system_text_to_the_last_user_message():
    first, last = render(tt.MISTRAL, system("be brief", chat("a", "b", "c", "d")))
    assert first.text == "<|begin|>[INST] be brief\n\na[/INST] b<|eos|>" and replies(first) == [
        " b<|eos|>"
    ]
    assert last.text == "<|begin|>[INST] a[/INST] b<|eos|>[INST] be brief\n\nc[/INST] d<|eos|>"
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "2"}
    row = system("be brief", chat("a"))
    row = Chat("x:1", [*row.messages, call, result, {"role": "assistant", "content": "two"}], TOOLS)
    called, answered = render(tt.MISTRAL, row)
    assert "[INST] be brief\n\na[/INST][CALLS] [{" in called.text
    assert replies(called) == [
        '[CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "call00001"}]<|eos|>'
    ]
    # After a result the last message is no user's: the system text is lost, and that is reported.
    assert answered.text.endswith("[RESULTS] 2call00001[/RESULTS] two<|eos|>")
    assert answered.lacks_context and not answered.lossy


def test_qwen3_chats_with_thoughts_become_one_text_per_reply():
    first, last = render(tt.QWEN3, chat("a", "<think>\nwhy\n</think>\n\nb", "c", "d"))
    assert replies(first) == ["<think>\nwhy\n</think>\n\nb<|im_end|>"]
    assert first.text.endswith("b<|im_end|>\n")
    assert replies(last) == ["<think>\n\n</think>\n\nd<|im_end|>"]
    assert "assistant\nb<|im_end|>" in last.text and "why" not in last.text
    assert not first.lossy


def test_qwen3_keeps_thoughts_between_tool_calls():
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    (rendered,) = render(tt.QWEN3, Chat("x:1", messages, TOOLS))
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert replies(rendered) == [
        "<think>\nhm\n</think>\n\n" + call,
        "<think>\n\n</think>\n\ntwo<|im_end|>",
    ]
    assert not rendered.lossy


def test_deepseeks_prompt_opens_a_thought_that_its_chats_do_not_have():
    first, last = render(tt.DEEPSEEK, chat("a", "b", "c", "<think>why</think>d"))
    assert first.text == "a<|start|><think>\n\n</think>\n\nb<|eos|>"
    assert replies(first) == ["\n</think>\n\nb<|eos|>"]
    assert last.text == "a<|start|>b<|eos|>c<|start|><think>\nwhy\n</think>\n\nd<|eos|>"
    assert not last.lossy


def test_a_reply_has_neither_its_header_nor_what_follows_its_eos():
    """DeepSeek's template writes later calls without the header that the prompt ends in."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}"
        "{% elif loop.index0 == 1 %}{{ '<|start|>' + m.content + '<|eos|><|start|><|eos|>' }}"
        "{% else %}{{ '\n' + m.content + '<|eos|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|><think>\n' }}{% endif %}"
    )
    first, last = render(template, chat("a", "b", "c", "d"))
    assert first.text.startswith("<U>a<|start|><think>\n\n</think>\n\nb<|eos|>")
    assert replies(first) == ["\n</think>\n\nb<|eos|>"]
    assert last.text.startswith("<U>a<|start|>b<|eos|><|start|><|eos|><U>c<|start|><think>\n")
    assert replies(last) == ["\n</think>\n\nd<|eos|>"]


def test_a_reply_without_its_thinking_is_lossy():
    template = tt.CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    (rendered,) = render(template, chat("a", "<think>why</think>b"))
    assert replies(rendered) == ["b<|im_end|>"] and rendered.lossy


def test_a_prompt_may_open_a_thinking_block():
    (rendered,) = render(tt.THINKING, chat("a", "<think>\nwhy\n</think>\n\nb"))
    assert replies(rendered) == ["why\n</think>\n\nb<|im_end|>"] and not rendered.lossy
    (rendered,) = render(tt.THINKING, chat("a", "b"))
    assert replies(rendered) == ["\n</think>\n\nb<|im_end|>"] and not rendered.lossy


def test_phi_puts_eos_after_the_last_message_only():
    (rendered,) = render(tt.PHI, chat("a", "b", "c", "d"))
    assert replies(rendered) == ["b<|stop|>", "d<|stop|>\n<|eos|>"]


def test_harmony_ends_replies_differently_and_is_split():
    texts = render(tt.HARMONY, chat("a", "b", "c", "d"))
    assert [replies(t) for t in texts] == [["b<|eos|>"], ["d<|eos|>"]]
    assert "b<|stop|>" in texts[1].text


def test_a_chat_may_begin_with_a_reply():
    for template in (tt.CHATML, tt.LLAMA3, tt.QWEN3):
        rendered = render(template, chat("hello", "a", "b", first="assistant"))
        last = replies(rendered[-1])[-1]
        found = [r for t in rendered for r in replies(t)]
        assert len(found) == 2 and "hello" in found[0] and "b<|" in last


def test_first_and_weights_choose_replies():
    row = chat("a", "b", "c", "d", first="user")
    (rendered,) = render(tt.CHATML, Chat(row.where, row.messages, first=2))
    assert replies(rendered) == ["d<|im_end|>"]
    messages = [*row.messages[:3], {**row.messages[3], "weight": 0}]
    (rendered,) = render(tt.CHATML, Chat(row.where, messages))
    assert replies(rendered) == ["b<|im_end|>"]


STYLES = {
    name: getattr(tt, name)
    for name in ("CHATML", "LLAMA3", "QWEN3", "DEEPSEEK", "THINKING", "MISTRAL", "PHI", "HARMONY")
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("excluded", [(0,), (1,), (2,), (3,), (0, 3)])
def test_a_whole_text_leaves_out_what_is_not_trained(style, excluded):
    """``"weight": 0`` counts for a loss on all tokens, too, whatever the role."""
    contents = ["first question", "an answer", "more of it", "last words"]
    messages = [
        {**m, "weight": 0} if i in excluded else m for i, m in enumerate(chat(*contents).messages)
    ]
    render = ChatRenderer(tt.tiny_tokenizer(STYLES[style]))
    rendered = render.whole(Chat("x:1", messages))
    assert len(rendered.excluded) == len(excluded) and rendered.spans == ()
    for i, (start, end) in zip(excluded, rendered.excluded, strict=True):
        out = rendered.text[start:end]
        assert contents[i] in out
        assert not any(c in out for j, c in enumerate(contents) if j != i)
        # No headers: at most an empty thought before the content, and the end of the turn.
        rest = out.replace(contents[i], "").replace("[/INST]", "")
        assert re.fullmatch(r"(<think>)?\s*(</think>\s*)?(<\|(im_end|stop|eos)\|>\s*)*", rest)


def test_a_whole_text_leaves_out_calls_that_are_not_trained():
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "2", "weight": 0},
        {"role": "assistant", "content": "two"},
    ]
    for template, call, result in (
        (tt.QWEN3, '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>', "2"),
        (tt.XML_CALLS, "<function=add><parameter=a>1</parameter></function><|im_end|>", "2"),
        (tt.CHATML, '{"name": "add", "arguments": {"a": 1}}<|im_end|>', "2<|im_end|>"),
    ):
        rendered = ChatRenderer(tt.tiny_tokenizer(template)).whole(Chat("x:1", messages, TOOLS))
        found = [rendered.text[start:end] for start, end in rendered.excluded]
        assert found[0] == call
        assert found[1].startswith(result) and "two" not in found[1]


def test_identical_replies_keep_their_positions():
    (rendered,) = render(tt.CHATML, chat("yes", "yes", "yes", "yes"))
    (a, b), (c, d) = rendered.spans
    assert replies(rendered) == ["yes<|im_end|>"] * 2
    assert rendered.text[:a].endswith("assistant\n") and rendered.text[b:c].count("user") == 1
    assert rendered.text[d:] == "\n"


def test_templates_without_tools_get_them_as_text():
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    (rendered,) = render(tt.CHATML, Chat("x:1", messages, TOOLS))
    call = '{"name": "add", "arguments": {"a": 1}}<|im_end|>'
    assert replies(rendered) == [call, "two<|im_end|>"]
    assert rendered.text.startswith("<|im_start|>system\nTools:\n[{")
    assert "<|im_start|>user\n2<|im_end|>" in rendered.text
    (rendered,) = render(tt.CHATML, Chat("x:1", messages, TOOLS, first=2))
    assert replies(rendered) == ["two<|im_end|>"]


def test_a_template_that_refuses_or_hides_replies_is_an_error():
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate") as e:
        render(refusing, chat("a", "b"))
    assert e.value.where == "x.jsonl:7"
    hiding = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    # Templates of vision models expect lists of parts, and render strings as nothing.
    parts = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}"
    for template in (hiding, parts + "<|im_end|>{% endfor %}"):
        with pytest.raises(DataError, match="does not show the reply"):
            render(template, chat("a", "b"))
