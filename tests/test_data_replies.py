"""Prompts and replies for evaluation by generation."""

import json

import pytest
import tiny_tokenizer as tt

from jlora.config import DataConfig, SourceConfig
from jlora.data.chat import ChatRenderer
from jlora.data.examples import encode
from jlora.data.formats import FORMATS, alpaca_prompt
from jlora.data.replies import reply_row, reply_rows
from jlora.data.rows import Chat, Completion, Text
from jlora.inference.scoring import Sample

USER = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
REPLY = {"role": "assistant", "content": "hello"}


def test_the_last_reply_of_a_chat_is_the_reference():
    tokenizer = tt.tiny_tokenizer("{{ bos_token }}" + tt.CHATML, adds_bos=True)
    row = Chat("x:1", [USER, REPLY, {"role": "user", "content": "more"}, {**REPLY, "content": "b"}])
    made = reply_row(row, ChatRenderer(tokenizer))
    assert made.reply == "b" and made.prompt.endswith("<|im_start|>assistant\n")
    assert list(made.prompt_ids).count(tokenizer.bos_token_id) == 1
    # Generation begins at the first training target.
    examples, _ = encode([row], tokenizer, 512)
    ids, labels = examples[0]
    n = len(made.prompt_ids)
    assert tuple(ids[:n]) == made.prompt_ids
    assert tokenizer.decode(labels[n - 1 :]) == "b<|im_end|>" and labels[n - 2] == -100


def test_completions_and_alpaca_without_a_template():
    tokenizer = tt.tiny_tokenizer(None, adds_bos=True)
    made = reply_row(Completion("x:1", "a", "b"), ChatRenderer(tokenizer))
    assert made.prompt_ids == tuple(tokenizer("a")["input_ids"]) and made.reply == "b"
    row = FORMATS["alpaca"]("x:1", {"instruction": "T", "output": "O"})
    made = reply_row(row, ChatRenderer(tokenizer))
    assert made.prompt == alpaca_prompt("T") and made.reply == "O"
    tokenizer.chat_template = tt.CHATML
    assert reply_row(row, ChatRenderer(tokenizer)).prompt.startswith(
        "<|im_start|>user\nT<|im_end|>"
    )


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CHATS = [
    [USER, REPLY],
    [USER, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nhello"}],
    [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("style", ["CHATML", "QWEN3", "DEEPSEEK", "THINKING", "MISTRAL"])
def test_a_model_that_learned_a_reply_matches_it(style, messages):
    """What training teaches after the prompt, decoded as generated tokens are, is the reference."""
    tokenizer = tt.tiny_tokenizer(getattr(tt, style))
    row = Chat("x:1", messages, TOOLS if "tool_calls" in messages[1] else None)
    made = reply_row(row, ChatRenderer(tokenizer))
    examples, _ = encode([row], tokenizer, 1024)
    ids, labels = examples[0]
    n = len(made.prompt_ids)
    assert tuple(ids[:n]) == made.prompt_ids and (labels[: n - 1] == -100).all()
    generated = tokenizer.decode(labels[n - 1 :], skip_special_tokens=True)
    assert Sample(made.prompt, made.reply, generated).exact
    assert not Sample(made.prompt, made.reply, "").exact


def test_tool_calls_of_templates_without_tools():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = Chat("x:1", [USER, message], TOOLS)
    made = reply_row(row, ChatRenderer(tt.tiny_tokenizer(tt.CHATML)))
    assert made.reply == '{"name": "f", "arguments": {}}' and "hi<|im_end|>" in made.prompt


def test_rows_without_replies_are_left_out(tmp_path):
    tokenizer = tt.tiny_tokenizer()
    assert reply_row(Text("x:1", "a"), ChatRenderer(tokenizer)) is None
    assert reply_row(Chat("x:1", [USER]), ChatRenderer(tokenizer)) is None
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [USER]}, {"messages": [USER, REPLY]}, {"messages": [USER, REPLY]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=str(path), format="messages")
    data = DataConfig(train=[source], eval=[source])
    found = reply_rows(data.eval, tokenizer, data)
    assert [r.where for r in found] == [f"{path}:2", f"{path}:3"]
    assert len(reply_rows(data.eval, tokenizer, data, max_rows=1)) == 1
