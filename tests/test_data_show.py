"""The batch printed by --show-batch."""

import json

import tiny_tokenizer as tt

from jlora.config import DataConfig, SourceConfig
from jlora.data.batches import batch_at
from jlora.data.preparation import prepare
from jlora.data.show import CONTEXT_STYLE, TARGET_STYLE, show_batch


def test_classes_stand_above_their_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one", "label": 1}, {"text": "two", "label": 0}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(train=[SourceConfig(path=str(path), format="classification")], max_length=64)
    tokenizer, names = tt.tiny_tokenizer(), ("no", "yes")
    prepared = prepare(data.train, tokenizer, data, id2label=names)
    batch = batch_at(prepared, prepared.order(1, 0, shuffle=False), 0)
    text = show_batch(batch, tokenizer, id2label=names)
    assert [line.rpartition(", ")[2] for line in text.plain.splitlines()[::2]] == [
        "yes ──",
        "no ──",
    ]
    assert text.plain.splitlines()[1::2] == ["one", "two"]
    assert not any(str(span.style) == TARGET_STYLE for span in text.spans)


def test_targets_are_coloured_and_nothing_is_lost(tmp_path):
    rows = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        for i in range(3)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in rows))
    data = DataConfig(train=[SourceConfig(path=str(path), format="messages")], max_length=64)
    tokenizer = tt.tiny_tokenizer()
    prepared = prepare(data.train, tokenizer, data)
    batch = batch_at(prepared, prepared.order(2, 0, shuffle=False), 0)
    text = show_batch(batch, tokenizer)
    spans = [(str(s.style), text.plain[s.start : s.end]) for s in text.spans]
    assert [t for style, t in spans if style == TARGET_STYLE] == [
        f"a{i}<|im_end|>" for i in range(3)
    ]
    prompt = "<|im_start|>user\nq{}<|im_end|>\n<|im_start|>assistant\n"
    # the line break after a turn is not a target, and the last token is not an input
    assert [t for style, t in spans if style == CONTEXT_STYLE] == [
        prompt.format(i) for i in range(3)
    ]
    assert "row 1, document 1" in text.plain and "targets" in text.plain
