"""From files to batches."""

import json
import threading

import numpy as np
import pytest
import tiny_tokenizer as tt

from jlora.config import DataConfig, SourceConfig
from jlora.data import batches
from jlora.data.batches import batch_at, eval_batches, prefetch
from jlora.data.examples import IGNORE
from jlora.data.preparation import prepare
from jlora.errors import DataError


def chats(n, words=3):
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i} " + "word " * (i % words)},
            ]
        }
        for i in range(n)
    ]


def config(tmp_path, rows, format="messages", name="train", **options):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(train=[SourceConfig(path=str(path), format=format)], **options)


def made(data, role="train", template=tt.CHATML, **special):
    return prepare(data.train, tt.tiny_tokenizer(template, **special), data, role)


def documents(batch):
    """The tokens of all documents of a batch, as strings in sorted tuples."""
    length = batch["input_ids"].shape[-1]
    flat = {k: v.reshape(-1, length) for k, v in batch.items()}
    found = []
    for ids, segments in zip(flat["input_ids"], flat["segment_ids"], strict=True):
        found += [tuple(ids[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return sorted(found)


def test_batches_contain_every_chat_once_per_epoch(tmp_path):
    """Every chat of the file is decoded from the batches once per epoch."""
    rows, tokenizer = chats(23), tt.tiny_tokenizer()
    data = config(tmp_path, rows, max_length=64)
    prepared = prepare(data.train, tokenizer, data)
    order = prepared.order(4, seed=0)
    seen, targets = [], 0
    for step in range(order.steps_per_epoch):
        batch = batch_at(prepared, order, step, accum=2)
        types = dict.fromkeys(("input_ids", "labels", "positions"), np.int32)
        types["segment_ids"] = np.uint8
        assert {k: v.dtype for k, v in batch.items()} == types
        assert {v.shape for v in batch.values()} == {(2, 2, 64)}
        targets += (batch["labels"] != IGNORE).sum()
        seen += [tokenizer.decode(d) for d in documents(batch)]
    wanted = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows]
    assert sorted(seen) == sorted(w.removesuffix("<|im_end|>\n") for w in wanted)
    assert targets == prepared.target_tokens == sum(s.target_tokens for s in prepared.sources)
    (report,) = prepared.sources
    assert (report.rows, report.examples, report.skipped) == (23, 23, 0)
    assert prepared.tokens == (prepared.packed.segment_ids > 0).sum()
    assert prepared.fill == (prepared.packed.segment_ids > 0).mean()


def test_the_last_batch_is_padded_with_empty_rows(tmp_path):
    prepared = made(config(tmp_path, chats(5), max_length=64, packing=False))
    order = prepared.order(4, seed=0)
    assert order.steps_per_epoch == 2
    last = batch_at(prepared, order, 1, accum=2)
    flat = {k: v.reshape(4, -1) for k, v in last.items()}
    assert (flat["segment_ids"].any(1)).tolist() == [True, False, False, False]
    assert (flat["labels"][1:] == IGNORE).all() and not flat["input_ids"][1:].any()


def test_resuming_gives_the_same_batches(tmp_path):
    prepared = made(config(tmp_path, chats(30), max_length=64))
    order = prepared.order(4, seed=7)
    uninterrupted = list(prefetch(lambda step: batch_at(prepared, order, step), range(9)))
    later = prefetch(lambda step: batch_at(prepared, order, step), range(4, 9))
    for step, batch in enumerate(later, 4):
        assert all((batch[k] == uninterrupted[step][k]).all() for k in batch)


def test_rows_that_do_not_divide_are_refused(tmp_path):
    prepared = made(config(tmp_path, chats(40), max_length=48))
    with pytest.raises(ValueError, match="are not divisible"):
        batch_at(prepared, prepared.order(8, seed=7), 0, accum=3)


def test_evaluation_sees_every_row_once_in_order(tmp_path):
    data = config(tmp_path, chats(7), max_length=64, packing=True, eval_packing=False)
    prepared = made(data, "eval")
    assert len(prepared.packed) == 7
    found = list(eval_batches(prepared, 4))
    assert [b["input_ids"].shape for b in found] == [(1, 4, prepared.length)] * 2
    ids = np.concatenate([b["input_ids"][0] for b in found])
    np.testing.assert_array_equal(ids[:7], prepared.packed.input_ids)
    assert not ids[7:].any()
    assert len(made(data).packed) < 7


@pytest.mark.parametrize(("words", "length"), [(1, 32), (30, 128), (90, 200)])
def test_without_packing_rows_are_as_long_as_the_longest(tmp_path, words, length):
    prepared = made(config(tmp_path, chats(words), max_length=200, packing=False))
    if words == 1:
        prepared = made(config(tmp_path, chats(2, 1), max_length=200, packing=False))
    longest = int((prepared.packed.segment_ids > 0).sum(1).max())
    assert longest <= prepared.length <= 200
    step = 8 if prepared.length <= 64 else 64
    assert prepared.length == 200 or (
        prepared.length % step == 0 and prepared.length - longest < step
    )
    assert prepared.length <= max(length, 64) or prepared.length == 200


def test_several_sources_and_formats(tmp_path):
    one = config(tmp_path, chats(4), name="a").train[0]
    two = config(tmp_path, [{"text": "Hello world " * 20}], "text", name="b").train[0]
    two = SourceConfig(path=two.path, format="text", weight=3.0)
    data = DataConfig(train=[one, two], max_length=32)
    prepared = made(data)
    assert [s.weight for s in prepared.sources] == [1.0, 3.0]
    rows = [s.packed_rows for s in prepared.sources]
    assert prepared.order(2, 0).rows_per_epoch == rows[0] + 3 * rows[1]
    assert len(prepared.packed) == sum(rows)


def test_nothing_to_learn_is_an_error(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}]}] * 3
    data = config(tmp_path, rows)
    with pytest.raises(DataError, match="no token is to be learned in any of its 3 rows") as e:
        made(data)
    assert e.value.where == data.train[0].path and "replies" in e.value.fix
    long = [{"prompt": "Hello world " * 50, "completion": "x"}]
    with pytest.raises(DataError, match=r"1 are longer than data\.max_length=16[^$]*raise data"):
        made(config(tmp_path, long, "prompt_completion", max_length=16))


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path):
    refusing = (
        "{% if '3' in messages[0].content %}{{ raise_exception('no 3') }}{% endif %}" + tt.CHATML
    )
    data = config(tmp_path, chats(5))
    with pytest.raises(DataError, match="no 3") as e:
        made(data, template=refusing)
    assert e.value.where == f"{data.train[0].path}:4"
    prepared = made(config(tmp_path, chats(5), on_bad_row="skip"), template=refusing)
    (report,) = prepared.sources
    assert (report.rows, report.skipped) == (4, 1)
    assert "train.jsonl:4" in report.skipped_notes[0]
    assert any("1 bad rows skipped" in w for w in prepared.warnings)


