"""The training data of the quickstart's base model: rows made from Python source."""

import ast
import json

import pytest

from jlora.assets.quickstart import corpus, tokenizer

SOURCE = '''
# One line is not a block.
x = 1

# These three lines
# are one block
# of comments.

def resize(self, path, size=(3, 4), *, mode="fast", limit=7):
    """Change the size of an image.

    More about it.
    """
'''


@pytest.fixture(scope="module")
def resize():
    ((node, text),) = corpus.documented(ast.parse(SOURCE))
    return corpus.function("image", node, text)


def test_function_facts(resize):
    assert resize == corpus.Function(
        module="image",
        name="resize",
        line=9,
        args=("path", "size", "mode", "limit"),
        defaults=(("size", "(3, 4)"), ("mode", "'fast'"), ("limit", "7")),
        summary="Change the size of an image.",
    )


def test_answers_are_in_the_question_or_the_docstring(resize):
    pairs = dict(corpus.questions(resize))
    assert pairs["What does image.resize do?"] == "Change the size of an image."
    assert pairs["Name the last argument of resize(path, size, mode, limit)."] == "limit"
    written = json.loads(pairs["Write resize of image at line 9 as JSON."])
    assert written == {"name": "resize", "module": "image", "line": 9}


def test_comment_blocks():
    assert list(corpus.comments(SOURCE)) == ["These three lines\nare one block\nof comments."]


def test_topics_are_the_language_reference():
    first = next(corpus.topics())
    assert "assert" in first
    assert first.count("\n\n") < 8


def test_library_is_read_in_order_and_without_tests():
    names = [name for name, _ in corpus.sources()]
    assert {"argparse", "json", "json.decoder"} <= set(names)
    assert not [n for n in names if n.startswith(("test.", "site-packages", "idlelib"))]


def test_tokenizer_is_reproducible_and_splits_digits(tmp_path):
    texts = [SOURCE] * 3
    made = [tokenizer.train_tokenizer(texts, 300) for _ in range(2)]
    assert made[0].to_str() == made[1].to_str()
    assert made[0].encode("at 1024").tokens[-4:] == ["1", "0", "2", "4"]
    assert [made[0].token_to_id(t) for t in tokenizer.SPECIAL] == [0, 1, 2, 3, 4]
    assert made[0].decode(made[0].encode("süß 12\n\tx").ids) == "süß 12\n\tx"


def test_chat_template(tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_tokenizer(tmp_path, tokenizer.train_tokenizer([SOURCE], 280), 512)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    conversation = loaded.apply_chat_template(chat, tokenize=False)
    prompt = loaded.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert conversation == "<|user|>Hi<|end|><|assistant|>Yes<|end|>"
    assert prompt == "<|user|>Hi<|end|><|assistant|>"
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")
    assert loaded("<|end|>", add_special_tokens=False)["input_ids"] == [4]
