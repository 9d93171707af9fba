"""Token ids and labels of each kind of row."""

import numpy as np
import pytest
import tiny_tokenizer as tt

from jlora.data.examples import IGNORE, Counts, Piece, encode, encode_by_spans, pieces, target_mask
from jlora.data.formats import alpaca_prompt
from jlora.data.rows import Chat, Completion, Text
from jlora.errors import DataError


def chat(*contents):
    roles = ("user", "assistant")
    return Chat("x:1", [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)])


def streams(examples):
    """Each example's tokens, including its last target, and which of them are targets."""
    for i in range(len(examples)):
        ids, labels = examples[i]
        known = labels != IGNORE
        np.testing.assert_array_equal(labels[:-1][known[:-1]], ids[1:][known[:-1]])
        yield [*ids.tolist(), *labels[-1:][known[-1:]].tolist()], [False, *known.tolist()]


def learned(examples, tokenizer):
    """The targets of each example, as text."""
    return [
        tokenizer.decode([t for t, m in zip(*pair, strict=False) if m])
        for pair in streams(examples)
    ]


@pytest.mark.parametrize("trim", [False, True])
def test_chat_labels_match_transformers_masks(trim):
    tokenizer = tt.tiny_tokenizer(tt.GENERATION, trim_offsets=trim)
    rows = [
        chat("hi", "  hello  you"),
        chat("2 + 2?", "The answer\n", "é😀", " 4 é😀"),
        chat("a", "\n\nb"),
    ]
    examples, _ = encode(rows, tokenizer, 512)
    for i, row in enumerate(rows):
        oracle = tokenizer.apply_chat_template(
            row.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens = np.array(oracle["input_ids"])
        expected = np.where(oracle["assistant_masks"], tokens, IGNORE)[1:]
        ids, labels = examples[i]
        np.testing.assert_array_equal(ids, tokens[: len(ids)])
        assert labels[-1] != IGNORE and (expected[len(ids) :] == IGNORE).all()
        if not trim:  # with trimmed ranges transformers' mask loses leading spaces
            np.testing.assert_array_equal(labels, expected[: len(ids)])
        learned_text = tokenizer.decode(labels[labels != IGNORE])
        if i < 2:  # in the last row one token spans the prompt's and the reply's line breaks
            assert learned_text == "".join(m["content"] + "<|im_end|>" for m in row.messages[1::2])


@pytest.mark.parametrize("adds_bos", [False, True])
def test_no_double_bos(adds_bos):
    tokenizer = tt.tiny_tokenizer(tt.LLAMA3, adds_bos=adds_bos)
    examples, _ = encode([chat("a", "b")], tokenizer, 512)
    assert (examples.ids == tokenizer.bos_token_id).sum() == 1


def test_completions_learn_the_completion_and_eos():
    tokenizer = tt.tiny_tokenizer(adds_bos=True)
    examples, _ = encode([Completion("x:1", "2 + 2 =", " 4")], tokenizer, 512)
    ((tokens, _),) = streams(examples)
    text = tokenizer("2 + 2 = 4")["input_ids"]
    assert tokens == [*text, tokenizer.eos_token_id]
    assert learned(examples, tokenizer) == [" 4<|eos|>"]


def test_every_token_of_a_text_is_a_target():
    tokenizer = tt.tiny_tokenizer(adds_bos=True)
    examples, _ = encode([Text("x:1", "Hello world")], tokenizer, 512)
    ids, labels = examples[0]
    tokens = [*tokenizer("Hello world")["input_ids"], tokenizer.eos_token_id]
    assert ids.tolist() == tokens[:-1] and labels.tolist() == tokens[1:]


def test_long_texts_lose_no_target():
    tokenizer = tt.tiny_tokenizer(adds_bos=True)
    text = "Hello world, how are you today? " * 9
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for length in (2, 7, 16, len(tokens) - 2, len(tokens) - 1):
        examples, counts = encode([Text("x:1", text)], tokenizer, length)
        assert examples.ids.tolist() == tokens[:-1]
        assert examples.labels.tolist() == tokens[1:]
        assert examples.lengths.max() <= length
        assert (counts.truncated, counts.dropped) == (0, 0)


def test_long_chats_are_cut_and_rows_without_targets_dropped():
    tokenizer = tt.tiny_tokenizer()
    rows = [chat("hi", "Hello world " * 50), chat("Hello world " * 50, "hi"), chat("no reply")]
    examples, counts = encode(rows, tokenizer, 64)
    assert examples.lengths.tolist() == [64]
    assert (counts.truncated, counts.dropped) == (2, 2)
    full, _ = encode(rows[:1], tokenizer, 4096)
    np.testing.assert_array_equal(examples.ids, full.ids[:64])
    np.testing.assert_array_equal(examples.labels, full.labels[:64])


def test_loss_on_all_tokens():
    tokenizer = tt.tiny_tokenizer()
    rows = [chat("hi", "hello"), Completion("x:1", "a", "b")]
    examples, _ = encode(rows, tokenizer, 512, assistant_only_loss=False)
    for ids, labels in (examples[0], examples[1]):
        np.testing.assert_array_equal(labels[:-1], ids[1:])


def test_alpaca_without_a_template_is_stanfords_prompt():
    tokenizer = tt.tiny_tokenizer(None)
    row = Chat("x:1", chat("T", "4").messages, plain=(alpaca_prompt("T"), "4"))
    examples, _ = encode([row], tokenizer, 512)
    ((tokens, _),) = streams(examples)
    assert tokenizer.decode(tokens) == alpaca_prompt("T") + "4<|eos|>"
    assert learned(examples, tokenizer) == ["4<|eos|>"]
    with pytest.raises(DataError, match="no chat template"):
        encode([chat("a", "b")], tokenizer, 512)


def test_pad_equal_to_eos_hides_no_target():
    tokenizer = tt.tiny_tokenizer(None, pad_token="<|eos|>")
    examples, _ = encode([Completion("x:1", "a", "b")], tokenizer, 512)
    assert examples.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_refused_chats_are_collected():
    tokenizer = tt.tiny_tokenizer("{{ raise_exception('no') }}")
    examples, counts = encode([chat("a", "b"), Text("x:2", "text")], tokenizer, 512)
    assert len(examples) == 1 and [e.where for e in counts.bad] == ["x:1"]


def test_split_and_lossy_chats_are_counted():
    thinking = chat("a", "<think>\nwhy\n</think>\n\nb", "c", "d")
    examples, counts = encode([thinking], tt.tiny_tokenizer(tt.QWEN3), 512)
    assert (len(examples), counts.split, counts.lossy) == (2, 1, 0)
    examples, counts = encode([thinking], tt.tiny_tokenizer(tt.DEEPSEEK), 512)
    assert (len(examples), counts.split, counts.lossy) == (1, 0, 1)


def test_ranges_that_miss_a_span_are_refused():
    """Some tokenizers report every range as empty; then segments are encoded separately."""
    piece = Piece("x:1", "abcd", ((2, 4),))
    good = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    assert target_mask(good, piece).tolist() == [False, False, True, True]
    trimmed = np.array(
        [[0, 1], [1, 2], [3, 3], [3, 4]]
    )  # " " trimmed to an empty range, as by Llama-3
    assert target_mask(trimmed, piece).tolist() == [False, False, True, True]
    assert target_mask(good[:, :1].repeat(2, 1), piece) is None
    assert target_mask(np.zeros((0, 2), np.int64), piece) is None


def test_segments_agree_with_ranges_where_no_token_crosses():
    tokenizer = tt.tiny_tokenizer()
    rows = [chat("hi", "hello", "Hello world", "fine, thank you")]
    (piece,) = pieces(rows, tokenizer, Counts())
    ids, mask = encode_by_spans(piece, tokenizer)
    examples, _ = encode(rows, tokenizer, 512)
    n = len(examples.ids)
    assert ids[:n] == examples.ids.tolist() and not mask[n + 1 :].any()
    np.testing.assert_array_equal(np.where(mask, ids, IGNORE)[1 : n + 1], examples.labels)


def test_progress_and_chunks():
    tokenizer, reports = tt.tiny_tokenizer(), []
    rows = [Text(f"x:{i}", f"text {i}") for i in range(1030)]
    examples, _ = encode(rows, tokenizer, 64, progress=lambda n, m: reports.append((n, m)))
    assert reports == [(512, 1030), (1024, 1030), (1030, 1030)]
    assert len(examples) == 1030
    assert learned(examples, tokenizer)[1029] == "ext 1029<|eos|>"


def test_real_chats_with_a_real_tokenizer(assets):
    from jlora.config import SourceConfig
    from jlora.data.loading import load_rows
    from jlora.data.tokenizer import ensure_template, load_tokenizer

    tokenizer = load_tokenizer(str(assets / "models" / "stories260k"))
    ensure_template(tokenizer)
    path = assets / "data" / "chat_messages.jsonl"
    rows = load_rows(SourceConfig(path=str(path), format="messages")).rows[:40]
    examples, counts = encode(rows, tokenizer, 4096)
    assert len(examples) == 40 and counts == Counts()
    for row, text in zip(rows, learned(examples, tokenizer), strict=True):
        wanted = "".join(m["content"] for m in row.messages if m["role"] == "assistant")
        assert "".join(text.split()).replace("</s>", "") == "".join(wanted.split())