def test_warnings(tmp_path):
    prepared = made(config(tmp_path, chats(3), max_length=26))
    text = "\n".join(prepared.warnings)
    assert "2 of 3 rows are longer than data.max_length=26" in text
    assert "'<|eos|>' is never learned" in text  # the template ends turns with another token
    prepared = made(config(tmp_path, chats(3)), template=None)
    (warning,) = prepared.warnings
    assert "no chat template" in warning
    assert made(config(tmp_path, chats(3)), eos_token="<|im_end|>").warnings == ()
    thinking = [{"messages": [{"role": "user", "content": "a"}]}]
    thinking[0]["messages"].append({"role": "assistant", "content": "<think>why</think>b"})
    dropping = tt.CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    eos = {"eos_token": "<|im_end|>"}
    (warning,) = made(config(tmp_path, thinking), template=dropping, **eos).warnings
    assert "only part of the replies" in warning


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_marks_on_messages_that_are_not_replies(tmp_path, format):
    """As in axolotl's rows; only a loss on all tokens learns them."""
    names = {"messages": ("role", "content", "user", "assistant")}
    role, content, user, assistant = names.get(format, ("from", "value", "human", "gpt"))
    turns = [{role: user, content: "a", "train": True}, {role: assistant, content: "b"}]
    rows = [
        {"messages" if format == "messages" else "conversations": turns},
        {"messages" if format == "messages" else "conversations": [turns[1] | {"train": True}]},
    ]
    said = "1 rows mark other messages than replies as trained"
    for only_replies in (True, False):
        data = config(tmp_path, rows, format=format, assistant_only_loss=only_replies)
        found = [text for text in made(data).warnings if said in text]
        assert len(found) == only_replies


def test_what_may_surprise_in_a_source_is_said(tmp_path):
    def pair(question, answer):
        user = {"role": "user", "content": question}
        return {"messages": [user, {"role": "assistant", "content": answer}]}

    rows = [pair("a", "<think>why</think>b"), pair("a", ""), pair("a", " "), pair("a", "☃b")]
    rows[0]["messages"] += pair("c", "d")["messages"]
    prepared = made(config(tmp_path, rows), template=tt.QWEN3, eos_token="<|im_end|>")
    text = "\n".join(prepared.warnings)
    assert "1 chats became 2 examples, since a later prompt does not begin with" in text
    assert "2 rows teach an empty reply" in text
    assert "no tokens for" not in text  # a byte-level tokenizer has tokens for everything
    (report,) = prepared.sources
    assert 20 < report.longest < 80
    assert prepared.largest_token_where.startswith(f"{tmp_path}/train.jsonl:")
    tokenizer, texts = tt.merging_tokenizer(), [{"text": t} for t in ("a☃b日", "b日", "plain")]
    data = config(tmp_path, texts, "text")
    (warning,) = prepare(data.train, tokenizer, data).warnings
    assert "the tokenizer has no tokens for '日' (2 texts), '☃' (1 texts)" in warning


