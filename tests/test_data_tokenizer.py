"""Loading tokenizers, and the plain template."""

import random

import pytest
import tiny_tokenizer as tt
from tokenizers import AddedToken, pre_tokenizers

from jlora.data.chat import ChatRenderer
from jlora.data.rows import Chat
from jlora.data.tokenizer import (
    bos_prefix,
    ensure_template,
    eos_suffix,
    load_tokenizer,
    prefix_ids,
    token_ids,
)
from jlora.errors import ConfigError, DataError

MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
]


def test_a_saved_tokenizer_comes_back_with_its_template_or_another(tmp_path):
    tt.tiny_tokenizer(tt.CHATML).save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded.chat_template == tt.CHATML
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    loaded = load_tokenizer(str(tmp_path / "model"), str(tmp_path / "t.jinja"))
    assert loaded.chat_template == "{{ messages }}"


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer here") as e:
        load_tokenizer(str(tmp_path))
    assert e.value.where == str(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
    tt.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no chat template here"):
        load_tokenizer(str(tmp_path), str(tmp_path / "none.jinja"))


def test_code_in_a_model_folder_does_not_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'
    )
    (tmp_path / "config.json").write_text(
        '{"auto_map": {"AutoConfig": "evil.C"}, "model_type": "x"}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_bos_only_where_the_tokenizer_adds_it():
    plain, llama = tt.tiny_tokenizer(), tt.tiny_tokenizer(adds_bos=True)
    assert bos_prefix(plain) == [] and bos_prefix(llama) == [llama.bos_token_id]
    assert eos_suffix(plain) == [plain.eos_token_id]
    assert eos_suffix(tt.tiny_tokenizer(eos_token=None)) == []
    assert token_ids("a", llama) == llama("a")["input_ids"][1:]


def test_the_plain_template():
    tokenizer = tt.tiny_tokenizer(None)
    assert ensure_template(tokenizer)
    (rendered,) = ChatRenderer(tokenizer)(Chat("x:1", MESSAGES))
    assert rendered.text == "### System:\ns\n\n### User:\nu\n\n### Assistant:\na<|eos|>\n\n"
    assert [rendered.text[s:e] for s, e in rendered.spans] == ["a<|eos|>"]
    assert not ensure_template(tokenizer)
    llama = tt.tiny_tokenizer(None, adds_bos=True)
    ensure_template(llama)
    (rendered,) = ChatRenderer(llama)(Chat("x:1", MESSAGES))
    assert rendered.text.startswith("<|begin|>### System")


def space_marking_tokenizer(scheme):
    """A SentencePiece-like tokenizer that marks a space at the beginning, as the scheme says."""
    tokenizer = tt.merging_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


def stripping_tokenizer():
    """Special tokens that take the white space before or after them."""
    tokenizer = tt.tiny_tokenizer()
    extra = [AddedToken("<l>", lstrip=True, special=True), AddedToken("<r>", rstrip=True)]
    tokenizer.add_tokens(extra, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        tt.tiny_tokenizer(),
        tt.tiny_tokenizer(adds_bos=True),
        tt.merging_tokenizer(),
        space_marking_tokenizer("first"),
        space_marking_tokenizer("always"),
        stripping_tokenizer(),
    ],
    ids=["bytes", "adds bos", "merging", "marks first", "marks always", "strips"],
)
def test_prefixes_are_tokenized_as_texts_of_their_own(tokenizer):
    rng = random.Random(0)
    special = [*tokenizer.all_special_tokens, "<l>", "<r>"]
    words = ["hel", "the", " ", "\n", "\nh", "t\n", "a t", *special, *special]
    texts = ["".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(300)]
    cuts = [sorted(rng.choices(range(len(text) + 1), k=5)) for text in texts]
    expected = [
        [token_ids(text[:cut], tokenizer) for cut in ends]
        for text, ends in zip(texts, cuts, strict=True)
    ]
    assert list(prefix_ids(texts, cuts, tokenizer)) == expected


class Counting:
    """A tokenizer that records the texts it is given."""

    is_fast = True

    def __init__(self, tokenizer):
        self.tokenizer, self.given = tokenizer, []
        self.added_tokens_decoder = tokenizer.added_tokens_decoder

    def __call__(self, texts, **options):
        self.given.extend(texts)
        return self.tokenizer(texts, **options)


def test_what_precedes_a_special_token_is_tokenized_once():
    """The characters that are tokenized for a chat of 40 replies: fewer than its own."""
    tokenizer = tt.tiny_tokenizer()
    counting = Counting(tokenizer)
    turn = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\nreply<|im_end|>\n"
    text = "".join(turn.replace("ask", str(100 + i)) for i in range(40))
    starts = [at for at in range(len(text)) if text.startswith("reply", at)]
    cuts = [end for start in starts for end in (start, start + len("reply<|im_end|>"))]
    (ids,) = prefix_ids([text], [cuts], counting)
    assert ids[-1] == token_ids(text[: cuts[-1]], tokenizer)
    assert sum(map(len, counting.given)) < len(text)


def test_equal_texts_are_tokenized_once():
    """A system prompt that all chats have, and special tokens by themselves."""
    tokenizer = tt.tiny_tokenizer()
    counting = Counting(tokenizer)
    texts = [f"<|im_start|>system\nsame<|im_end|>\n<|im_start|>user\n{i}<|im_end|>" for i in "abc"]
    cuts = [[len(text) - 10, len(text)] for text in texts]
    found = list(prefix_ids(texts, cuts, counting))
    assert found == [
        [token_ids(t[:c], tokenizer) for c in e] for t, e in zip(texts, cuts, strict=True)
    ]
    assert len(counting.given) == len(set(counting.given))
    assert sum("same" in text for text in counting.given) == 1
