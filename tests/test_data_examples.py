"""Token ids and labels of each kind of row."""

import numpy as np
import pytest
import tiny_tokenizer as tt

from jlora.data.examples import IGNORE, Counts, encode
from jlora.data.formats import alpaca_prompt
from jlora.data.rows import Chat, Completion, Text
from jlora.errors import DataError


def chat(*contents):
    roles = ("user", "assistant")
    return Chat("x:1", [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)])


def streams(examples):
    """Each example's tokens, its last target included, and which of them are learned."""
    for i in range(len(examples)):
        ids, labels = examples[i]
        known = labels != IGNORE
        np.testing.assert_array_equal(labels[:-1][known[:-1]], ids[1:][known[:-1]])
        yield [*ids.tolist(), *labels[-1:][known[-1:]].tolist()], [False, *known.tolist()]


def learned(examples, tokenizer):
    """What each example teaches, as a text."""
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
        if not trim:  # under trimmed ranges transformers' mask itself loses leading spaces
            np.testing.assert_array_equal(labels, expected[: len(ids)])
        learned_text = tokenizer.decode(labels[labels != IGNORE])
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


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_and_eos_that_a_row_has_are_not_doubled(adds_bos):
    tokenizer = tt.tiny_tokenizer(adds_bos=adds_bos)
    rows = [
        (Text("x:1", "Hello world"), Text("x:1", "<|begin|>Hello world<|eos|>")),
        (Completion("x:1", "2 +", " 2"), Completion("x:1", "<|begin|>2 +", " 2<|eos|>")),
    ]
    for assistant_only_loss in (True, False):
        for plain, marked in rows if adds_bos else [(r, r) for _, r in rows]:
            wanted, _ = encode([plain], tokenizer, 512, assistant_only_loss)
            examples, _ = encode([marked], tokenizer, 512, assistant_only_loss)
            ((tokens, _),) = streams(examples)
            assert tokens == next(streams(wanted))[0]
            for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
                assert tokens.count(special) == 1


@pytest.mark.parametrize("make", [tt.tiny_tokenizer, tt.merging_tokenizer])
def test_messages_that_are_not_trained_have_no_loss_in_a_whole_text(make):
    """Counted by hand: the ids are those of the whole text, without the marked messages' labels."""
    tokenizer = make()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    row = chat("how", "hot", "then", "that")
    row.messages[0]["weight"] = row.messages[1]["weight"] = 0
    text = "<user>\nhow\n<assistant>\nhot\n<user>\nthen\n<assistant>\nthat\n"
    examples, counts = encode([row], tokenizer, 512, assistant_only_loss=False)
    ((tokens, mask),) = streams(examples)
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = [True, *mask[1:]]  # nothing precedes the first token
    if make is tt.tiny_tokenizer:
        taught = tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
        assert taught == "<user>\n\n<assistant>\n<user>\nthen\n<assistant>\nthat\n"
    else:
        # One token has the line break and the h: it is left out with the reply that it belongs to.
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        left_out = [p for p, m in zip(pieces, mask, strict=True) if not m]
        assert left_out == ["\nh", "o", "w", "\nh", "o", "t\n"], left_out
    everything, _ = encode([chat("how", "hot", "then", "that")], tokenizer, 512, False)
    assert all(next(streams(everything))[1][1:])
    assert counts.dropped == 0


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
    dropping = tt.CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    thinking = chat("a", "<think>why</think>b", "c", "d")
    examples, counts = encode([thinking], tt.tiny_tokenizer(dropping), 512)
    assert (len(examples), counts.split, counts.lossy) == (1, 0, 1)


# Line breaks of a prompt and of its reply form one token, which the prompt alone does not end in.
STRADDLING = [
    Completion("x:1", "2 + 2\n", "\n4"),
    Completion("x:2", "Hello", "\nworld"),
    chat("a", "\n\nb"),
    chat("a", "\n\nb", "c", "d", "e", "\nf"),
]


@pytest.mark.parametrize("make", [tt.merging_tokenizer, tt.tiny_tokenizer])
@pytest.mark.parametrize("row", [*STRADDLING, Completion("x:3", "a t\n", "\nhel")])
def test_replies_have_the_tokens_of_inference(make, row):
    """The context of each reply is its prompt's own ids; the reply has no piece for a space."""
    tokenizer = make()
    if isinstance(row, Completion):
        prompts, texts = [row.prompt], [row.completion]
    else:
        turns = range(1, len(row.messages), 2)
        prompts = [
            tokenizer.apply_chat_template(
                row.messages[:i], tokenize=False, add_generation_prompt=True
            )
            for i in turns
        ]
        texts = [row.messages[i]["content"] for i in turns]
    examples, _ = encode([row], tokenizer, 512)
    found = 0
    for tokens, mask in streams(examples):
        starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
        for start in starts:
            prompt = tokenizer(prompts[found], add_special_tokens=False)["input_ids"]
            assert tokens[:start] == prompt
            end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
            reply = tokens[start:end]
            assert tokenizer.convert_ids_to_tokens(reply[:1]) != ["▁"]
            shown = tokenizer.decode(prompt + reply, skip_special_tokens=False)
            assert shown.startswith((prompts[found] + texts[found]).rstrip())
            found += 1
    assert found == len(prompts)


def test_rows_with_the_tokens_of_inference_are_counted():
    _, counts = encode([*STRADDLING, chat("a", "b")], tt.tiny_tokenizer(), 512)
    assert counts.retokenized == 2  # GPT-2's pattern keeps the line breaks of the others apart


@pytest.mark.parametrize("make", [tt.merging_tokenizer, tt.tiny_tokenizer])
def test_a_loss_on_all_tokens_has_the_tokens_of_the_whole_text(make):
    tokenizer = make()
    rows = [*STRADDLING, Completion("x:3", "a t\n", "\nhel")]
    examples, counts = encode(rows, tokenizer, 512, assistant_only_loss=False)
    assert len(examples) == len(rows) and counts.retokenized == 0
    for row, (tokens, mask) in zip(rows, streams(examples), strict=True):
        if isinstance(row, Completion):
            whole = tokenizer(row.prompt + row.completion)["input_ids"] + [tokenizer.eos_token_id]
        else:
            whole = tokenizer.apply_chat_template(row.messages, tokenize=True)["input_ids"]
        assert tokens == whole and all(mask[1:])


def test_progress_and_chunks():
    tokenizer, told = tt.tiny_tokenizer(), []
    rows = [Text(f"x:{i}", f"text {i}") for i in range(1030)]
    examples, _ = encode(rows, tokenizer, 64, progress=lambda n, m: told.append((n, m)))
    assert told == [(512, 1030), (1024, 1030), (1030, 1030)]
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