def test_xml_style_calls_are_not_lossy(tmp_path):
    call = {"function": {"name": "look_up", "arguments": {"city": "Köln", "n": 3}}}
    rows = chats(1)
    rows[0]["messages"][1] = {"role": "assistant", "tool_calls": [call]}
    prepared = made(config(tmp_path, rows), template=tt.XML_CALLS, eos_token="<|im_end|>")
    assert prepared.warnings == ()


def test_unknown_keys_are_listed_once_or_refused(tmp_path):
    rows = [{**row, "origin": "web", "enable_thinking": False} for row in chats(3)]
    eos = {"eos_token": "<|im_end|>"}
    (warning,) = made(config(tmp_path, rows), **eos).warnings
    assert "'origin' (3 of 3 rows), 'enable_thinking' (3 of 3 rows)" in warning
    data = config(tmp_path, rows, on_unknown_key="error")
    with pytest.raises(DataError, match="'origin'") as e:
        made(data)
    assert e.value.where == f"{data.train[0].path}:1"
    template = tt.CHATML + "{% if enable_thinking %}think{% endif %}"
    (warning,) = made(config(tmp_path, rows), template=template, **eos).warnings
    assert "enable_thinking" not in warning
    data = config(tmp_path, chats(3), chat_template_kwargs={"thinking": True})
    (warning,) = made(data, **eos).warnings
    assert "does not read 'thinking'" in warning


def test_template_variables_of_the_settings_and_of_rows(tmp_path):
    template = (
        tt.CHATML + "{% if add_generation_prompt and short %}{{ '<think></think>' }}{% endif %}"
    )
    template = template.replace(
        "+ m.content",
        "+ ('<think></think>' if short and m.role == 'assistant' else '') + m.content",
    )
    rows = [*chats(1), {**chats(1)[0], "chat_template_kwargs": {"short": False}}]
    data = config(tmp_path, rows, chat_template_kwargs={"short": True}, packing=False)
    prepared = made(data, template=template)
    texts = [tt.tiny_tokenizer().decode(ids) for ids in prepared.packed.input_ids]
    assert ["<think></think>" in text for text in texts] == [True, False]


def test_a_missing_template_is_saved_with_the_tokenizer(tmp_path):
    tokenizer, data = tt.tiny_tokenizer(None), config(tmp_path, chats(3))
    prepare(data.train, tokenizer, data)
    assert "### Assistant" in tokenizer.chat_template
    alpaca = config(tmp_path, [{"instruction": "a", "output": "b"}], "alpaca")
    tokenizer = tt.tiny_tokenizer(None)
    prepare(alpaca.train, tokenizer, alpaca)
    assert tokenizer.chat_template is None


def test_fingerprints_distinguish_data(tmp_path):
    base = made(config(tmp_path, chats(9))).fingerprint
    assert base == made(config(tmp_path, chats(9))).fingerprint
    others = {
        made(config(tmp_path, chats(10))).fingerprint,
        made(config(tmp_path, chats(9), max_length=512)).fingerprint,
        made(config(tmp_path, chats(9), assistant_only_loss=False)).fingerprint,
        base,
    }
    data = config(tmp_path, chats(9))
    heavier = SourceConfig(path=data.train[0].path, format="messages", weight=2.0)
    others.add(prepare([heavier], tt.tiny_tokenizer(), data).fingerprint)
    assert len(others) == 5


def test_prefetching_keeps_order_is_bounded_and_propagates_errors():
    made_steps = []

    def make(step):
        made_steps.append(step)
        if step == 5:
            raise KeyError("five")
        return step * step

    steps = prefetch(make, range(10), depth=2)
    assert next(steps) == 0
    assert max(made_steps) <= 2
    assert [next(steps) for _ in range(4)] == [1, 4, 9, 16]
    with pytest.raises(KeyError, match="five"):
        next(steps)
    assert len(made_steps) <= 8
    abandoned = prefetch(make, range(10, 20))
    next(abandoned)
    abandoned.close()
    assert not any(t.name.startswith("jlora-data") for t in threading.enumerate())


def test_progress(tmp_path):
    data, reports = config(tmp_path, chats(3)), []
    prepare(data.train, tt.tiny_tokenizer(), data, progress=lambda *a: reports.append(a))
    assert reports == [(data.train[0].path, 3, 3)]


def test_no_jax_is_needed():
    assert "jax" not in vars(batches)


@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("instruction.json", "alpaca"),
        ("chat_messages.jsonl", "messages"),
        ("toolcall_sharegpt.json", "sharegpt"),
        ("gsm8k/test.jsonl", "prompt_completion"),
    ],
)
def test_real_data_packs_tightly(assets, file, format):
    from jlora.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(assets / "models" / "stories260k"))
    source = SourceConfig(path=str(assets / "data" / file), format=format)
    data = DataConfig(train=[source], max_length=2048)
    prepared = prepare(data.train, tokenizer, data)
    (report,) = prepared.sources
    assert report.examples + report.dropped == report.rows
    assert prepared.fill > 0.9
    eos = (prepared.packed.labels == tokenizer.eos_token_id).sum()
    assert eos >= report.examples - report.truncated
